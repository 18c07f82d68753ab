"""Evaluate models on captioned images, images of known classes, or choices between captions.

`retrieval`, `zeroshot`, `choice` and `probe` measure one kind of thing each; a `suite` many models on many data.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job
from clipkit.options import cache_options, format_option, list_options, probe_options


@click.command(cls=Job)
@click.argument("task", type=click.Choice(["retrieval", "zeroshot", "choice", "probe", "suite"]))
@click.argument("source")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A run or model folder, RUN@step-N, open_clip:NAME/TAG, or hf:ORG/NAME; several are put side by side, with "
    "the difference of each from the first [default of embeddings and an index: the one that made them].",
)
@list_options
@click.option("--split", help="Of a dataset in CLIP_benchmark's layout [default: test].")
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
@click.option("--through-index", is_flag=True, help="Of retrieval on an index: also what its own answers find.")
@click.option(
    "--compat",
    type=click.Choice(["clip_benchmark"]),
    help="Also give the figures of CLIP_benchmark's definitions, in which ties come in the order of the items, and put "
    "those into --out's metrics.",
)
@click.option(
    "--baseline",
    metavar="FILE|MODEL",
    help="An earlier --out .json, or a model: the exit status is 1 where a figure is worse than there.",
)
@click.option(
    "--tolerance",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="How much worse than the baseline is no matter: a fraction; of a median rank a share of the baseline's.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["auto", "bf16", "fp32"]),
    help="Of the towers; scores are always float32.",
)
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option(
    "--threads", type=click.IntRange(0), help="That decode images; 0: none beside the towers' [default: one per core]."
)
@click.option("--device", help="For the model [default: the GPU where there is one].")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the results: .json (in CLIP_benchmark's form), .md, or .html (a page that refers to nothing else).",
)
@probe_options
@cache_options
@format_option
def main(task: str, source: str, models: tuple[str, ...], fmt: str, **asked: Any) -> int:
    """Run TASK on SOURCE and print the figures: fractions, not per cent, with 95 % intervals (…_low, …_high).

    retrieval, on a list, shards, a folder with captions, a dataset in CLIP_benchmark's layout, embeddings with both
    sides, or an index: image_retrieval_recall@k is the share of captions whose image is among the k nearest,
    text_retrieval_recall@k the share of images with any of their captions among the k nearest; …_mrr the mean of 1 over
    the rank of the first right one (Voorhees 1999), …_median_rank the median of that rank, from 1.

    zeroshot, on a folder with a sub-folder of images per class, embeddings or an index of such, or a dataset in that
    layout: zeroshot_acc@k is the share of images with their class among the k nearest, zeroshot_mean_per_class_recall
    the mean over the classes of the share with it nearest. Where an image has several labels,
    zeroshot_mean_average_precision is the mean over classes of the average precision of the images sorted by score.

    choice, on a list or JSON with image, caption and negative (as SugarCrepe has it), or image_0, caption_0, image_1,
    caption_1 (Winoground), or shards in that layout with the right caption in the first line: choice_acc is the share
    of images closer to the right caption; winoground_text, _image and _group as Winoground's paper defines them.

    probe, on a folder with a sub-folder of images per class, a list or shards with --label-column, or a dataset in that
    layout: multinomial logistic regression on the embeddings of images, its strength by cross-validation
    (linear_probe_acc@k); with --text-column also early fusion (one on both embeddings), late fusion (one on each, the
    mean of their log probabilities, plain or weighted) and attention fusion (learned, per sample), each with both sides
    and with one withheld; …_gain is how far it lies above the better side alone. A training sample whose image is in
    the test too, byte by byte, or whose group is, is left out. Chance is the most frequent class.

    suite, on a YAML file with models and datasets (task, source, and the options of these tasks by name).

    Equal scores count with the expected value over random orders, so a model that tells nothing apart scores exactly
    chance_…, what guessing would: of n images the recall k / n, the mean reciprocal rank H(n) / n, the median rank
    (n + 1) / 2. Intervals are Wilson's for shares of independent images, else by a bootstrap over images with their
    captions; models are compared on the same draws.

    With --baseline a figure is worse where the interval of the difference lies wholly beyond 0 and the tolerance; where
    the file does not hold what pairs the two, where this result's own interval lies wholly beyond the file's figure.

    Embeddings are kept, so that it goes on where it was interrupted; a result is taken from the last time where
    model, data, prompts and code are the same. Under torchrun the processes divide the work; the figures are the same.
    """
    from clipkit.core import ClipkitError, cache_folder, emit, note, process_group, warn
    from clipkit.embedding import stored_kind
    from clipkit.evaluation import (
        PROBE,
        Result,
        beside,
        changes_of_all,
        check_name,
        differences_from_first,
        from_clip_benchmark,
        matches,
        measure,
        open_task,
        readable,
        side_by_side,
        write_results,
    )
    from clipkit.evaluation.probe import probe_rows, readable_rows
    from clipkit.storage import Cache

    out, baseline = asked["out"], asked["baseline"]
    if out is not None:
        check_name(out)
    if asked["tolerance"] and baseline is None:
        raise ClipkitError("--tolerance says how much worse than a baseline is no matter; name one with --baseline")
    given = ("split", "templates", "image_column", "caption_column", "image_root", *PROBE)
    told = {name: asked[name] for name in given if asked[name] is not None}
    if asked["through_index"]:
        told["through_index"] = True
    cache = Cache(None if asked["no_cache"] else asked["cache"] or cache_folder(), asked["cache_size"])
    earlier = from_clip_benchmark(Path(baseline)) if baseline is not None and Path(baseline).is_file() else None
    how = {name: asked[name] for name in ("device", "precision", "batch_size", "threads")}
    compat = asked["compat"] is not None
    suite = opened = run_suite = None
    if task == "suite":
        from clipkit.evaluation import load_suite, run_suite

        if told or asked["ks"]:
            flags = [*(f"--{name.replace('_', '-')}" for name in told), *(["-k"] if asked["ks"] else [])]
            raise ClipkitError(f"{', '.join(flags)}: a suite says so for each of its datasets; write it into {source}")
        suite = load_suite(Path(source), models)
    else:
        if not models and stored_kind(source) is None:
            raise ClipkitError("name the model to evaluate: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
        if task == "probe" and compat:
            raise ClipkitError("--compat: a linear probe is the same in CLIP_benchmark; leave it out")
        opened = open_task(task, source, asked["ks"], compat=compat, **told)
    sets = [(task, source)] if suite is None else [(each.task, each.name or each.source) for each in suite.datasets]
    held = matches(sets, earlier) if earlier is not None else {}  # what is wrong there is said before measuring
    with process_group() as (rank, world_size):
        among = {"rank": rank, "world_size": world_size, "show": f"evaluate {task}"}

        def results_of(specs: Any) -> tuple[list[Result], list[str]]:
            if suite is not None and run_suite is not None:
                chosen = suite.model_copy(update={"models": list(specs)})
                return run_suite(chosen, lambda each, spec: measure(each, spec, cache, **how, **among), compat=compat)
            found = []
            for number, spec in enumerate(specs or [None]):
                called, fingerprint, result = measure(opened, spec, cache, **how, **among)  # type: ignore[arg-type]
                # The same model twice is a comparison too, if an odd one.
                twice = list(specs[:number]).count(spec) if spec is not None else 0
                name = f"{called} ({twice + 1})" if twice else called
                found.append(Result(source, task, name, fingerprint, result))
            return found, []

        results, failures = results_of(suite.models if suite is not None else models)
        if baseline is not None and earlier is None:
            earlier, missed = results_of([baseline])
            held = matches(sets, earlier)
            failures += [line for line in missed if line not in failures]
    apart = differences_from_first(results) if rank == 0 else {}
    changed = changes_of_all(results, held, asked["tolerance"]) if rank == 0 else []
    worse = [change for change in changed if change.worse]
    if rank == 0:
        several = suite is not None or len(results) > 1
        first = results[0].found
        if fmt == "human":
            title = ", ".join(f"{count:,} {what}" for what, count in first.counts.items()) if not several else ""
            emit(readable_rows(first) if task == "probe" and not several else readable(results, apart), fmt, title)
            if changed:
                emit([change.row() for change in changed], fmt, f"beside {baseline}")
        elif task == "probe" and not several and fmt != "json":
            emit(probe_rows(first), fmt)
        elif several:
            emit(beside(side_by_side(results, apart), changed), fmt)
        else:
            more = {name: value for change in changed for name, value in change.flat().items()}
            about = {"model": results[0].fingerprint} | ({"regressions": [c.figure for c in worse]} if changed else {})
            emit({**first.flat(), **more, **about}, fmt)
        if out is not None:
            write_results(out, results, apart, changes=changed, failures=failures)
            note(f"wrote {out}")
    for line in failures:
        warn(f"not measured: {line}")
    for change in worse:
        warn(f"regression: {change.line()}")
    left_out = {result.name: result.found.left_out for result in results if result.found.left_out}
    for name, lines in left_out.items():
        where = f"{name}: " if suite is not None else ""
        warn(f"{where}{len(lines)} could not be used; the first: {lines[0]['key']}: {lines[0]['reason']}")
    return int(bool(failures or left_out or worse))


if __name__ == "__main__":
    main()
