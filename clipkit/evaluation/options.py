"""What is asked of an evaluation: the command, a suite and library callers gather it into the same values."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ListColumns", "ProbeOptions", "TaskOptions", "flags"]


@dataclass(frozen=True)
class ListColumns:
    """How a list is read, see `clipkit.data.sources.open_source`."""

    image_column: str | None = None
    caption_column: str | None = None
    image_root: str | None = None


@dataclass(frozen=True)
class ProbeOptions:
    """How labelled samples become the training and the test of a probe."""

    train: str | None = None
    """The training; where it is not given, the `train_split` of a dataset, else a part of the source."""
    train_split: str | None = None
    """Of a dataset in CLIP_benchmark's layout; ``train`` when not given."""
    test_share: float | None = None
    """Of the source, where it is divided (`clipkit.evaluation.probe.data.is_of_test`); 0.25 when not given."""
    label_column: str | None = None
    """Of the classes' names; the sub-folders when not given."""
    text_column: str | None = None
    """Of what is fused with the images; nothing is when not given."""
    group_column: str | None = None
    """Of what goes together: into the training or into the test."""
    shots: int | None = None
    """So many training samples of each class; all of them when not given."""
    seed: int | None = None
    """Of shots, folds and attention; 0 when not given."""


@dataclass(frozen=True)
class TaskOptions:
    """What is asked of a task; None where nothing is said."""

    ks: tuple[int, ...] = ()
    """List lengths; the task's usual ones where there are none."""
    split: str | None = None
    """Of a dataset in CLIP_benchmark's layout; ``test`` when not given."""
    templates: str | None = None
    """See `clipkit.classification.prompt_set`."""
    unknown: str | None = None
    """Of zeroshot: images that show none of the classes."""
    compat: bool = False
    """Also the figures of CLIP_benchmark's definitions."""
    through_index: bool = False
    """Of an index: also what it answers."""
    columns: ListColumns = ListColumns()
    probe: ProbeOptions = ProbeOptions()

    @classmethod
    def of(cls, **values: Any) -> "TaskOptions":
        """From the options of the command or of a suite by their names; None says as little as leaving one out."""
        values = {name: value for name, value in values.items() if value is not None}

        def taken(kind: type) -> Any:
            return kind(**{field.name: values.pop(field.name) for field in fields(kind) if field.name in values})

        return cls(columns=taken(ListColumns), probe=taken(ProbeOptions), **values)

    def lengths(self, usual: Sequence[int]) -> tuple[int, ...]:
        """The list lengths, rising and each once."""
        return tuple(sorted(set(self.ks))) or tuple(usual)

    def given(self) -> list[str]:
        """The flags of what is said about the data and the task, which is all but `compat`."""
        own = [name for name in ("split", "templates", "unknown") if getattr(self, name) is not None]
        own += ["through_index"] if self.through_index else []
        return flags(own) + flags(self.columns) + flags(self.probe) + (["-k"] if self.ks else [])


def flags(options: Sequence[str] | ListColumns | ProbeOptions) -> list[str]:
    """The command's flags of these names, or of what is given of these options."""
    if isinstance(options, ListColumns | ProbeOptions):
        options = [name for name, value in vars(options).items() if value is not None]
    return [f"--{name.replace('_', '-')}" for name in options]
