"""Whether embedding-reader and autofaiss read what `clipkit embed` writes: rows, their order, ids and metadata.

    python tests/bench/exchange.py [--photos LIST] [--model FOLDER] [--part-size N]

The photos are embedded in several parts, with captions. In clip-retrieval's environment embedding-reader then walks
through vectors and metadata together, and autofaiss builds an index of them, which is asked with the vectors. All of it
must agree with what `clipkit.Embeddings` says; a line that does not ends the script with an error.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
LIST = ROOT.parent / "shared" / "data" / "photos" / "captions.tsv"
MODEL = Path.home() / ".cache" / "clipkit-bench" / "embed" / "model"  # as embed_speed.py leaves it


def there(folder: str, out: str) -> None:
    """Read and build; runs in the rival's environment."""
    import faiss
    from autofaiss import build_index
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(
        embeddings_folder=f"{folder}/img_emb",
        metadata_folder=f"{folder}/metadata",
        meta_columns=["id", "key"],
        file_format="parquet_npy",
    )
    vectors, ids, keys = [], [], []
    for block, meta in reader(batch_size=50, start=0, end=reader.count):
        vectors.append(np.array(block))
        ids += meta["id"].tolist()
        keys += meta["key"].tolist()
    found = np.concatenate(vectors)
    index, _ = build_index(embeddings=f"{folder}/img_emb", save_on_disk=False, metric_type="ip", verbose=30)
    scores, rows = index.search(found.astype(np.float32), 1)
    assert faiss.__version__
    np.savez(out, vectors=found, ids=ids, keys=keys, scores=scores, rows=rows, dim=reader.dimension)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=LIST)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--part-size", type=int, default=50)
    parser.add_argument("--there", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.there:
        there(*args.there)
        return
    from rival import environment

    from clipkit.embedding import Embeddings

    own = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as work:
        folder, told = Path(work) / "emb", Path(work) / "there.npz"
        command = [sys.executable, "-m", "clipkit", "embed", args.photos, "--model", args.model, "--out", folder]
        subprocess.run([*map(str, command), "--part-size", str(args.part_size)], env=own, check=True)
        alone = {**os.environ, "PYTHONPATH": ""}
        python = environment("clip_retrieval")
        subprocess.run([str(python), __file__, "--there", str(folder), str(told)], env=alone, check=True)
        opened, theirs = Embeddings.open(folder), np.load(told)
        table, vectors = opened.table(), opened.vectors()
        facts = {
            "images": len(vectors),
            "parts": len(opened.manifest["parts"]),
            "vectors equal": bool((theirs["vectors"] == vectors).all()),
            "ids equal": theirs["ids"].tolist() == table["id"].to_pylist(),
            "keys equal": theirs["keys"].tolist() == table["key"].to_pylist(),
            "autofaiss finds each row first": float((theirs["rows"][:, 0] == np.arange(len(vectors))).mean()),
        }
        print(json.dumps(facts, indent=1))
        if not all(facts.values()):
            raise SystemExit("they do not agree")


if __name__ == "__main__":
    main()
