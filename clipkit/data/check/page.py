"""What a check found, as a page with pictures and as JSON."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.core import BadSample, Report, histogram_figure, sizes_figure, write_json
from clipkit.data.check.findings import FIGURES, Verdict
from clipkit.data.check.scanning import FINDING_KINDS, Finding, Scan
from clipkit.images import decode

__all__ = ["check_summary", "page_paths", "write_check_page"]

LISTED = 100  # findings in the page's table; all of them stand in the JSON
SHOWN = 24  # pictures of a contact sheet


def check_summary(mine: Scan, verdict: Verdict) -> dict[str, Any]:
    """Everything a check found, as it is printed and stored: figures first, then the lists."""
    return {
        "source": mine.spec,
        "clean": verdict.clean,
        "strict": verdict.strict,
        "quick": mine.quick,
        **verdict.figures,
        "against": verdict.against,
        "frequent_captions": verdict.frequent_captions,
        "findings": [finding.line() for finding in verdict.findings],
    }


def page_paths(where: Path) -> tuple[Path, Path]:
    """The page and the JSON beside it, for a folder or a file that ends in ``.html``."""
    if where.suffix.lower() in (".html", ".htm"):
        return where, where.with_suffix(".json")
    return where / "index.html", where / "report.json"


def write_check_page(mine: Scan, verdict: Verdict, others: list[Scan], where: Path, seed: int = 0) -> Path:
    """Write the page, one file that refers to nothing outside itself, and the JSON beside it.

    Args:
        mine: what was checked.
        verdict: what was found.
        others: the sets it was checked against, in the verdict's order.
        where: a folder, or a file that ends in ``.html``.
        seed: of the random samples that are shown.

    Returns:
        The page's path.
    """
    path, beside = page_paths(where)
    figures = verdict.figures
    page = Report(f"Check of {mine.spec}", _headline(verdict))
    page.figures(
        [
            ("Samples", f"{figures['samples']:,}", f"{figures['captions']:,} captions, {_size(figures['bytes'])}"),
            ("Defects", f"{figures['defects']:,}", "each is listed below"),
            ("Exact duplicates", f"{figures['duplicate']:,}", _share(figures["duplicate"], figures)),
            ("Near duplicates", f"{figures['near_duplicate']:,}", _share(figures["near_duplicate"], figures)),
            *[(f"Shared with {line['source']}", f"{line['shared']:,}", _of(line)) for line in verdict.against],
        ]
    )
    _wrong(page, mine, verdict)
    _pairs(page, mine, verdict, others)
    _caption_section(page, mine, verdict)
    _size_section(page, mine, figures)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(mine.samples["read"]))[:SHOWN].tolist()
    if rows:
        page.heading("Samples at random", f"{len(rows)} of {figures['samples']:,}, by seed {seed}.")
        page.sheet([(image, _captions_of(mine, row), False) for row in sorted(rows) if (image := _image(mine, row))])
    flat = rng.permutation(np.flatnonzero(mine.samples["flat"]))[:SHOWN].tolist()
    if flat:
        note = f"{figures['flat_images']:,} images have hardly any contrast, so their looks say nothing; of them:"
        page.heading("Even surfaces", note)
        page.sheet([(image, mine.place(row)[1], False) for row in sorted(flat) if (image := _image(mine, row))])
    page.heading("All figures", "Under the names that they have in the JSON.")
    page.table(
        [{"figure": name, "value": _number(value), "meaning": _meaning(name)} for name, value in figures.items()],
        words=True,
    )
    page.write(path)
    write_json(beside, check_summary(mine, verdict))
    return path


def _headline(verdict: Verdict) -> str:
    if verdict.clean:
        return "Nothing is wrong."
    figures = verdict.figures
    wrong = [f"{figures[kind]:,} {kind}" for kind, (defect, _) in FINDING_KINDS.items() if defect and figures[kind]]
    return "Found: " + ", ".join(wrong).replace("_", " ") if wrong else "No defect; under strict rules the notes count."


def _wrong(page: Report, mine: Scan, verdict: Verdict) -> None:
    note = "Quick check: headers and bytes only, nothing was decoded." if mine.quick else ""
    page.heading("What was found", note)
    rows = [
        {"kind": kind, "": "defect" if defect else "note", "count": f"{verdict.figures[kind]:,}", "meaning": meaning}
        for kind, (defect, meaning) in FINDING_KINDS.items()
        if verdict.figures[kind]
    ]
    if not rows:
        page.text("Every shard, image and caption is whole, and no picture stands twice.")
        return
    page.table(rows, words=True)
    listed = [f for f in verdict.findings if f.kind not in ("near_duplicate", "duplicate", "shared")]
    if listed:
        page.subheading("Where")
        page.table(
            [{"kind": f.kind, "shard": f.shard or "", "key": f.key or "", "reason": f.reason} for f in listed[:LISTED]],
            words=True,
        )
        if len(listed) > LISTED:
            page.text(f"… and {len(listed) - LISTED:,} more in the JSON beside this page.")


def _pairs(page: Report, mine: Scan, verdict: Verdict, others: list[Scan]) -> None:
    by_name = {scan.spec: scan for scan in others}
    sections = (
        ("shared", "Also in the other set", "Left: here. Right: the nearest picture there. Farthest first."),
        ("near_duplicate", "Near duplicates", "Left: the picture. Right: the one that it looks like. Farthest first."),
        ("duplicate", "Exact duplicates", "The same bytes under two keys."),
    )
    for kind, title, note in sections:
        findings = [finding for finding in verdict.findings if finding.kind == kind]
        if not findings:
            continue
        page.heading(f"{title}: {len(findings):,}", note)
        # The farthest are where a wrong one would be.
        findings.sort(key=lambda finding: -(finding.distance or 0))
        shown = []
        for finding in findings[:SHOWN]:
            one = _image(mine, finding.row)
            other = _image(by_name[finding.other] if finding.other else mine, finding.other_row)
            if one is not None and other is not None:
                shown.append((one, other, _label(finding)))
        page.pairs(shown)


def _label(finding: Finding) -> str:
    bits = f" · {finding.distance} of 64 bits differ" if finding.distance else ""
    return f"{finding.key} — {finding.other_key}{bits}"


def _caption_section(page: Report, mine: Scan, verdict: Verdict) -> None:
    figures = verdict.figures
    if not figures["captions"]:
        return
    page.heading("Captions")
    if figures["tokens_max"] is not None:
        cut = f"{figures['captions_cut']:,} of {figures['captions']:,} are longer than that and are cut."
        page.text(f"The model reads {figures['context_length']} tokens; {cut}")
        mark = (figures["context_length"], "context")
        page.plot(histogram_figure(mine.captions["tokens"], "tokens per caption", "captions", mark), "caption lengths")
    if verdict.frequent_captions:
        page.subheading(f"{figures['duplicate_captions']:,} captions that several images have")
        page.table([{"caption": c["caption"], "images": f"{c['samples']:,}"} for c in verdict.frequent_captions])


def _size_section(page: Report, mine: Scan, figures: dict[str, Any]) -> None:
    sizes = mine.samples[mine.samples["read"]]
    if not len(sizes):
        return
    area = sizes["width"].astype(np.int64) * sizes["height"]
    rows = np.flatnonzero(mine.samples["read"])
    ends = [("smallest", int(area.argmin())), ("largest", int(area.argmax()))]
    page.heading("Image sizes", f"{figures['images_read']:,} images, upright.")
    if int(area.max()) > int(area.min()):
        page.plot(sizes_figure(sizes["width"], sizes["height"]), "image sizes")
    page.table(
        [
            {
                "": name,
                "width": f"{sizes['width'][i]:,}",
                "height": f"{sizes['height'][i]:,}",
                "bytes": f"{sizes['bytes'][i]:,}",
                "key": mine.place(int(rows[i]))[1],
            }
            for name, i in ends
        ]
    )


def _image(scan: Scan, row: int) -> Image.Image | None:
    try:
        image = decode(scan.sample(row).read())
    except BadSample:
        return None  # quick checks do not know that it breaks off
    image.thumbnail((256, 256))
    return image


def _captions_of(scan: Scan, row: int) -> str:
    captions = scan.sample(row).captions
    text = captions[0] if captions else scan.place(row)[1]
    return text if len(text) <= 90 else f"{text[:89]}…"


def _meaning(name: str) -> str:
    return FINDING_KINDS[name][1] if name in FINDING_KINDS else FIGURES[name]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _share(count: int, figures: dict[str, Any]) -> str:
    return f"{count / max(figures['images_read'], 1):.1%} of the images"


def _of(line: dict[str, Any]) -> str:
    unreadable = f", {line['unreadable']:,} unreadable" if line["unreadable"] else ""
    return f"it has {line['samples']:,}{unreadable}"
