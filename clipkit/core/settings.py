"""What settings are made of: typed groups in which unknown keys are errors, and YAML as everybody means it."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipkit.core.errors import ClipkitError, did_you_mean

__all__ = ["explain_validation", "load_yaml"]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of every group of settings: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; here it is a number, as everybody means it."""


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Raises:
        ClipkitError: naming `where` and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ClipkitError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)
