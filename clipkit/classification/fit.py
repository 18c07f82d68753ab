"""From labels, prompts, models and labelled examples to classifiers, how far to believe them, and what to accept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clipkit.classification import few_shot
from clipkit.classification.classifier import Classifier, zero_shot
from clipkit.classification.examples import Examples
from clipkit.classification.few_shot import FewShot, Shots
from clipkit.classification.labels import LabelSet
from clipkit.classification.logistic import folds_of
from clipkit.core import ClipkitError
from clipkit.metrics import (
    COLDEST,
    HOTTEST,
    auroc,
    calibration_error,
    fit_temperature,
    inner_products,
    precision_threshold,
)
from clipkit.models import LazyModel, fused, probabilities
from clipkit.storage import Cache, hash_of

__all__ = [
    "LEARNERS",
    "Fit",
    "Judged",
    "Learning",
    "Threshold",
    "fit_classifiers",
    "held_out_temperature",
    "ranked",
    "wanted_threshold",
]

Array = np.ndarray
Learn = Callable[[Shots], FewShot]
LEARNERS: dict[str, Learn | None] = {
    "zero-shot": None,  # examples are for calibration and thresholds only
    "prototypes": few_shot.prototypes,
    "tip-adapter": few_shot.tip_adapter,
    "linear": few_shot.linear,
}
FOLDS = 5
LEVEL = 0.95


@dataclass(frozen=True)
class Learning:
    """How classifiers come of class names and of examples."""

    method: str | None = None
    """``zero-shot`` (by the names; examples serve for calibration), ``prototypes``, ``tip-adapter`` or ``linear``, see
    `clipkit.classification.few_shot`; when not given the last one where there are examples, else the first."""
    calibrate: bool = False
    """Fit a temperature to the examples, or take the kept one where there are none."""
    temperature: float | None = None
    """Of one's own, for every model."""
    several: bool = False
    """See `zero_shot`."""


class Judged(NamedTuple):
    """What the classifiers, joined, say of the examples, each judged without its own part in them."""

    truth: Int[Array, " n"]
    """The class of each."""
    names: Float[Array, "n classes"]
    """Probabilities by the class names alone."""
    before: Float[Array, "n classes"]
    """Probabilities before calibration."""
    after: Float[Array, "n classes"]
    """After it, by a temperature that was fitted to the other folds; the same as before it where there is none."""
    shares: Float[Array, "n classes"]
    """Such as images get: by the temperature that is used."""

    def accuracy(self, shares: Float[Array, "n classes"]) -> float:
        """The share of examples whose most probable class is theirs."""
        return float((shares.argmax(axis=1) == self.truth).mean())

    def error(self, shares: Float[Array, "n classes"]) -> float:
        """The expected calibration error, see `calibration_error`."""
        return calibration_error(*self.top(shares))

    def top(self, shares: Float[Array, "n classes"]) -> tuple[Array, Array]:
        """For each example the largest probability, and whether it is the truth's."""
        return shares.max(axis=1), shares.argmax(axis=1) == self.truth


@dataclass(frozen=True)
class Fit:
    """Classifiers, one for each model, and what is known of them."""

    classifiers: list[Classifier]
    method: str
    chosen: list[dict[str, float]]
    """By each model's examples, see `clipkit.classification.few_shot`."""
    temperatures: list[float]
    """Of each model; 1 is the model's own."""
    calibrated: bool
    """Whether the temperatures were fitted, now or before."""
    examples: Examples | None = None
    judged: Judged | None = None
    """None where there are no examples, or none has another of its class."""

    def notes(self) -> Iterator[str]:
        """What there is to say, a line each."""
        if self.examples is not None:
            count, classes = len(self.examples), len(set(self.examples.truth.tolist()))
            how = "; ".join(", ".join(f"{name} {value:g}" for name, value in each.items()) for each in self.chosen)
            said = f"{self.method}: {count:,} examples of {classes} classes{f' ({how})' if how else ''}"
            if self.judged is None:
                yield f"{said}; no class has two of them, so nothing is known of how well it does"
            else:
                by_names = (
                    "" if self.method == "zero-shot" else f" held out, {self.judged.accuracy(self.judged.names):.1%}"
                )
                right = f"{self.judged.accuracy(self.judged.shares):.1%} of {len(self.judged.truth):,} are right"
                yield f"{said}; {right}{by_names and by_names + ' by the names alone'}"
        if any(temperature != 1 for temperature in self.temperatures) or self.calibrated:
            each_model = ", ".join(f"{temperature:.4g}" for temperature in self.temperatures)
            errors = ""
            if self.calibrated and self.judged is not None:
                before, after = self.judged.error(self.judged.before), self.judged.error(self.judged.after)
                errors = f"; expected calibration error {before:.3f} before, {after:.3f} after, held out"
            yield f"temperature {each_model} (1: the model's own){errors}"


