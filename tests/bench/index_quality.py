"""Indexes that clipkit and autofaiss choose at the same memory: recall with text queries, speed, size and build cost.

    python tests/bench/index_quality.py [--rows N] [--dim D] [--memory SIZE ...] [--work DIR] [--embeddings DIR DIR]

Vectors are made up (tests/bench/vectors.py), or those of an embeddings folder, asked with the captions of another one
by the same model. Queries are captions that neither side is tuned with. Each index is built and asked in a process of
its own; memory is that process's anonymous memory, sampled from outside, beyond what it has after its imports.
autofaiss stands in clip-retrieval's environment, as it does not start alone, with its own FAISS, and is asked there.
Vectors on the disk that clipkit scores again with are counted apart.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
K = 10
ASKED = 1000
TIMED = 300


def sampled(command: list[Any], environ: dict[str, str]) -> tuple[str, float, int]:
    """Run a command; its output, seconds, and its anonymous memory at the most in bytes."""
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], env=environ, stdout=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(
                most, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
            )
        except (OSError, TypeError):
            break
        time.sleep(0.05)
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return out, time.perf_counter() - began, most


def recall(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of the best ten that were found, by exact scores; equal scores are equally good."""
    return float((scores >= truth[:, K - 1 : K] - 1e-5).sum() / truth[:, :K].size)


def speed(search: Any, queries: np.ndarray) -> float:
    """Queries per second, one after another; the median."""
    spent = []
    for query in queries[:TIMED]:
        began = time.perf_counter()
        search(query[None])
        spent.append(time.perf_counter() - began)
    return 1 / float(np.median(spent))


def rival(call: dict[str, Any]) -> None:
    """Build with autofaiss or ask what it built; runs in its environment."""
    import faiss

    if call["what"] == "imports":
        import autofaiss  # noqa: F401

        return
    if call["what"] == "build":
        from autofaiss import build_index

        build_index(
            embeddings=call["vectors"],
            index_path=call["index"],
            index_infos_path=call["index"] + ".json",
            max_index_memory_usage=call["memory"],
            current_memory_available="16G",
            metric_type="ip",
            nb_cores=2,
            verbose=30,
        )
        return
    faiss.omp_set_num_threads(call["threads"])
    index = faiss.read_index(call["index"])
    queries = np.load(call["queries"])
    _, rows = index.search(queries, K)
    np.save(call["rows"], rows)
    print(
        json.dumps(
            {
                "qps": speed(lambda q: index.search(q, K), queries),
                "batch": batch(lambda: index.search(queries, K), queries),
            }
        )
    )


def batch(search: Any, queries: np.ndarray) -> float:
    """Queries per second, all at once."""
    search()
    began = time.perf_counter()
    search()
    return len(queries) / (time.perf_counter() - began)


def ours(call: dict[str, Any]) -> None:
    """Ask clipkit's index, with so many threads."""
    import faiss

    from clipkit.search import Index

    faiss.omp_set_num_threads(call["threads"])
    index = Index.open(call["index"])
    queries = np.load(call["queries"])
    np.save(call["rows"], index.search(queries, K).positions)
    print(
        json.dumps(
            {
                "qps": speed(lambda q: index.search(q, K), queries),
                "batch": batch(lambda: index.search(queries, K), queries),
            }
        )
    )


