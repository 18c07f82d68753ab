"""How building and searching grow with the number of vectors, and what that says of sizes that do not fit here.

    python tests/bench/scale.py [--rows N ...] [--dim D] [--kind KIND] [--work DIR]

Made-up vectors (`vectors.py`) of each size are built into an index and asked one query at a time on one thread. Memory
is the build's anonymous memory, sampled from outside, beyond that of a process with the same imports. From a million
rows on each size is built again under `--memory` of a third of the float16 data.

The growth of a build is fitted with the terms that it is made of: a constant (the start, learning the codes), one by
row (reading, coding, and k-means, whose sample and centres both grow with the root of the rows), and one by row and
root of the rows (each vector is compared with every centre). Search is fitted as a power of the rows. Both say what 100
million and 5 billion vectors would take on such a machine.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
LARGE = (100_000_000, 5_000_000_000)
IDLE = "import clipkit.search.build, clipkit.core.figures, matplotlib.pyplot, time; time.sleep(1)"


def power_law(rows: list[int], values: list[float]) -> tuple[float, float]:
    """``value = factor * rows ** power``, by least squares on logarithms."""
    power, factor = np.polyfit(np.log(rows), np.log(np.maximum(values, 1e-9)), 1)
    return float(np.exp(factor)), float(power)


def terms(rows: Any) -> np.ndarray:
    """Array ``[N, 3]``: what a build's seconds grow with."""
    rows = np.asarray(rows, dtype=np.float64)
    return np.stack([np.ones_like(rows), rows, rows**1.5], axis=1)


def build_growth(rows: list[int], values: list[float]) -> np.ndarray:
    """Float array ``[3]``: seconds per term, none below zero, by least squares on relative errors."""
    from scipy.optimize import nnls

    scale = terms(rows).max(axis=0)
    weights = 1 / np.asarray(values)[:, None]
    return nnls(terms(rows) / scale * weights, np.ones(len(values)))[0] / scale


def main() -> None:
    from index_quality import sampled
    from vectors import World, write_embeddings

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", type=int, default=[100_000, 300_000, 1_000_000, 3_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--kind", default="IVF-PQ")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "clipkit-bench" / "scale")
    args = parser.parse_args()
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    idle = sampled([sys.executable, "-c", IDLE], own)[2]
    queries = args.work / "queries.npy"
    args.work.mkdir(parents=True, exist_ok=True)
    np.save(queries, World(args.dim).block("text", 10**6, 500).astype(np.float32))
    heads = ("vectors", "--memory MiB", "build s", "build MiB", "recall@10", "lists read", "scored again")
    print(f"| {' | '.join((*heads, 'ms per query', 'GB on disk'))} |\n|{'---:|' * 9}")
    seconds: list[float] = []
    spent: list[float] = []
    for rows in args.rows:
        folder, out = args.work / f"emb-{rows}", args.work / "index"
        write_embeddings(folder, rows, args.dim, 2000)
        for memory in [None, *([rows * args.dim * 2 // 3] if rows >= 1_000_000 else [])]:
            flags: list[Any] = ["--kind", args.kind, *(["--memory", memory] if memory else []), "--overwrite"]
            _, took, most = sampled([sys.executable, "-m", "clipkit", "build", folder, "--out", out, *flags], own)
            call = {"side": "clipkit", "index": str(out), "queries": str(queries), "threads": 1}
            call["rows"] = str(args.work / "rows.npy")
            ask = [sys.executable, Path(__file__).with_name("index_quality.py"), "--call", json.dumps(call)]
            told = json.loads(sampled(ask, own)[0].splitlines()[-1])
            chosen = json.loads((out / "manifest.json").read_text())["chosen"]["image"]
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            print(
                f"| {rows:,} | {memory / 2**20 if memory else 0:,.0f} | {took:,.1f} | {(most - idle) / 2**20:,.0f} | "
                f"{chosen['recall']:.3f} | {chosen['effort']['lists']} | {chosen['effort']['rerank']} | "
                f"{1000 / told['qps']:.2f} | {size / 1e9:.2f} |",
                flush=True,
            )
            if memory is None:
                seconds.append(took)
                spent.append(1 / told["qps"])
        shutil.rmtree(folder)
    if len(args.rows) > 2:
        per_term = build_growth(args.rows, seconds)
        print(
            f"\nbuild seconds = {per_term[0]:.3g} + {per_term[1]:.3g} * rows + {per_term[2]:.3g} * rows ** 1.5", end=""
        )
        print(
            "; "
            + ", ".join(
                f"{rows:,}: {took / 3600:,.1f} h" for rows, took in zip(LARGE, terms(LARGE) @ per_term, strict=True)
            )
        )
        factor, power = power_law(args.rows, spent)
        print(f"seconds per query = {factor:.3g} * rows ** {power:.2f}", end="; ")
        print(", ".join(f"{rows:,}: {1000 * factor * rows**power:,.0f} ms" for rows in LARGE))


if __name__ == "__main__":
    main()