def fit_classifiers(
    labels: LabelSet,
    prompts: Sequence[str],
    models: Sequence[LazyModel],
    cache: Cache,
    learning: Learning | None = None,
    examples: Examples | None = None,
) -> Fit:
    """A classifier for each model.

    Calibration divides a model's logits by a temperature (Guo et al. 2017), which changes no model's order of classes;
    of several models joined it can, as it changes how much each has to say. It is fitted to the examples, each as it is
    classified by the others where they train the classifier. The one of the names alone is kept with the model, the
    labels and the prompts, for runs without examples.

    Args:
        labels, prompts: what the classes are called.
        models: one or several.
        cache: of texts and temperatures.
        learning: how; by the names alone where neither it nor examples are given.
        examples: embedded by the same models.

    Raises:
        ClipkitError: where options do not go together, or there is no temperature to take.
    """
    learning = learning or Learning()
    method = learning.method or ("zero-shot" if examples is None else "linear")
    _refuse_contradictions(learning, method, examples)
    learned = []
    for number, model in enumerate(models):
        names = zero_shot(labels, prompts, model, cache, several=learning.several)
        learned.append(_learned(names, model, number, examples, LEARNERS[method]))
    temperatures = [1.0 if learning.temperature is None else learning.temperature] * len(models)
    if learning.calibrate:
        temperatures = [_fitted_temperature(each, examples, labels, prompts, cache) for each in learned]
    classifiers = []
    for each, temperature in zip(learned, temperatures, strict=True):
        if each.few is not None:
            classifiers.append(Classifier(each.names.vectors, _shares_of(each.few, temperature)))
        elif temperature == 1:
            classifiers.append(each.names)
        else:
            scale = each.model.facts.scale / temperature
            classifiers.append(zero_shot(labels, prompts, each.model, cache, scale=scale, several=learning.several))
    judged = None if examples is None else _judged(examples, learned, temperatures, learning.calibrate)
    chosen = [{} if each.few is None else each.few.chosen for each in learned]
    return Fit(classifiers, method, chosen, temperatures, learning.calibrate, examples, judged)


def _refuse_contradictions(learning: Learning, method: str, examples: Examples | None) -> None:
    calibrate, temperature = learning.calibrate, learning.temperature
    if learning.several and (examples is not None or calibrate or temperature is not None):
        raise ClipkitError("examples and temperatures are for images of one label each, not for --multi-label")
    if temperature is not None and (calibrate or not (temperature > 0 and np.isfinite(temperature))):
        wrong = "is not fitted too" if calibrate else "is above 0"
        raise ClipkitError(f"a temperature of one's own, {temperature:g}, {wrong}; 1 is the model's own")
    if LEARNERS[method] is not None and examples is None:
        raise ClipkitError(f"{method} learns from labelled examples; name them: --examples FOLDER")


class _Learned(NamedTuple):
    """What one model makes of the names and of the examples."""

    model: LazyModel
    names: Classifier
    by_name: Float[Array, "n classes"] | None
    """Logits of the examples by the names; None where there are no examples."""
    few: FewShot | None
    """None where nothing is learned from them."""

    def held_out(self) -> Float[Array, "n classes"]:
        """Logits of the examples, each without its own part in them."""
        logits = self.by_name if self.few is None else self.few.held_out
        if logits is None:
            raise ValueError("there are no examples")
        return logits


def _learned(
    names: Classifier, model: LazyModel, number: int, examples: Examples | None, learn: Learn | None
) -> _Learned:
    if examples is None:
        return _Learned(model, names, None, None)
    scale, features = model.facts.scale, examples.vectors(number)
    by_name = scale * inner_products(features, names.vectors)
    few = None
    if learn is not None:
        few = learn(Shots(features, examples.truth, names.vectors, scale, examples.groups))
    return _Learned(model, names, by_name, few)


def _shares_of(few: FewShot, temperature: float) -> Callable[[Array, Array], Array]:
    return lambda block, _: probabilities(few.logits(block), 1 / temperature)


def _fitted_temperature(
    learned: _Learned, examples: Examples | None, labels: LabelSet, prompts: Sequence[str], cache: Cache
) -> float:
    """That the examples tell, or, without any, that examples once told of the names."""
    model, few = learned.model, learned.few
    texts = [label.texts(prompts) for label in labels.labels]
    key = hash_of("temperature", model.facts.fingerprint, model.facts.precision, texts)
    if examples is None or learned.by_name is None:
        kept = cache.fact(key)
        if kept is None:
            raise ClipkitError(
                f"no temperature is kept for {model.spec} with these labels and prompts; fit one to labelled images: "
                "--examples FOLDER --calibrate"
            )
        return float(kept)
    of_names = held_out_temperature(learned.by_name, examples.truth)
    cache.keep_fact(key, of_names)
    if few is None:
        return of_names
    return held_out_temperature(few.held_out[few.judged], examples.truth[few.judged])


