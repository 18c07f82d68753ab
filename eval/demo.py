"""Run the whole way on generated pictures: pack, train, embed, build, search, classify, evaluate, report.

Coloured shapes in scenes, with captions; some pairs of a colour and a shape are held out of training and then named.
"""

import contextlib
import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job, run_job
from clipkit.options import out_options

QUESTIONS = 3  # held-out pairs that are searched for


@click.command(cls=Job)
@click.option("--pictures", default=4000, show_default=True, type=click.IntRange(64), help="To train on.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the pictures and the training.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of the demo recipe.")
@out_options("everything that the demo makes")
def main(pictures: int, seed: int, overrides: tuple[str, ...], out: Path, overwrite: bool) -> None:
    """Draw captioned pictures, train a small model on them from scratch, and write a report of what it can do.

    Takes some minutes on two cores. The report is OUT/report/index.html; every artifact on the way stays in OUT too.
    """
    import numpy as np

    from clipkit.core import note
    from clipkit.data import COLOURS, SHAPES, held_out_pairs
    from clipkit.storage import Stage

    stage = Stage(out, "demo", {"pictures": pictures, "seed": seed, "overrides": list(overrides)}, overwrite=overwrite)
    report = out / "report" / "index.html"
    if stage.done:
        note(f"the demo stands already: {report} (--overwrite runs it again)")
        return
    began = time.perf_counter()
    unseen = held_out_pairs(np.random.default_rng(seed))
    seen = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in unseen]
    note(f"1/8 draw {pictures:,} pictures of {len(seen)} pairs; {len(unseen)} pairs are never shown in training")
    draw_pictures(out / "pictures" / "train", seen, pictures, seed)
    draw_pictures(out / "pictures" / "seen", seen, 4 * len(seen), seed + 1)
    draw_pictures(out / "pictures" / "unseen", unseen, 40 * len(unseen), seed + 2)
    gallery = join_lists(out / "pictures", ["seen", "unseen"], out / "pictures" / "gallery.tsv")

    step("2/8 pack", "pack", out / "pictures/train.tsv", "--out", out / "shards", "--shard-samples", 1000)
    settings = [f"data.train={out / 'shards'}", f"seed={seed}", *overrides]
    flags = [part for setting in settings for part in ("--set", setting)]
    step("3/8 train", "train", "demo", *flags, "--out", out / "run", "--resume")
    step("4/8 embed", "embed", gallery, "--model", out / "run", "--out", out / "emb", "--precision", "fp32")
    step("5/8 build", "build", out / "emb", "--out", out / "index")
    note("6/8 search by text and by image")
    searches = []
    for colour, shape in unseen[:QUESTIONS]:
        asked = ["--image", next((out / "pictures" / "unseen").glob(f"{colour}_{shape}_*.png"))]
        searches.append((colour, shape, "text", ask("search", out / "index", f"{colour} {shape}", "-k", 12)))
        searches.append((colour, shape, asked[1], ask("search", out / "index", *asked, "-k", 13)))
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    labels = ["--labels", ",".join(names), "--prompts", "{}|a picture of a {}", "--model", out / "run"]
    note(f"7/8 classify the pairs never seen, among all {len(names)} names")
    rows = ask("classify", out / "pictures" / "unseen", *labels)
    figures = ask("evaluate", "retrieval", gallery, "--model", out / "run")
    note("8/8 report")
    summary = write_report(out, report, unseen, searches, rows, names, figures, time.perf_counter() - began)
    stage.commit(**summary)
    note("")
    note(
        f"Zero-shot accuracy on {len(unseen)} pairs never seen together, among {len(names)} names: "
        f"{summary['zeroshot_accuracy']:.1%} (chance {summary['zeroshot_accuracy_chance']:.1%})"
    )
    note(
        f"Text to image recall@10 among {figures['images']} pictures: {figures['image_retrieval_recall@10']:.1%} "
        f"(chance {figures['chance_image_retrieval_recall@10']:.1%})"
    )
    note(f"Report, with pictures: {report}")
    note("On your own data, a list with the columns path and caption:")
    note("  clipkit pack captions.tsv --out shards/ && clipkit train tiny --set data.train=shards/ --out run/")


def draw_pictures(folder: Path, pairs: list[tuple[str, str]], count: int, seed: int) -> None:
    """`count` pictures of the pairs, evenly, and beside the folder a list of their captions."""
    from dataclasses import replace

    import numpy as np

    from clipkit.core import atomic_write
    from clipkit.data import caption, draw, random_scene

    if folder.with_suffix(".tsv").is_file():
        return  # drawn before a kill; the list is written last
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder.with_suffix(".tsv"), "w") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["path", "caption", "colour", "shape"])
        for number in range(count):
            colour, shape = pairs[number % len(pairs)]
            scene = replace(random_scene(rng, pairs), colour=colour, shape=shape)
            path = folder / f"{colour}_{shape}_{number // len(pairs):04d}.png"
            draw(scene, rng).save(path)
            writer.writerow([f"{folder.name}/{path.name}", caption(scene, rng), colour, shape])


def join_lists(folder: Path, parts: list[str], out: Path) -> Path:
    """One list of several, with one header."""
    texts = [(folder / f"{part}.tsv").read_text(encoding="utf-8").partition("\n") for part in parts]
    out.write_text(texts[0][0] + "\n" + "".join(rest for _, _, rest in texts), encoding="utf-8")
    return out


def step(title: str, verb: str, *args: object) -> None:
    """Say what comes and run a verb."""
    from clipkit.core import note

    note(title)
    run_or_stop(verb, args)


