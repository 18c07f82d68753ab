"""What CLIP_benchmark's metrics say of small inputs: the figures in tests/clip_benchmark_figures.json.

    python tests/bench/clip_benchmark_figures.py

Downloads CLIP_benchmark's wheel, without what it depends on, and has its own functions evaluate models that give the
vectors of each case as they are. The tests compare `clipkit.metrics.clip_benchmark` with the file and need none of
this.
"""

import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

VERSION = "1.6.2"
OUT = Path(__file__).parents[1] / "clip_benchmark_figures.json"


class Given:
    """A model whose images are vectors and whose texts are rows of vectors."""

    def __init__(self, text: torch.Tensor):
        self.text = text

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.reshape(len(pixels), -1)

    def encode_text(self, rows: torch.Tensor) -> torch.Tensor:
        return self.text[rows]


def tokens(rows: list[int]) -> torch.Tensor:
    """The rows themselves are the texts."""
    return torch.tensor(rows, dtype=torch.long)


def vectors(
    rng: np.random.Generator, rows: int, kind: str, near: list[list[int]] | None = None, dim: int = 7
) -> list[list[int]]:
    """Small whole numbers: at random, or one-hot with many alike (``tied``), or all alike (``collapsed``).

    At random they may be near to others, of which each has as many as there are for it.
    """
    if kind == "tied":
        return np.eye(dim, dtype=int)[rng.integers(3, size=rows)].tolist()
    if kind == "collapsed":
        return np.eye(dim, dtype=int)[np.zeros(rows, int)].tolist()
    drawn = rng.integers(-9, 10, size=(rows, dim))
    return (drawn + np.repeat(near, rows // len(near), axis=0) if near else drawn).tolist()


def told(call: Callable[..., dict[str, float]], *given: Any, **options: Any) -> dict[str, float | None] | str:
    """The figures, None for NaN; or the kind of the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {name: None if value != value else float(value) for name, value in call(*given, **options).items()}
    except Exception as error:
        return type(error).__name__


def retrieval(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    from clip_benchmark.metrics import zeroshot_retrieval

    sizes = [
        ("random", 23, 1),
        ("random", 40, 3),
        ("tied", 23, 2),
        ("collapsed", 13, 2),
        ("random", 1, 1),
        ("random", 0, 1),
    ]
    for kind, images, captions in sizes:
        image = vectors(rng, images, kind)
        text = vectors(rng, images * captions, kind, image)
        batches = [
            (torch.tensor(image[at : at + 9]).float(), [[captions * i + c for c in range(captions)] for i in own])
            for at in range(0, images, 9)
            if (own := range(images)[at : at + 9])
        ]
        ks = [1] if images == 1 else [1, 5, 10]
        model = Given(torch.tensor(text).float())
        figures = told(zeroshot_retrieval.evaluate, model, batches, tokens, "cpu", amp=False, recall_k_list=ks)
        yield {"kind": kind, "image": image, "text": text, "captions": captions, "ks": ks, "figures": figures}


def classification(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    from clip_benchmark.metrics import zeroshot_classification

    sizes = [
        ("random", 40, 9),
        ("random", 30, 3),
        ("tied", 25, 6),
        ("collapsed", 20, 6),
        ("random", 1, 6),
        ("random", 0, 6),
    ]
    for kind, images, classes in sizes:
        image, text = vectors(rng, images, kind), vectors(rng, classes, kind)
        labels = rng.integers(classes - 1, size=images).tolist()  # the last class has no image
        loader = [(torch.tensor(image).float(), torch.tensor(labels))] if images else []
        figures = told(evaluated, zeroshot_classification, text, loader)
        yield {"kind": kind, "image": image, "classes": text, "labels": labels, "figures": figures}


def evaluated(module: Any, text: list[list[int]], batches: list[Any]) -> dict[str, float]:
    """Its evaluation with one prompt per class, whose text is the class's row."""

    class Loader(list):
        class dataset:
            classes = range(len(text))

    def rows(texts: list[str]) -> torch.Tensor:
        return tokens([int(row) for row in texts])

    # With numpy 2.4 it fails as it turns an array of one number into a float; this does what older versions did.
    module.float = lambda value: float(value) if isinstance(value, str) else np.asarray(value).item()
    names = [str(row) for row in range(len(text))]
    model = Given(torch.tensor(text).float())
    return module.evaluate(model, Loader(batches), rows, names, ["{c}"], "cpu", amp=False)


def precision(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class

    for kind, images, classes in [
        ("random", 40, 5),
        ("tied", 30, 4),
        ("collapsed", 12, 3),
        ("random", 1, 2),
        ("random", 0, 2),
    ]:
        scores = rng.permutation(images * classes).reshape(images, classes)
        scores = {"tied": scores % 3, "collapsed": scores * 0}.get(kind, scores).tolist()
        labels = rng.random((images, classes)) < 0.4
        if kind == "random":
            labels[:, -1] = False  # a class without a positive
        labels = labels.astype(int).tolist()
        shape = (images, classes)
        given = torch.tensor(scores).float().reshape(shape), torch.tensor(labels).long().reshape(shape)
        figures = told(mean_over_classes, average_precision_per_class, *given)
        yield {"kind": kind, "classes": classes, "scores": scores, "labels": labels, "figures": figures}


def mean_over_classes(per_class: Callable[..., torch.Tensor], *given: torch.Tensor) -> dict[str, float]:
    """As its evaluation has it."""
    return {"mean_average_precision": per_class(*given).mean().item()}


def choice(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    from clip_benchmark.metrics import image_caption_selection

    sizes = [
        ("random", 60, 2),
        ("tied", 40, 2),
        ("collapsed", 9, 2),
        ("random", 60, 1),
        ("tied", 40, 1),
        ("collapsed", 9, 1),
    ]
    for kind, instances, images in [*sizes, ("random", 1, 2), ("random", 0, 2)]:
        image = vectors(rng, instances * images, kind)
        text = vectors(rng, instances * 2, kind, image)
        pictures = torch.tensor(image).float().reshape(instances, images, 1, 1, -1) if instances else None
        batches = [(pictures, [[2 * i, 2 * i + 1] for i in range(instances)])] if instances else []
        model = Given(torch.tensor(text).float())
        figures = told(image_caption_selection.evaluate, model, batches, tokens, "cpu", amp=False)
        yield {"kind": kind, "images": images, "image": image, "text": text, "figures": figures}


def main() -> None:
    """Download, evaluate, write."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*wanted, f"clip_benchmark=={VERSION}"], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        sys.path.insert(0, folder)
        rng = np.random.default_rng(0)
        found: dict[str, Any] = {"clip_benchmark": VERSION, "torch": torch.__version__}
        for cases in (retrieval, classification, precision, choice):
            found[cases.__name__] = list(cases(rng))
    lines = [f" {json.dumps(name)}: {_listed(value)}" for name, value in found.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _listed(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return "[\n" + ",\n".join("  " + json.dumps(case, separators=(",", ":")) for case in value) + "\n ]"


if __name__ == "__main__":
    main()
