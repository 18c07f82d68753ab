"""clipkit's training loader beside open_clip's, in one run, on the same shards: images per second and core, memory.

    python tests/bench/loader.py [--photos DIR] [--seconds N] [--rounds N]

open_clip gets an environment of its own (`rival`). The photos are packed as they are and blown up to 12 megapixels.
Then both loaders take turns, each in a fresh process with one worker: open_clip's own `get_wds_dataset` with its own
transforms, which gives normalised floats, and `train_batches`, which gives bytes that the model normalises on the
device; `threads` is the latter with a thread per core in place of the worker, `gpu`, where there is one, with nvJPEG.
Both use open_clip's tokenizer. A figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rival import environment

BATCH = 64
SIZE = 224
MEGAPIXELS = 12
LIBRARIES = ("open_clip_torch", "torch", "torchvision", "pillow", "webdataset", "numpy")
GPU = ("gpu",) if shutil.which("nvidia-smi") else ()
SIDES = ("open_clip", "clipkit", "threads", *GPU)
TRANSFORMS = ("train", "val")


def open_clip_batches(shards: Path, transform: str) -> Iterator[Any]:
    """open_clip's own pipeline, as its trainer builds it; runs in open_clip's environment."""
    from open_clip import get_tokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    names = sorted(path.name for path in shards.glob("*.tar"))
    settings = argparse.Namespace(
        train_data=f"{shards}/{{{names[0][:-4]}..{names[-1][:-4]}}}.tar",
        train_num_samples=100_000_000,  # no epoch ends while we measure
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=1,
        world_size=1,
    )
    preprocess = image_transform(SIZE, is_train=transform == "train")
    data = get_wds_dataset(settings, preprocess, is_train=True, tokenizer=get_tokenizer("ViT-B-32"))
    return (images for images, _ in data.dataloader)


def clipkit_batches(shards: Path, transform: str, side: str) -> Iterator[Any]:
    """The same through clipkit; runs in the environment that this script was started in."""
    import torch
    from open_clip import get_tokenizer

    from clipkit.images import AugmentConfig, Preprocess
    from clipkit.training.batches import Batches, open_train_data, train_batches
    from clipkit.training.settings import DataConfig

    # open_clip's training transform: a random crop of 90 to 100 per cent, no flip, no colours.
    augment = AugmentConfig(scale=(0.9, 1.0) if transform == "train" else (1.0, 1.0))
    decode = "gpu" if side == "gpu" else "fast"
    workers = 0 if side == "threads" else 1
    config = DataConfig(train=str(shards), augment=augment, workers=workers, decode=decode)
    made = Batches(open_train_data(config, 0), Preprocess(size=SIZE), get_tokenizer("ViT-B-32"), config, 0)
    batches = train_batches(made, first_step=0, steps=1_000_000, batch_size=BATCH)
    device = torch.device("cuda" if side == "gpu" else "cpu")
    return (made.on_device(batch, device) for batch in batches)


def measure(batches: Iterator[Any], seconds: float) -> dict[str, Any]:
    """Take batches for `seconds` and at least twice, after two to warm up; from the arrival of one to that of another.

    Returns:
        images, wall and CPU seconds of this process and its children, their resident MB at start, middle and end (pages
        that they share count for each), and the versions of what did the work.
    """
    from importlib.metadata import version

    import psutil

    def tree() -> list[psutil.Process]:
        own = psutil.Process()
        return [own, *own.children(recursive=True)]

    def cpu() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in tree())

    def resident() -> float:
        return sum(process.memory_info().rss for process in tree()) / 2**20

    for _ in range(2):
        next(batches)
    started, used, images, memory = time.perf_counter(), cpu(), 0, [resident()]
    while images < 2 * BATCH or time.perf_counter() - started < seconds:
        images += len(next(batches))
        if len(memory) == 1 and time.perf_counter() - started >= seconds / 2:
            memory.append(resident())
    wall, used = time.perf_counter() - started, cpu() - used
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return {"images": images, "wall": wall, "cpu": used, "memory": [*memory, resident()], "versions": versions}


def make_shards(photos: Path, out: Path) -> dict[str, Path]:
    """The photos in four shards as they are, and in four more at 12 megapixels."""
    from PIL import Image

    from clipkit.data.shards import write_shard
    from clipkit.data.sources import open_source

    def blown_up(data: bytes) -> bytes:
        image, buffer = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
        factor = (MEGAPIXELS * 1e6 / (image.width * image.height)) ** 0.5
        size = round(image.width * factor), round(image.height * factor)
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    source = open_source(next(photos.glob("*.tsv"), photos))
    made = {"as they are": out / "small", f"{MEGAPIXELS} megapixels": out / "large"}
    for folder, change in zip(made.values(), (bytes, blown_up), strict=True):
        folder.mkdir()
        for shard in range(4):
            rows = (source[row] for row in range(shard, len(source), 4))
            samples = (
                (f"{shard}-{n}", {"jpg": change(sample.read()), "txt": (sample.captions or ("a photo",))[0].encode()})
                for n, sample in enumerate(rows)
            )
            write_shard(folder / f"{shard:06d}.tar", samples)
    return made


def agreement(shards: Path) -> str:
    """How far the fast path is from the exact one, without augmentation, in grey levels and in a model's eyes."""
    import numpy as np
    import torch

    from clipkit.data.shards import Shards
    from clipkit.images import AugmentConfig, augmented_pixels
    from clipkit.models import create_model

    torch.manual_seed(0)
    model = create_model("open_clip:ViT-B-32").eval()
    rng, plain = np.random.default_rng(0), AugmentConfig()
    sides = []
    for exact in (True, False):
        images = (sample["jpg"] for sample in Shards.open(str(shards)))
        pixels = [augmented_pixels(data, model.preprocess, plain, rng, exact=exact) for data in images]
        with torch.inference_mode():
            parts = [model.encode_image(part) for part in torch.from_numpy(np.stack(pixels)).split(32)]
        sides.append((np.stack(pixels).astype(int), torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)))
    (exact_pixels, exact_rows), (fast_pixels, fast_rows) = sides
    away = np.abs(exact_pixels - fast_pixels).mean(axis=(1, 2, 3))
    cosines = (exact_rows * fast_rows).sum(-1)
    others = (exact_rows @ exact_rows.T)[~torch.eye(len(exact_rows), dtype=torch.bool)]
    return (
        f"mean absolute difference {away.mean():.3f} grey levels (worst photo {away.max():.3f}); cosine in a ViT-B/32 "
        f"with random weights: median {cosines.median():.6f}, least {cosines.min():.6f} "
        f"(between different photos: median {others.median():.2f})"
    )


