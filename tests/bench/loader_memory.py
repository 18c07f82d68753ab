"""Resident memory of the training loader over a long run: python tests/bench/loader_memory.py [--samples N] [SHARDS]

Reads as many samples as a long training run would, and prints one table: samples so far, rate, resident memory of this
process and its loader processes (each page counted once, PSS). Without SHARDS it makes 20,000 small pictures.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipkit.data.shards import write_shard
from clipkit.images import AugmentConfig, Preprocess
from clipkit.training.batches import Batches, open_train_data, train_batches
from clipkit.training.settings import DataConfig


def make_shards(folder: Path, count: int = 20_000, per_shard: int = 2_000) -> Path:
    """Pictures of 48 px in JPEG."""
    import io

    rng = np.random.default_rng(0)
    for start in range(0, count, per_shard):
        samples = []
        for number in range(start, start + per_shard):
            buffer = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
            small.resize((48, 48), Image.Resampling.BICUBIC).save(buffer, "JPEG")
            samples.append((f"{number:08d}", {"jpg": buffer.getvalue(), "txt": f"picture {number}".encode()}))
        write_shard(folder / f"{start // per_shard:06d}.tar", samples)
    return folder


def resident_mib() -> float:
    """This process and its children, shared pages divided among those that share them."""
    total = 0
    own = Path("/proc/self").resolve().name
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    for pid in [own, *children]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?")
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        spec = args.shards or str(make_shards(Path(scratch)))
        augment = AugmentConfig(shift=0.06, scale=(0.8, 1.0), flip=0.5, brightness=0.2)
        config = DataConfig(train=spec, workers=args.workers, augment=augment)
        made = Batches(
            open_train_data(config, 0), Preprocess(size=32), lambda texts: torch.zeros(len(texts), 16), config, 0
        )
        steps = args.samples // args.batch_size
        print(f"{'samples':>12} {'samples/s':>10} {'MiB':>9}")
        began = last = time.perf_counter()
        report = max(1, steps // 20)
        for step, _ in enumerate(train_batches(made, first_step=0, steps=steps, batch_size=args.batch_size), 1):
            if step % report == 0 or step == 20:
                now = time.perf_counter()
                count = step * args.batch_size
                rate = report * args.batch_size / (now - last) if step != 20 else count / (now - began)
                print(f"{count:>12,} {rate:>10,.0f} {resident_mib():>9,.1f}", flush=True)
                last = now


if __name__ == "__main__":
    main()