def ask(verb: str, *args: object) -> Any:
    """Run a verb that gives results and read them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        run_or_stop(verb, [*args, "--format", "json"])
    return json.loads(shown.getvalue())


def run_or_stop(verb: str, args: Sequence[object]) -> None:
    """Run a verb as the command line would.

    Raises:
        ClipkitError: where it does not end with status 0.
    """
    from clipkit.core import ClipkitError

    if run_job(verb, [str(arg) for arg in args]):
        raise ClipkitError(f"the demo stopped at `clipkit {verb}`; what it said stands above")


def write_report(
    out: Path,
    path: Path,
    unseen: list[tuple[str, str]],
    searches: list[tuple[str, str, Any, list[dict[str, Any]]]],
    rows: list[dict[str, Any]],
    names: list[str],
    figures: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The page and report.json beside it; returns the figures."""
    import numpy as np

    from clipkit.core import Report, curve_figure, write_json
    from clipkit.data import COLOURS, SHAPES

    said = _shown_and_said(rows)
    summary = {
        "zeroshot_accuracy": float(np.mean([shown == told for shown, told in said])),
        "zeroshot_accuracy_chance": 1 / len(names),
        "colour_accuracy": float(np.mean([shown[0] == told[0] for shown, told in said])),
        "shape_accuracy": float(np.mean([shown[1] == told[1] for shown, told in said])),
        "retrieval": figures,
        "seconds": round(seconds, 1),
    }
    recall, guess = figures["image_retrieval_recall@10"], figures["chance_image_retrieval_recall@10"]
    page = Report(
        "clipkit demo", "Two towers trained from scratch on generated pictures, asked about pairs they never saw."
    )
    page.figures(
        [
            ("Pairs never seen, named", f"{summary['zeroshot_accuracy']:.1%}", f"chance {1 / len(names):.1%}"),
            ("Their colour right", f"{summary['colour_accuracy']:.1%}", f"chance {1 / len(COLOURS):.1%}"),
            ("Their shape right", f"{summary['shape_accuracy']:.1%}", f"chance {1 / len(SHAPES):.1%}"),
            ("Text to image, recall@10", f"{recall:.1%}", f"chance {guess:.1%}, {figures['images']} pictures"),
        ]
    )
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    page.heading("Training", f"InfoNCE over batches of captioned pictures; the whole demo took {seconds:.0f} s.")
    batch = round(lines[0]["samples"] / lines[0]["step"])
    level = (float(np.log(batch)), f"guessing among {batch}: ln {batch}")
    curve = ([line["samples"] for line in lines], [line["loss"] for line in lines])
    page.plot(curve_figure(*curve, "samples seen", "loss", level), "loss")

    _show_searches(page, out, searches)
    _show_names(page, out / "pictures" / "unseen", rows, len(names))
    page.heading("Figures beside chance")
    kept = [name for name in figures if f"chance_{name}" in figures]
    page.table([{"figure": n, "value": f"{figures[n]:.4f}", "chance": f"{figures[f'chance_{n}']:.4f}"} for n in kept])
    page.heading("On your own data")
    page.code("clipkit pack captions.tsv --out shards/\nclipkit train tiny --set data.train=shards/ --out run/")
    page.write(path)
    write_json(path.with_name("report.json"), {**summary, "held_out_pairs": [" ".join(pair) for pair in unseen]})
    return summary


def _shown_and_said(rows: list[dict[str, Any]]) -> list[tuple[list[str], list[str]]]:
    """Colour and shape that each picture shows, as its file is called, and those that it was given."""
    return [(Path(row["path"]).stem.split("_")[:2], row["label"].split()) for row in rows]


def _show_searches(page: Any, out: Path, searches: list[tuple[str, str, Any, list[dict[str, Any]]]]) -> None:
    page.heading("Search", "The nearest of all test pictures, best first; framed where colour and shape are as asked.")
    for colour, shape, asked, hits in searches:
        by_text = asked == "text"
        page.subheading(f"“{colour} {shape}” by text" if by_text else f"like this picture of a {colour} {shape}")
        sheet = [] if by_text else [(Path(asked), "asked with this picture", False)]
        for hit in hits:
            if by_text or Path(hit["image_path"]).name != Path(asked).name:
                found = (hit["colour"], hit["shape"]) == (colour, shape)
                label = f"{hit['score']:.2f} {hit['colour']} {hit['shape']}"
                sheet.append((out / "pictures" / hit["image_path"], label, found))
        page.sheet(sheet)


def _show_names(page: Any, folder: Path, rows: list[dict[str, Any]], count: int) -> None:
    import numpy as np

    from clipkit.core import confusion_figure
    from clipkit.data import COLOURS, SHAPES
    from clipkit.metrics import confusion_matrix

    said = _shown_and_said(rows)
    about = f"Every picture shows a pair that training left out, and takes the nearest of all {count} names."
    page.heading("Zero-shot classification", about)
    for part, what, known in ((0, "colour", list(COLOURS)), (1, "shape", list(SHAPES))):
        true, told = (np.array([known.index(pair[which][part]) for pair in said]) for which in (0, 1))
        matrix = confusion_matrix(true, told, len(known))
        page.plot(confusion_figure(matrix, known, f"The {what} in its name"), f"confusion of {what}")
    page.subheading("Least certain first")
    least = sorted(rows, key=lambda row: row["margin"])[:12]
    labels = [f"{row['label']} {row['probability']:.0%}" for row in least]
    right = [shown == told for shown, told in _shown_and_said(least)]
    page.sheet([(folder / row["path"], *each) for row, *each in zip(least, labels, right, strict=True)])


if __name__ == "__main__":
    main()