def held_out_temperature(logits: Float[Array, "n classes"], labels: Int[Array, " n"]) -> float:
    """As `fit_temperature`; 1 where samples do not tell: there is none, all are right, or they tell nothing of classes.

    Raises:
        ClipkitError: where a logit is not finite.
    """
    temperature = fit_temperature(logits, labels) if len(labels) else 1.0
    return temperature if 1.01 * COLDEST < temperature < 0.99 * HOTTEST else 1.0


def _judged(
    examples: Examples, learned: Sequence[_Learned], temperatures: Sequence[float], calibrated: bool
) -> Judged | None:
    counted = _counted(examples, alone=all(each.few is None for each in learned))
    if not counted.any():
        return None
    truth = examples.truth[counted]
    fold = folds_of(truth, FOLDS, groups=examples.groups[counted])

    def together(shares: Sequence[Array]) -> Array:
        return shares[0] if len(shares) == 1 else fused(shares)

    def crossed(logits: Array) -> Array:
        """By a temperature for each fold, fitted to the others."""
        shares = np.empty(logits.shape)
        for number in np.unique(fold):
            out = fold == number
            shares[out] = probabilities(logits[out], 1 / held_out_temperature(logits[~out], truth[~out]))
        return shares

    by_name = [each.by_name[counted] for each in learned if each.by_name is not None]
    logits = [each.held_out()[counted] for each in learned]
    names = together([probabilities(each, 1.0) for each in by_name])
    shares = together([probabilities(each, 1 / heat) for each, heat in zip(logits, temperatures, strict=True)])
    before = together([probabilities(each, 1.0) for each in logits]) if calibrated else shares
    after = together([crossed(each) for each in logits]) if calibrated else shares
    return Judged(truth, names, before, after, shares)


def _counted(examples: Examples, alone: bool) -> Array:
    """Which examples say how well it does: one of several copies, with another of its class if not judged `alone`."""
    first = np.unique(examples.groups, return_index=True)[1]
    counted = np.zeros(len(examples), bool)
    counted[first] = True
    return counted & (alone | (np.bincount(examples.truth[first])[examples.truth] > 1))


class Threshold(NamedTuple):
    """From which probability on an answer is accepted, and what that gave on the examples."""

    probability: float
    wanted: float
    """Precision that others are to have."""
    precision: float
    """Of the accepted examples."""
    coverage: float
    """Share of the examples that is accepted."""
    level: float
    """Of sets of examples drawn alike, in at least this share the wanted precision holds for others."""

    def note(self) -> str:
        """In a line."""
        return (
            f"threshold {self.probability:.4g}: {self.precision:.1%} of the accepted examples are right, "
            f"{self.coverage:.1%} are accepted; of images drawn like the examples at least {self.wanted:.1%} of the "
            f"accepted are to be right ({100 * self.level:g} % level)"
        )


def wanted_threshold(fit: Fit, background: Sequence[int], wanted: float, level: float = LEVEL) -> Threshold:
    """The least probability that is sure, so that of what is sure a wanted share is right.

    See `precision_threshold` for what the level says. It is exact where the examples do not train the classifier
    (``zero-shot``, no calibration); where they do, their held-out probabilities stand for those of other images, which
    are a little better, as all examples train for them.

    Args:
        fit: with examples.
        background: places of the classes that stand for none of the others, which are never accepted.
        wanted: precision, a fraction.
        level: how sure it is to be reached on others.

    Raises:
        ClipkitError: where the examples are too few to show it, or it is not reached.
    """
    if fit.judged is None:
        raise ClipkitError("a precision is shown by labelled examples, two of a class at least; --examples FOLDER")
    first = fit.judged.shares.argmax(axis=1)
    named = ~np.isin(first, list(background))
    scores, right = fit.judged.top(fit.judged.shares)
    scores, right = scores[named].astype(np.float32), right[named]  # what rows tell is what is compared
    chosen = precision_threshold(scores, right, wanted, level)
    if not chosen.threshold <= 1:
        counts = f"{int(right.sum()):,} of {len(right):,} examples are right"
        if wanted == 1:
            raise ClipkitError(f"{counts}, and no number of them shows that all others are; want less than 1")
        least = int(np.ceil(np.log(1 - level) / np.log(wanted)))
        raise ClipkitError(
            f"{counts}, which shows a precision of {wanted:g} from no threshold on, at the {100 * level:g} % level: of "
            f"the surest at least {least} must be right, and more where any is wrong; give more examples, or want less"
        )
    accepted = chosen.accepted * len(scores) / len(first)
    return Threshold(max(0.0, chosen.threshold), wanted, chosen.precision, accepted, level)


def ranked(judged: Judged) -> float:
    """How well the probability tells right answers from wrong ones: the area under the ROC curve, see `auroc`."""
    scores, right = judged.top(judged.shares)
    return auroc(scores[right], scores[~right])
