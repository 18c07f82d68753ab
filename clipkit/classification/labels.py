"""Class names and the words for each: from the command line, from a text file, or from YAML with all that is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError, did_you_mean

__all__ = ["Label", "LabelSet", "as_label_set", "parse_labels"]

OF_FILE = ("labels", "prompts", "background", "hierarchy")
OF_LABEL = ("aliases", "prompts", "descriptions", "group")
FILES = (".txt", ".csv", ".yaml", ".yml")


@dataclass(frozen=True)
class Label:
    """A class: its name, and what it is called and described as."""

    name: str
    aliases: tuple[str, ...] = ()
    """Other names, which take the prompts too."""
    prompts: tuple[str, ...] | None = None
    """Templates with ``{}`` of its own, in place of the common ones."""
    descriptions: tuple[str, ...] = ()
    """Sentences that are taken as they are, such as those that a language model writes (Pratt et al. 2023, "CuPL")."""
    groups: tuple[str, ...] = ()
    """That it belongs to, the widest first."""
    background: bool = False
    """Whether it stands for "none of these"."""

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """All that is said of it: every name in every prompt, then the descriptions."""
        own = prompts if self.prompts is None else self.prompts
        names = (self.name, *self.aliases)
        return [prompt.replace("{}", name) for name in names for prompt in own] + list(self.descriptions)


@dataclass(frozen=True)
class LabelSet:
    """Classes in order, those of the background last.

    Raises:
        ClipkitError: where there is none, or a name is empty or stands twice.
    """

    labels: tuple[Label, ...]
    prompts: tuple[str, ...] | str | None = None
    """Templates for all of them, or the name of a set; None where the file says nothing of it."""

    def __post_init__(self) -> None:
        if all(label.background for label in self.labels):
            raise ClipkitError("no labels are given")
        seen = set()
        for name in self.names:
            if not name.strip():
                raise ClipkitError("a label is empty")
            if name in seen:
                raise ClipkitError(f"the label {name!r} is given twice")
            seen.add(name)

    @property
    def names(self) -> list[str]:
        """Of all classes."""
        return [label.name for label in self.labels]

    @property
    def background(self) -> list[int]:
        """Places of the classes that stand for none of the others."""
        return [at for at, label in enumerate(self.labels) if label.background]

    @property
    def groups(self) -> dict[str, list[int]]:
        """For each group the places of its classes, wide groups before the narrow ones in them."""
        places_of: dict[str, list[int]] = {}
        deep = max(len(label.groups) for label in self.labels)
        for level in range(deep):
            for at, label in enumerate(self.labels):
                if level < len(label.groups):
                    places_of.setdefault(label.groups[level], []).append(at)
        return places_of

    def with_background(self, given: str | None) -> "LabelSet":
        """The same and further names for "none of these", with commas between them; None for no more."""
        names = [name.strip() for name in (given or "").split(",") if name.strip()]
        return replace(self, labels=(*self.labels, *(Label(name, background=True) for name in names)))


def as_label_set(labels: LabelSet | Sequence[str]) -> LabelSet:
    """The same, of bare names too."""
    return labels if isinstance(labels, LabelSet) else LabelSet(tuple(Label(name) for name in labels))


def parse_labels(given: str) -> LabelSet:
    """Labels as the command takes them.

    Args:
        given: names with commas between them; or a text file with one a line; or a YAML file, which is a list of names
            or a mapping with ``labels`` (a list, or a mapping from each name to its ``aliases``, ``prompts``,
            ``descriptions`` and ``group``), ``prompts`` (the name of a set, or templates), ``background`` (names for
            "none of these") and ``hierarchy`` (groups within groups, down to lists of names).

    Raises:
        ClipkitError: where there is no such file, or something in it is not as it should be.
    """
    path = Path(given)
    try:
        is_file = path.is_file()
    except OSError:  # a long list of names is no file name
        is_file = False
    if not is_file:
        if "," not in given and (path.suffix in FILES or "/" in given):
            raise ClipkitError(f"no such file of labels: {given}")
        return LabelSet(tuple(Label(name.strip()) for name in given.split(",") if name.strip()))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClipkitError(f"{given} is not UTF-8 text: {error}") from error
    if path.suffix not in (".yaml", ".yml"):
        return LabelSet(tuple(Label(line.strip()) for line in text.splitlines() if line.strip()))
    from clipkit.core import load_yaml

    return _Reader(given).label_set(load_yaml(text, given))


@dataclass
class _Reader:
    """Reads what YAML held, and says where it is wrong."""

    where: str
    groups_of: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def label_set(self, content: Any) -> LabelSet:
        if isinstance(content, list):
            content = {"labels": content}
        fields = self._mapping(content, "", OF_FILE)
        entries = fields.get("labels")
        if isinstance(entries, Mapping):
            labels = [self._label(str(name), of_label) for name, of_label in entries.items()]
        else:
            labels = [Label(name) for name in self._names(entries, "labels")]
        self._hierarchy(fields.get("hierarchy") or {}, ())
        known = {label.name for label in labels}
        for name in self.groups_of:
            if name not in known:
                raise ClipkitError(
                    f"{self.where}: hierarchy names {name!r}, which is no label{did_you_mean(name, known)}"
                )
        labels = [replace(label, groups=self.groups_of.get(label.name, label.groups)) for label in labels]
        taken = known & {group for label in labels for group in label.groups}
        if taken:
            raise ClipkitError(f"{self.where}: {min(taken)!r} is both a label and a group; call one of them otherwise")
        names = self._names(fields.get("background", []), "background")
        background = [Label(name, background=True) for name in names]
        prompts = fields.get("prompts")
        if prompts is not None and not isinstance(prompts, str):
            prompts = tuple(self._templates(prompts, "prompts"))
        return LabelSet((*labels, *background), prompts)

    def _label(self, name: str, entry: Any) -> Label:
        if entry is None or isinstance(entry, list):
            return Label(name, descriptions=tuple(self._names(entry or [], name)))
        of_label = self._mapping(entry, name, OF_LABEL)
        prompts = of_label.get("prompts")
        group = of_label.get("group")
        return Label(
            name,
            tuple(self._names(of_label.get("aliases", []), f"{name}.aliases")),
            None if prompts is None else tuple(self._templates(prompts, f"{name}.prompts")),
            tuple(self._names(of_label.get("descriptions", []), f"{name}.descriptions")),
            () if group is None else tuple(self._names(group, f"{name}.group")),
        )

    def _hierarchy(self, node: Any, above: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for group, below in node.items():
                self._hierarchy(below, (*above, str(group)))
            return
        for name in self._names(node, f"hierarchy.{'.'.join(above)}"):
            if name in self.groups_of:
                raise ClipkitError(f"{self.where}: hierarchy names {name!r} twice")
            self.groups_of[name] = above

    def _mapping(self, value: Any, at: str, known: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ClipkitError(f"{self.where}{at and ': '}{at}: a mapping is wanted, got {_told(value)}")
        for key in value:
            if key not in known:
                inside = f" in {at}" if at else ""
                hint = did_you_mean(str(key), known)
                raise ClipkitError(f"{self.where}: unknown key {key!r}{inside}{hint}; there are {', '.join(known)}")
        return value

    def _names(self, value: Any, at: str) -> list[str]:
        items = value if isinstance(value, list) else [value]
        for item in items:
            # YAML reads `no` and `1.5` as other things than names; a whole number can only be meant as one.
            if isinstance(item, bool) or not isinstance(item, str | int):
                raise ClipkitError(f"{self.where}: {at}: a name or a list of names is wanted, got {_told(item)}")
        return [str(item) for item in items]

    def _templates(self, value: Any, at: str) -> list[str]:
        templates = self._names(value, at)
        for template in templates:
            if "{}" not in template:
                raise ClipkitError(f"{self.where}: {at}: the prompt {template!r} has no {{}} for the class name")
        return templates


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return f"{'yes' if value else 'no'} (put it in quotes if it is a name)"
    return "nothing" if value is None else f"{value!r}"[:60]