def turn(side: str, python: Path, shards: Path, transform: str, seconds: float) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [str(python), __file__, "--side", side, "--shards", str(shards), "--transform", transform]
    root = str(Path(__file__).parents[2])
    added = {"PYTHONPATH": ""} if side == "open_clip" else {"PYTHONPATH": root}
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **added}
    done = subprocess.run([*command, "--seconds", str(seconds)], env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[3] / "shared" / "data" / "photos"
    parser.add_argument("--photos", type=Path, default=default, help="a folder of JPEG photos, with a .tsv of captions")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--transform", choices=TRANSFORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        if args.side == "open_clip":
            batches = open_clip_batches(args.shards, args.transform)
        else:
            batches = clipkit_batches(args.shards, args.transform, args.side)
        print(json.dumps(measure(batches, args.seconds)), flush=True)
        os._exit(0)  # the workers are of no more use, and webdataset's take long to hear of it
    if not args.photos.is_dir():
        raise SystemExit(f"no such folder: {args.photos}; name one with --photos")
    pythons = dict.fromkeys(SIDES, Path(sys.executable)) | {"open_clip": environment()}
    with tempfile.TemporaryDirectory() as folder:
        made = make_shards(args.photos, Path(folder))
        head = f"{'photos':15}{'transform':11}{'loader':11}{'images/s/core':>14}{'images/s':>10}{'ratio/core':>12}"
        print(f"{head}{'ratio':>7}   RSS MB start, middle, end")
        for name, shards in made.items():
            for transform in TRANSFORMS:
                rounds = [
                    {side: turn(side, pythons[side], shards, transform, args.seconds) for side in order}
                    for order in ([SIDES, SIDES[::-1]] * args.rounds)[: args.rounds]
                ]
                for side in SIDES:
                    found = [each[side] for each in rounds]
                    per = {key: [each["images"] / each[key] for each in found] for key in ("cpu", "wall")}
                    base = {key: [r["open_clip"]["images"] / r["open_clip"][key] for r in rounds] for key in per}
                    ratio = {k: median(a / b for a, b in zip(per[k], base[k], strict=True)) for k in per}
                    memory = ", ".join(f"{median(m):.0f}" for m in zip(*(e["memory"] for e in found), strict=True))
                    line = f"{name:15}{transform:11}{side:11}{median(per['cpu']):14.1f}{median(per['wall']):10.1f}"
                    print(f"{line}{ratio['cpu']:12.2f}{ratio['wall']:7.2f}   {memory}", flush=True)
        for side in SIDES:
            print(f"{side} ran with {rounds[0][side]['versions']}")
        for name, shards in made.items():
            print(f"clipkit's fast path against its exact one, photos {name}: {agreement(shards)}")


if __name__ == "__main__":
    main()
