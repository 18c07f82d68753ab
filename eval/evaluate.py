"""Evaluate a model on captioned images, or on images in a folder per class.

`retrieval` measures recall at k in both directions, `zeroshot` accuracy, both as CLIP_benchmark defines them.
"""

import click

from clipkit.cli import Job, format_option, list_options, model_option


@click.command(cls=Job)
@click.argument("task", type=click.Choice(["retrieval", "zeroshot"]))
@click.argument("source")
@model_option
@list_options
@click.option(
    "-k",
    "ks",
    multiple=True,
    type=click.IntRange(1),
    help="List length; may be given several times [default: 1 5 10 for retrieval, 1 5 for zeroshot].",
)
@click.option(
    "--templates",
    help="Of zeroshot: plain, photo, openai80, or your own: 'a drawing of a {}.|a {}.' [default: plain, a bare name].",
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
    templates: str | None,
    precision: str,
    batch_size: int,
    device: str | None,
    fmt: str,
) -> int:
    """Run TASK on SOURCE and print the figures: fractions, not per cent.

    retrieval, on a list, shards, or a folder with captions: image_retrieval_recall@k is the share of captions whose
    image is among the k nearest to the caption, text_retrieval_recall@k the share of images with any of their captions
    among the k nearest.

    zeroshot, on a folder with a sub-folder of images per class, which is called as its class: zeroshot_acc@k is the
    share of images with their class among the k nearest, zeroshot_mean_per_class_recall the mean over the classes of
    the share with it nearest.

    Under torchrun the processes divide the work; the figures are the same.
    """
    from clipkit.errors import ClipkitError
    from clipkit.evaluation import evaluate_retrieval, evaluate_zeroshot, open_classes, process_group
    from clipkit.inference import cast_for_inference
    from clipkit.log import emit, warn
    from clipkit.sources import open_source
    from clipkit.towers import load_model, pick_device
    from clipkit.zeroshot import prompt_set

    if model is None:
        raise ClipkitError("name the model to evaluate: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    lengths = tuple(sorted(set(ks))) or ((1, 5, 10) if task == "retrieval" else (1, 5))
    if task == "retrieval":
        if templates is not None:
            raise ClipkitError("--templates is of zeroshot; retrieval takes the captions as they are")
        columns = {"image_column": image_column, "caption_column": caption_column, "image_root": image_root}
        opened = open_source(source, **columns, captions_required=True)
    else:
        if image_column or caption_column or image_root:
            raise ClipkitError(
                "--image-column, --caption-column and --image-root are of lists; zeroshot takes a folder"
            )
        prompt_set(templates or "plain")
        opened = open_classes(source, lengths)
    with process_group() as (rank, world_size):
        towers = load_model(model, pick_device(device))
        fingerprint = towers.fingerprint()  # before the cast, which changes the values that it is made of
        cast_for_inference(towers, precision)
        how = {"batch_size": batch_size, "show": f"evaluate {task}", "rank": rank, "world_size": world_size}
        if task == "retrieval":
            found = evaluate_retrieval(towers, opened, lengths, **how)
        else:
            found = evaluate_zeroshot(towers, opened, None, templates or "plain", lengths, **how)
    if rank == 0 and fmt == "human":
        rows = [{"figure": name, "value": value, "chance": found.chance[name]} for name, value in found.figures.items()]
        emit(rows, fmt, ", ".join(f"{count:,} {what}" for what, count in found.counts.items()))
    elif rank == 0:
        guesses = {f"chance_{name}": value for name, value in found.chance.items()}
        emit({**found.figures, **guesses, **found.counts, "left_out": len(found.left_out), "model": fingerprint}, fmt)
    if found.left_out:
        first = found.left_out[0]
        warn(f"{len(found.left_out)} could not be used; the first: {first['key']}: {first['reason']}")
        return 1
    return 0


if __name__ == "__main__":
    main()
