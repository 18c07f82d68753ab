"""Suites: many datasets and models measured in one go, from a YAML file.

    models: [run/, open_clip:ViT-B-32/laion2b_s34b_b79k]
    datasets:
      - {task: retrieval, source: heldout.tsv}
      - {task: zeroshot, source: animals/, templates: photo, name: animals}
      - {task: choice, source: swap_obj.json, image_root: val2017/}
      - {task: probe, source: labelled.tsv, label_column: kind, shots: 16}

Paths start at the folder in which the command runs. What fails is told at the end, and stops nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clipkit.core import (
    ClipkitError,
    Gather,
    did_you_mean,
    explain_validation,
    gather_objects,
    load_yaml,
    note,
    on_each,
)
from clipkit.embedding import stored_kind
from clipkit.evaluation.measuring import Evaluation
from clipkit.evaluation.options import TaskOptions
from clipkit.evaluation.results import Result
from clipkit.evaluation.tasks import OPENERS, Task, open_task

__all__ = ["DatasetConfig", "Measure", "SuiteConfig", "load_suite", "run_suite", "run_task"]

Measure = Callable[[Task, str | None], tuple[str, str, Evaluation]]
"""A model, by name, or the one that embeddings were made with (None), in a task: gives what it is called, its
fingerprint, and the result; of the last time where nothing changed."""


class DatasetConfig(BaseModel):
    """One task on some data."""

    model_config = ConfigDict(extra="forbid")

    task: str
    """``retrieval``, ``zeroshot``, ``choice`` or ``probe``."""
    source: str
    """As the command takes it."""
    name: str | None = None
    """What results call it; the source when not given."""
    ks: list[int] = Field(default_factory=list)
    """List lengths; the task's usual ones where there are none."""
    split: str | None = None
    """Of a dataset in CLIP_benchmark's layout; ``test`` when not given."""
    templates: str | None = None
    unknown: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    image_root: str | None = None
    through_index: bool = False
    train: str | None = None
    train_split: str | None = None
    test_share: float | None = Field(default=None, gt=0, lt=1)
    label_column: str | None = None
    text_column: str | None = None
    group_column: str | None = None
    shots: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)

    @field_validator("task")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in OPENERS:
            raise ValueError(f"no such task{did_you_mean(value, OPENERS)}; there are {', '.join(OPENERS)}")
        return value

    @field_validator("ks")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if any(k < 1 for k in value):
            raise ValueError("a list has a length of at least 1")
        return value


class SuiteConfig(BaseModel):
    """Models and what they are measured on."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] = Field(default_factory=list)
    """As ``--model`` takes them."""
    datasets: list[DatasetConfig] = Field(min_length=1)

    def names(self) -> list[tuple[str, str]]:
        """The task of each dataset, and what results call the dataset."""
        return [(dataset.task, dataset.name or dataset.source) for dataset in self.datasets]


def load_suite(path: Path, models: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite.

    Args:
        path: of the YAML file.
        models: in place of those that it names.

    Raises:
        ClipkitError: for a file that cannot be read, an unknown key (naming the nearest), a wrong value, two datasets
            of one name and task, or no model.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ClipkitError(f"cannot read the suite {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ClipkitError(f"the suite {path} is not UTF-8 text: {error}") from error
    if not isinstance(values, dict):
        raise ClipkitError(f"{path} is no suite: it has no keys; it needs models and datasets")
    try:
        suite = SuiteConfig.model_validate(values)
    except ValidationError as error:
        raise ClipkitError(f"{path}: {explain_validation(error, SuiteConfig)}") from error
    suite.models = list(models) or suite.models
    if not suite.models and not all(stored_kind(each.source) for each in suite.datasets):
        raise ClipkitError(f"{path} names no models; add models: [RUN], or say --model")
    for task, name in (names := suite.names()):
        if names.count((task, name)) > 1:
            raise ClipkitError(f"{path}: two datasets of {task} are called {name!r}; give them a name each")
    return suite


def run_task(task: Task, source: str, models: Sequence[str], measure: Measure) -> list[Result]:
    """Measure all models in one task.

    Args:
        task: opened.
        source: what results call the data.
        models: by name, or none for the one that embeddings were made with; one that stands twice is compared with
            itself.
        measure: a model in the task.
    """
    results = []
    for number, model in enumerate(models or [None]):
        called, fingerprint, evaluation = measure(task, model)
        before = list(models[:number]).count(model) if model is not None else 0
        name = f"{called} ({before + 1})" if before else called
        results.append(Result(source, task.name, name, fingerprint, evaluation))
    return results


def run_suite(
    suite: SuiteConfig,
    measure: Measure,
    models: Sequence[str] = (),
    *,
    compat: bool = False,
    gather: Gather = gather_objects,
) -> tuple[list[Result], list[str]]:
    """Measure all models on all datasets.

    Args:
        suite: what on what.
        measure: a model in a task. Where it fails on one rank, it does on all.
        models: in place of the suite's.
        compat: also the figures of CLIP_benchmark's definitions, where the task has any.
        gather: brings the ranks' parts together: data that one of them cannot open, none of them measures.

    Returns:
        Results in the order of the datasets, and a line for each that failed.

    Raises:
        ClipkitError: where all failed.
    """
    results, failures = [], []
    for number, dataset in enumerate(suite.datasets, 1):
        name = dataset.name or dataset.source
        note(f"{number}/{len(suite.datasets)} {dataset.task}: {name}")
        options = TaskOptions.of(compat=compat, **dataset.model_dump(exclude={"task", "source", "name"}))
        opening = functools.partial(open_task, dataset.task, dataset.source, options)
        try:
            task = on_each(opening, gather)
        except ClipkitError as error:
            failures.append(f"{dataset.task} on {name}: {error}")
            continue
        for model in (models or suite.models) if task.stored is None else [None]:
            try:
                called, fingerprint, evaluation = measure(task, model)
            except ClipkitError as error:
                failures.append(f"{dataset.task} on {name}, {model or 'its own model'}: {error}")
                continue
            results.append(Result(name, dataset.task, called, fingerprint, evaluation))
    if not results:
        raise ClipkitError(f"nothing of the suite could be measured; the first: {failures[0]}")
    return results, failures
