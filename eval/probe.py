"""Probe a model: train small classifiers on its frozen embeddings of images, of texts, and of both.

A linear probe on images; with a column of texts also early, late and attention fusion, and what they do without a side.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job, cache_options, format_option, list_options


@click.command(cls=Job)
@click.argument("source")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A run or model folder, RUN@step-N, open_clip:NAME/TAG, or hf:ORG/NAME; several are put side by side.",
)
@click.option("--train", metavar="SOURCE", help="What to train on [default: a part of the source].")
@click.option(
    "--test-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Of the source, where it is divided: by a hash of each sample's group or key [default: 0.25].",
)
@click.option("--label-column", help="Of a list or shards: the classes' names [default: the sub-folders].")
@click.option("--text-column", help="Texts to fuse with the images, such as caption [default: images alone].")
@click.option("--group-column", help="Samples with the same value go together, into the training or into the test.")
@click.option("--shots", type=click.IntRange(1), help="So many training samples of each class [default: all].")
@click.option("--split", default="test", show_default=True, help="Of a dataset in CLIP_benchmark's layout.")
@click.option("--train-split", default="train", show_default=True, help="Of such a dataset.")
@click.option(
    "-k",
    "ks",
    multiple=True,
    type=click.IntRange(1),
    help="Accuracy at so many answers; may be given several times [default: 1 5].",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of shots, folds and attention.")
@list_options
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["auto", "bf16", "fp32"]),
    help="Of the towers; probes are float64, attention float32.",
)
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--device", help="For the model [default: the GPU where there is one].")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the results: .json (in CLIP_benchmark's form) or .md.",
)
@cache_options
@format_option
def main(source: str, models: tuple[str, ...], ks: tuple[int, ...], fmt: str, **asked: Any) -> int:
    """Train probes on embeddings of SOURCE and print how often they are right on samples that they have not seen.

    SOURCE is the test, with --train for the training: a folder with a sub-folder of images per class, or a list or
    shards with --label-column. A dataset in CLIP_benchmark's layout has a split for each. Any other source is divided.
    A training sample whose image is in the test too, byte by byte, or whose group is, is left out.

    linear: multinomial logistic regression, its strength by cross-validation. With --text-column: early fusion (one on
    both embeddings), late fusion (one on each, the mean of their log probabilities, plain or weighted by
    cross-validation), attention fusion (learned, per sample). Each is judged with both sides, and with the text or the
    image withheld; gain is how far it lies above the better side alone. Intervals are of 95 %; chance is what always
    answering the most frequent class scores.
    """
    from clipkit.artifact import atomic_write, write_json
    from clipkit.cache import Cache, cache_folder
    from clipkit.errors import ClipkitError
    from clipkit.lazy_model import LazyModel
    from clipkit.log import emit, note, warn
    from clipkit.probe_data import open_probe
    from clipkit.probes import PROBE_KS, evaluate_probe, probe_rows
    from clipkit.results import Result, as_clip_benchmark, markdown, side_by_side
    from clipkit.shared_work import process_group

    if not models:
        raise ClipkitError("name the model to probe: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    out = asked["out"]
    if out is not None and out.suffix not in (".json", ".md"):
        raise ClipkitError(f"--out {out}: the name of a result ends in .json or .md")
    about = ("train", "split", "train_split", "test_share", "label_column", "text_column", "group_column")
    about = (*about, "shots", "seed", "image_column", "caption_column", "image_root")
    task = open_probe(source, **{name: asked[name] for name in about})
    for k in sorted({k for k in ks if k > len(task.classes)}):
        note(f"{source} has {len(task.classes)} classes; acc@{k} counts all of them")
    cache = Cache(None if asked["no_cache"] else asked["cache"] or cache_folder(), asked["cache_size"])
    with process_group() as (rank, world_size):
        results = []
        for spec in models:
            lazy = LazyModel(spec, cache, device=asked["device"], precision=asked["precision"])
            how = {"seed": asked["seed"], "batch_size": asked["batch_size"], "show": "probe"}
            found = evaluate_probe(task, lazy, cache, ks or PROBE_KS, rank=rank, world_size=world_size, **how)
            results.append(Result(source, "probe", spec, lazy.facts.fingerprint, found))
    found = results[0].found
    if rank == 0:
        if len(results) > 1:
            emit(side_by_side(results), fmt)
        elif fmt == "human":
            told = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in found.counts.items())
            chance = found.chance["linear_probe_acc@1"]
            emit([_shown(row) for row in probe_rows(found)], fmt, f"{told}; chance {chance:.3f}")
        elif fmt in ("csv", "jsonl"):
            emit(probe_rows(found), fmt)
        else:
            guesses = {f"chance_{name}": value for name, value in found.chance.items()}
            last = {"left_out": len(found.left_out), "model": results[0].fingerprint}
            emit({**found.figures, **guesses, **found.counts, **last}, fmt)
        if out is not None and out.suffix == ".json":
            write_json(out, [as_clip_benchmark(result) for result in results])
        elif out is not None:
            with atomic_write(out, "w") as handle:
                handle.write(markdown(results))
        if out is not None:
            note(f"wrote {out}")
    if found.left_out:
        first = found.left_out[0]
        warn(f"{len(found.left_out)} could not be used; the first: {first['key']}: {first['reason']}")
        return 1
    return 0


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its intervals in the cells of their figures."""

    def within(value: float | None, low: float, high: float, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    cells = {name: value for name, value in row.items() if name.startswith(("probe", "inputs", "acc@"))}
    cells["acc@1"] = within(row["acc@1"], row["low"], row["high"])
    cells["class recall"] = row["mean_per_class_recall"]
    return cells | {"gain": within(row["gain"], row["gain_low"], row["gain_high"], "+")}


if __name__ == "__main__":
    main()
