"""Recipes: YAML files and ``--set`` overrides become the settings of a training run (`clipkit.training.settings`).

Precedence: defaults < recipe YAML < ``--set a.b=c``, each later one over the earlier. Unknown keys are errors that
name the nearest key. What a run resolved to stands in its folder as ``config.yaml`` and can be trained from again.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from clipkit.core import ClipkitError, explain_validation, load_yaml
from clipkit.training.settings import CHANGEABLE, LENGTHS, TrainConfig

__all__ = ["changed_keys", "dump_yaml", "flat", "load_config"]


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
