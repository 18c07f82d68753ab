"""Recipes: YAML files and ``--set`` overrides become the settings of a training run (`clipkit.settings`).

Precedence: defaults < recipe YAML < ``--set a.b=c``, each later one over the earlier. Unknown keys are errors that
name the nearest key. What a run resolved to stands in its folder as ``config.yaml`` and can be trained from again.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from clipkit.errors import ClipkitError, did_you_mean
from clipkit.settings import CHANGEABLE, LENGTHS, TrainConfig

__all__ = [
    "changed_keys",
    "dump_yaml",
    "explain_validation",
    "flat",
    "load_config",
    "load_yaml",
]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; here it is a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Raises:
        ClipkitError: naming `where` and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ClipkitError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(config: BaseModel) -> str:
    """The settings as YAML that `load_config` reads back to the same."""
    values = config.model_dump(mode="json")
    # A length that is not set is left out; any other null is a choice, such as no gradient clipping.
    kept = {key: value for key, value in values.items() if value is not None or key not in LENGTHS}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Resolve a recipe with overrides.

    Args:
        recipe: a YAML file.
        overrides: strings ``a.b=value``; values are YAML, so ``[0.9, 1.0]``, ``1e-3`` and ``null`` mean what they say.

    Raises:
        ClipkitError: for a file that cannot be read, an unknown key (naming the nearest) or a wrong value.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
    except OSError as error:
        raise ClipkitError(f"cannot read the recipe {recipe}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ClipkitError(f"the recipe {recipe} is not UTF-8 text: {error}") from error
    values = load_yaml(text, str(recipe))
    if not isinstance(values, dict):
        raise ClipkitError(f"{recipe} is no recipe: it has no keys")
    for override in overrides:
        _apply(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ClipkitError(explain_validation(error, TrainConfig)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ClipkitError(f"--set takes KEY=VALUE, as in --set optim.lr=1e-3; got {override!r}")
    if path[0] in LENGTHS:
        for name in LENGTHS:
            values.pop(name, None)
    node = values
    for part in path[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):
            child = {}
        node[part] = child
        node = child
    node[path[-1]] = load_yaml(text, f"--set {override}")


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that a settings model has."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def explain_validation(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for the first thing that is wrong, in the user's keys."""
    # Of a union's complaints the deepest one is about the branch that the user meant.
    problem = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    # pydantic puts the union's branch into the location; the user never wrote that.
    parts = [str(p) for p in problem["loc"] if p not in ("str", "ModelConfig", "list[PartConfig]")]
    key = prefix + ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{did_you_mean(key, known_keys(model, prefix))}"
    if problem["type"] == "missing":
        return f"{key} is not set"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, Mapping) else f", got {given!r}"
    return f"{key}: {message}{shown}" if key else message


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, child in value.items() for k, v in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def flat(config: BaseModel) -> dict[str, Any]:
    """Every setting under its dotted key."""
    return _flat(config.model_dump(mode="json"))


def changed_keys(before: TrainConfig, after: TrainConfig, allowed: Iterable[str] = CHANGEABLE) -> list[str]:
    """The keys in which two configurations differ, leaving out those that a resumption may change."""
    old, new = flat(before), flat(after)
    return sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key) and not any(key == a or key.startswith(f"{a}.") for a in allowed)
    )