def filtered(call: dict[str, Any]) -> None:
    """Ask clipkit's index under conditions that hold for some of the rows; recall against its exact search."""
    from clipkit.search import Index

    index, queries = Index.open(call["index"]), np.load(call["queries"])[:TIMED]
    for where in (None, "width < 500", "width < 100", "width < 10", "width < 1"):
        exact = index.search(queries, K, where=where, exact=True).scores
        found = index.search(queries, K, where=where).scores
        share = index.count("image", where) / len(index)
        per_second = speed(lambda q, w=where: index.search(q, K, where=w), queries)
        print(f"| {share:.1%} | {recall(found, exact):.3f} | {per_second:,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--memory", nargs="*", default=["2GB", "150MB"], help="that the index may take while it serves")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "clipkit-bench" / "index")
    parser.add_argument("--embeddings", type=Path, nargs=2, help="to index, and with captions to ask with")
    parser.add_argument("--kind", default="auto", help="ours, where it is not to be chosen")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        call = json.loads(args.call)
        {"clipkit": ours, "filtered": filtered, "autofaiss": rival}[call["side"]](call)
        return
    import faiss
    from rival import environment
    from vectors import World, write_embeddings

    from clipkit.embedding import Embeddings

    work = args.work / (args.embeddings[0].name if args.embeddings else f"{args.rows}-{args.dim}")
    work.mkdir(parents=True, exist_ok=True)
    folder = args.embeddings[0] if args.embeddings else work / "emb"
    if args.embeddings is None:
        write_embeddings(folder, args.rows, args.dim, 2 * ASKED)
        queries = World(args.dim).block("text", 10**6, ASKED).astype(np.float32)  # of pairs that nobody has seen
    else:
        captions = Embeddings.open(args.embeddings[1]).vectors("text")
        queries = captions[:: max(1, len(captions) // ASKED)][:ASKED]
    np.save(work / "queries.npy", queries)
    vectors = Embeddings.open(folder)
    heap = faiss.ResultHeap(len(queries), K, keep_max=True)
    for block in vectors.blocks("image"):
        heap.add_result(*faiss.knn(queries, block.astype(np.float32), K, metric=faiss.METRIC_INNER_PRODUCT))
    heap.finalize()
    truth = heap.D

    def scores(rows: np.ndarray) -> np.ndarray:
        stored = vectors.vectors("image") if args.rows <= 2_000_000 else np.concatenate(list(vectors.blocks("image")))
        found = np.stack([stored[np.maximum(r, 0)] @ q for r, q in zip(rows, queries, strict=True)])
        return np.where(rows < 0, -np.inf, found)

    own = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    other, alone = environment("clip_retrieval"), {**os.environ, "PYTHONPATH": ""}
    script = Path(__file__).resolve()
    rows = vectors.manifest["counts"]["images"]
    idle = {
        "clipkit": sampled([sys.executable, "-c", "import clipkit.search.build, time; time.sleep(1)"], own)[2],
        "autofaiss": sampled([other, script, "--call", json.dumps({"side": "autofaiss", "what": "imports"})], alone)[2],
    }
    heads = ("memory", "index", "recall@10", "queries/s, 1 thread", "2 threads, all at once", "bytes per vector")
    print(f"| {' | '.join((*heads, 'on disk too', 'build s', 'build MiB'))} |\n|---|---|{'---:|' * 7}")
    for memory in args.memory:
        for side in ("autofaiss", "clipkit"):
            at = work / f"{side}-{memory}"
            if side == "clipkit":
                flags = ["--serve-memory", memory, "--kind", args.kind, "--overwrite"]
                call = [sys.executable, "-m", "clipkit", "build", folder, "--out", at, *flags]
                _, seconds, most = sampled(call, own)
                told = json.loads((at / "manifest.json").read_text())
                name = told["chosen"]["image"]["kind"]
                held = sum(p.stat().st_size for p in at.glob("segments/*/image.codes*"))
                beside = 2 * int(queries.shape[1])
            else:
                call_ = {
                    "side": side,
                    "what": "build",
                    "vectors": str(folder / "img_emb"),
                    "index": str(at),
                    "memory": memory,
                }
                _, seconds, most = sampled([other, script, "--call", json.dumps(call_)], alone)
                name = json.loads(Path(f"{at}.json").read_text()).get("index_key", "?")
                held, beside = at.stat().st_size, 0
            told = {}
            for threads in (1, 2):
                asked = {
                    "side": side,
                    "what": "ask",
                    "index": str(at),
                    "queries": str(work / "queries.npy"),
                    "threads": threads,
                }
                asked["rows"] = str(work / f"{side}-rows.npy")
                python, environ = (sys.executable, own) if side == "clipkit" else (other, alone)
                told[threads] = json.loads(
                    sampled([python, script, "--call", json.dumps(asked)], environ)[0].splitlines()[-1]
                )
            found = recall(scores(np.load(asked["rows"])), truth)
            print(
                f"| {memory} | {side}: {name} | {found:.3f} | {told[1]['qps']:,.0f} | {told[2]['batch']:,.0f} | "
                f"{held / rows:,.0f} | {beside:,.0f} | {seconds:,.0f} | {(most - idle[side]) / 2**20:,.0f} |",
                flush=True,
            )
    if args.embeddings is None:
        print("\n| rows that pass | recall@10 | queries/s, 1 thread |\n|---:|---:|---:|", flush=True)
        call = {"side": "filtered", "index": str(at), "queries": str(work / "queries.npy")}
        print(sampled([sys.executable, script, "--call", json.dumps(call)], {**own, "OMP_NUM_THREADS": "1"})[0])


if __name__ == "__main__":
    main()
