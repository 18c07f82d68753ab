"""Evaluate models on captioned images, or on images of known classes.

`retrieval` measures recall at k in both directions, `zeroshot` accuracy, both as CLIP_benchmark defines them.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job, cache_options, format_option, list_options


@click.command(cls=Job)
@click.argument("task", type=click.Choice(["retrieval", "zeroshot"]))
@click.argument("source")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A run or model folder, RUN@step-N, open_clip:NAME/TAG, or hf:ORG/NAME; several are put side by side.",
)
@list_options
@click.option("--split", default="test", show_default=True, help="Of a dataset in CLIP_benchmark's layout.")
@click.option(
    "-k",
    "ks",
    multiple=True,
    type=click.IntRange(1),
    help="List length; may be given several times [default: 1 5 10 for retrieval, 1 5 for zeroshot].",
)
@click.option(
    "--templates",
    help="Of zeroshot: plain, photo, openai80, or your own: 'a drawing of a {}.|a {}.' [default: the dataset's, else "
    "plain, a bare name].",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["auto", "bf16", "fp32"]),
    help="Of the towers; scores are always float32.",
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
def main(task: str, source: str, models: tuple[str, ...], ks: tuple[int, ...], fmt: str, **asked: Any) -> int:
    """Run TASK on SOURCE and print the figures: fractions, not per cent.

    retrieval, on a list, shards, a folder with captions, or a dataset in CLIP_benchmark's layout:
    image_retrieval_recall@k is the share of captions whose image is among the k nearest to the caption,
    text_retrieval_recall@k the share of images with any of their captions among the k nearest.

    zeroshot, on a folder with a sub-folder of images per class, which is called as its class, or on such a dataset:
    zeroshot_acc@k is the share of images with their class among the k nearest, zeroshot_mean_per_class_recall the mean
    over the classes of the share with it nearest.

    Embeddings are kept, so that it goes on where it was interrupted; a result is taken from the last time where model,
    data, prompts and code are the same. Under torchrun the processes divide the work; the figures are the same.
    """
    from clipkit.artifact import atomic_write, write_json
    from clipkit.cache import Cache, cache_folder
    from clipkit.errors import ClipkitError
    from clipkit.lazy_model import LazyModel
    from clipkit.log import emit, note, warn
    from clipkit.results import Result, as_clip_benchmark, markdown, side_by_side
    from clipkit.shared_work import process_group
    from clipkit.tasks import evaluate, open_task

    if not models:
        raise ClipkitError("name the model to evaluate: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    out = asked["out"]
    if out is not None and out.suffix not in (".json", ".md"):
        raise ClipkitError(f"--out {out}: the name of a result ends in .json or .md")
    columns = {name: asked[name] for name in ("image_column", "caption_column", "image_root")}
    opened = open_task(task, source, ks, split=asked["split"], templates=asked["templates"], **columns)
    cache = Cache(None if asked["no_cache"] else asked["cache"] or cache_folder(), asked["cache_size"])
    with process_group() as (rank, world_size):
        results = []
        for spec in models:
            lazy = LazyModel(spec, cache, device=asked["device"], precision=asked["precision"])
            how = {
                "batch_size": asked["batch_size"],
                "rank": rank,
                "world_size": world_size,
                "show": f"evaluate {task}",
            }
            results.append(Result(source, task, spec, lazy.facts.fingerprint, evaluate(opened, lazy, cache, **how)))
    found = results[0].found
    if rank == 0:
        if len(results) > 1:
            emit(side_by_side(results), fmt)
        elif fmt == "human":
            rows = [
                {"figure": name, "value": value, "chance": found.chance[name]} for name, value in found.figures.items()
            ]
            emit(rows, fmt, ", ".join(f"{count:,} {what}" for what, count in found.counts.items()))
        else:
            guesses = {f"chance_{name}": value for name, value in found.chance.items()}
            about = {"left_out": len(found.left_out), "model": results[0].fingerprint}
            emit({**found.figures, **guesses, **found.counts, **about}, fmt)
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


if __name__ == "__main__":
    main()
