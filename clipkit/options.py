"""Options that several verbs share, so that they read and mean the same everywhere."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from clipkit.core import FORMATS

__all__ = [
    "Bytes",
    "cache_options",
    "decision_options",
    "format_option",
    "glob_options",
    "list_options",
    "memory_option",
    "model_option",
    "out_options",
    "probe_options",
    "sort_options",
    "task_options",
]


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Bytes(click.ParamType):
    """A number of bytes: ``500MB``, ``2.5GB``, ``2GiB``, or bare."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        found = re.fullmatch(r"([0-9]*\.?[0-9]+) *([kmgt]?)(i?)b?", str(value).strip().lower())
        if not found:
            self.fail(f"{value!r} is no size; write 500MB, 2GB or 2GiB", param, ctx)
        return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


# Options that several verbs share, so that they read and mean the same everywhere.
model_option = click.option(
    "--model", metavar="MODEL", help="A run or model folder, RUN@step-N, open_clip:NAME/TAG, or hf:ORG/NAME."
)
format_option = click.option(
    "--format",
    "fmt",
    default="human",
    show_default=True,
    type=click.Choice(FORMATS),
    help="How results are printed.",
)
list_options = _together(
    click.option("--image-column", help="A list's column of image paths [default: by usual names, such as path]."),
    click.option("--caption-column", help="A list's column of captions [default: by usual names, such as caption]."),
    click.option(
        "--image-root",
        help="Folder or URL where a list's relative paths start [default: its folder].",
    ),
)


glob_options = _together(
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Look at the files whose path in SOURCE fits, whatever they are; of lists, shards and vectors at the "
        "images. *.jpg is a name in any folder, cats/* what is straight in cats, cats/** what is anywhere below, "
        "/*.jpg what is at the top, cats/ all in any folder of that name. The case of an ending does not count; a "
        "hidden file fits a pattern that says the dot. Several may be given [default: of a folder what has the ending "
        "of an image].",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="GLOB",
        help="Pass over what fits; alone: look at every other file, except captions beside images.",
    ),
)
sort_options = _together(
    click.option(
        "--sort-into",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Put each image into DIR/LABEL/, what is unsure into DIR/unsure, what shows none of the labels into "
        "DIR/background; unreadable files stay, and so does what lies beside images. Only says what it would do "
        "without --yes. Nothing is ever overwritten: a second a.jpg becomes a-2.jpg.",
    ),
    click.option(
        "--how",
        type=click.Choice(["copy", "link", "move"]),
        help="Whether files are sorted by copies, by symbolic links to their full paths, or are moved [default: copy].",
    ),
    click.option("--yes", is_flag=True, help="Do sort."),
    click.option(
        "--undo",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Put back all that was sorted into DIR. What was changed since stays, is named, and the status is 1.",
    ),
)
decision_options = _together(
    click.option("--background", help='Names for "none of these", with commas between them.'),
    click.option(
        "--multi-label", is_flag=True, help="An image may be of several labels: all that reach the threshold."
    ),
    click.option(
        "--threshold", type=float, help="The least probability that is sure [default: 0; with --multi-label 0.5]."
    ),
    click.option(
        "--min-margin", default=0.0, show_default=True, help="The least distance to the second's probability."
    ),
    click.option(
        "--examples",
        metavar="SOURCE",
        help="Labelled images to learn from: a folder with a sub-folder for each label, called as it or an alias; or a "
        "list, embeddings or an index of images in such folders.",
    ),
    click.option(
        "--method",
        type=click.Choice(["linear", "tip-adapter", "prototypes", "zero-shot"]),
        help="How to learn from them; zero-shot: not at all, they only serve the options below [default: linear].",
    ),
    click.option(
        "--calibrate",
        is_flag=True,
        help="Make probabilities as right as they are sure, as the examples show; without any, as they last showed of "
        "the names alone.",
    ),
    click.option(
        "--temperature", type=float, help="To divide the logits by, in place of a fitted one; 1: the model's own."
    ),
    click.option(
        "--precision-wanted",
        type=float,
        metavar="SHARE",
        help="Set the threshold so that of the sure so many are right, as the examples show.",
    ),
    click.option(
        "--ablate-prompts",
        is_flag=True,
        help="Classify nothing, but tell of each prompt how well images in folders called as labels are classified by "
        "it alone, and by all others.",
    ),
)
cache_options = _together(
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        help="Where embeddings are kept for the next time [default: $CLIPKIT_CACHE, or ~/.cache/clipkit].",
    ),
    click.option("--no-cache", is_flag=True, help="Keep none, and look for none."),
    click.option("--cache-size", type=Bytes(), default="4GB", show_default=True, help="What that may take."),
)
memory_option = click.option(
    "--memory",
    type=Bytes(),
    help="Memory that may be used beyond what the program takes [default: half of what is free].",
)


task_options = _together(
    click.option("--split", help="Of a dataset in CLIP_benchmark's layout [default: test]."),
    click.option(
        "-k",
        "ks",
        multiple=True,
        type=click.IntRange(1),
        help="List length; may be given several times [default: 1 5 10 for retrieval, 1 5 for zeroshot].",
    ),
    click.option(
        "--templates",
        help="Of zeroshot: plain, photo, openai80, or your own: 'a drawing of a {}.|a {}.' [default: the dataset's, "
        "else plain, a bare name].",
    ),
    click.option(
        "--unknown",
        metavar="SOURCE",
        help="Of zeroshot: images that show none of the classes (a folder, list, shards or embeddings): also how well "
        "the probabilities tell them from those that do.",
    ),
    click.option("--through-index", is_flag=True, help="Of retrieval on an index: also what its own answers find."),
    click.option(
        "--compat",
        type=click.Choice(["clip_benchmark"]),
        help="Also give the figures of CLIP_benchmark's definitions, in which ties come in the order of the items, and "
        "put those into --out's metrics.",
    ),
)
probe_options = _together(
    click.option("--train", metavar="SOURCE", help="Of probe: what to train on [default: a part of the source]."),
    click.option("--train-split", help="Of probe on a dataset in CLIP_benchmark's layout [default: train]."),
    click.option(
        "--test-share",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Of probe: of the source, where it is divided, by a hash of each sample's group or key [default: 0.25].",
    ),
    click.option("--label-column", help="Of probe: the classes' names [default: the sub-folders]."),
    click.option("--text-column", help="Of probe: texts to fuse with the images, such as caption [default: none]."),
    click.option("--group-column", help="Of probe: samples of one value go together, into the training or the test."),
    click.option("--shots", type=click.IntRange(1), help="Of probe: so many training samples a class [default: all]."),
    click.option("--seed", type=click.IntRange(0), help="Of probe: of shots, folds and attention [default: 0]."),
)


def out_options(what: str) -> Callable[[Any], Any]:
    """``--out`` for what a stage makes, and ``--overwrite``."""
    return _together(
        click.option("--out", required=True, type=click.Path(path_type=Path), help=f"Folder for {what}."),
        click.option("--overwrite", is_flag=True, help="Replace another artifact that stands there."),
    )
