"""Evaluate a model on captioned images.

`retrieval` measures recall at k in both directions, as CLIP_benchmark defines it.
"""

import click

from clipkit.cli import Job, format_option, list_options, model_option


@click.command(cls=Job)
@click.argument("task", type=click.Choice(["retrieval"]))
@click.argument("source")
@model_option
@list_options
@click.option(
    "-k",
    "ks",
    multiple=True,
    type=click.IntRange(1),
    help="List length; may be given several times [default: 1 5 10].",
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
@format_option
def main(
    task: str,
    source: str,
    model: str | None,
    image_column: str | None,
    caption_column: str | None,
    image_root: str | None,
    ks: tuple[int, ...],
    precision: str,
    batch_size: int,
    device: str | None,
    fmt: str,
) -> int:
    """Run TASK on SOURCE (a list, shards, or a folder with captions) and print the figures.

    retrieval: image_retrieval_recall@k is the share of captions whose image is among the k nearest to the caption,
    text_retrieval_recall@k the share of images with any of their captions among the k nearest. Fractions, not per cent.
    """
    from clipkit.embed import cast_for_inference
    from clipkit.errors import ClipkitError
    from clipkit.evaluation import evaluate_retrieval
    from clipkit.log import emit, warn
    from clipkit.sources import open_source
    from clipkit.towers import load_model, pick_device

    if model is None:
        raise ClipkitError("name the model to evaluate: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    opened = open_source(
        source,
        image_column=image_column,
        caption_column=caption_column,
        image_root=image_root,
        captions_required=True,
    )
    towers = load_model(model, pick_device(device))
    fingerprint = towers.fingerprint()  # before the cast, which changes the values that it is made of
    cast_for_inference(towers, precision)
    lengths = tuple(sorted(set(ks))) or (1, 5, 10)
    found = evaluate_retrieval(towers, opened, lengths, batch_size=batch_size, show=f"evaluate {task}")
    if fmt == "human":
        rows = [{"figure": name, "value": value, "chance": found.chance[name]} for name, value in found.figures.items()]
        emit(rows, fmt, f"{found.images:,} images, {found.captions:,} captions")
    else:
        counts = {"images": found.images, "captions": found.captions, "left_out": len(found.left_out)}
        guesses = {f"chance_{name}": value for name, value in found.chance.items()}
        emit({**found.figures, **guesses, **counts, "model": fingerprint}, fmt)
    if found.left_out:
        first = found.left_out[0]
        warn(f"{len(found.left_out)} could not be used; the first: {first['key']}: {first['reason']}")
        return 1
    return 0


if __name__ == "__main__":
    main()
