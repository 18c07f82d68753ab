"""What only a GPU shows of embedding and of indexes: images per second, seconds of a build with it and without.

    python tests/bench/gpu.py embed [--photos FOLDER] [--images N] [--model NAME]
    python tests/bench/gpu.py build [--rows N ...] [--kinds KIND ...]

`embed` runs `clipkit embed` on photos under so many names and on a quarter of them; what the difference takes is the
steady state. Beside it stands the loop that people write with open_clip: its own transform in a `DataLoader` with a
process per core, autocast to bfloat16, vectors to the CPU, timed in the same way. Both have one open_clip model with
random weights. `build` makes an index of made-up vectors (`vectors.py`) with the GPU and with the GPU hidden, each a
whole process. Training and the objectives on a GPU are measured by `train_speed.py` and `loss_memory.py`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from embed_speed import PHOTOS, photos_at, timed, towers_alone

ROOT = Path(__file__).parents[2]
OWN = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}


def plain_loop(model: Path, folders: list[Path], batch_size: int) -> list[float]:
    """Seconds that open_clip in a loop of one's own takes for the images of each folder."""
    import open_clip
    import torch
    from PIL import Image

    towers, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model}", device="cuda")
    towers.eval()

    class Photos(torch.utils.data.Dataset):
        def __init__(self, folder: Path):
            self.paths = sorted(folder.glob("*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, at: int) -> torch.Tensor:
            return transform(Image.open(self.paths[at]))

    spent = []
    for folder in folders:
        began = time.perf_counter()
        loader = torch.utils.data.DataLoader(Photos(folder), batch_size, num_workers=os.cpu_count() or 1)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            for pixels in loader:
                towers.encode_image(pixels.to("cuda"), normalize=True).half().cpu()
        spent.append(time.perf_counter() - began)
    return spent


def embed(args: argparse.Namespace) -> None:
    """Images per second, ours and the plain loop's."""
    import torch

    model = args.work / args.model
    if not model.is_dir():
        make = (
            "from clipkit.models import create_model; import sys, pathlib, torch; torch.manual_seed(0); "
            "create_model('open_clip:' + sys.argv[2]).save(pathlib.Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", make, str(model), args.model], env=OWN, check=True)
    few, many = args.work / "few", args.work / "many"
    for folder, count in ((few, args.images // 4), (many, args.images)):
        photos_at(folder, args.photos, count, args.megapixels)
    if args.plain:
        print(json.dumps(plain_loop(model, [few, few, many], args.batch_size)[1:]))
        return
    print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}; {args.model}")
    alone = [towers_alone(model, args.batch_size, compiled) for compiled in (False, True)[: 1 + args.compile]]
    print(f"the tower alone (then compiled): {', '.join(f'{speed:,.0f}' for speed in alone)} images/s\n")
    print("| program | whole process s | steady state images/s | ratio |\n|---|---:|---:|---:|", flush=True)
    again = [sys.executable, __file__, "embed", "--plain", "--work", args.work, "--model", args.model]
    again += ["--batch-size", args.batch_size, "--images", args.images]
    done = subprocess.run([str(part) for part in again], env=OWN, check=True, capture_output=True, text=True)
    spent = json.loads(done.stdout.splitlines()[-1])
    base = (args.images - args.images // 4) / (spent[1] - spent[0])
    print(f"| open_clip in a loop | | {base:,.0f} | 1.00 |", flush=True)
    variants = [[], ["--decode", "gpu"], ["--decode", "exact"], *([["--compile"]] if args.compile else [])]
    for more in variants:
        spent = []
        for folder in (few, many):
            shutil.rmtree(args.work / "out", ignore_errors=True)
            call: list[Any] = [sys.executable, "-m", "clipkit", "embed", folder, "--model", model]
            flags = more if "--compile" in more else [*more, "--no-compile"]
            spent.append(timed([*call, "--out", args.work / "out", "--sides", "image", *flags], OWN))
        steady = (args.images - args.images // 4) / (spent[1] - spent[0])
        print(f"| clipkit {' '.join(more)} | {spent[1]:.1f} | {steady:,.0f} | {steady / base:.2f} |", flush=True)


def build(args: argparse.Namespace) -> None:
    """Seconds of a build with the GPU and without it."""
    import faiss
    from vectors import write_embeddings

    print(f"{faiss.get_num_gpus()} GPU, {os.cpu_count()} cores, faiss {faiss.__version__}; 512 dimensions\n")
    print(
        "| vectors | kind asked for | device | build s | kind taken, recall@10 |\n|---:|---|---|---:|---|", flush=True
    )
    for rows in args.rows:
        folder, out = args.work / f"emb-{rows}", args.work / "index"
        write_embeddings(folder, rows, 512, 2000)
        for kind in args.kinds:
            for device, environ in (("GPU", OWN), ("CPU", {**OWN, "CUDA_VISIBLE_DEVICES": ""})):
                flags = [] if kind == "measured" else ["--kind", kind]
                call = [sys.executable, "-m", "clipkit", "build", folder, "--out", out, "--overwrite", *flags]
                took = timed(call, environ)
                chosen = json.loads((out / "manifest.json").read_text())["chosen"]["image"]
                told = f"{chosen['kind']}, recall {chosen['recall']:.3f}"
                print(f"| {rows:,} | {kind} | {device} | {took:.1f} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["embed", "build"])
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "clipkit-bench" / "gpu")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="JPEGs of about 500 x 375")
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--megapixels", type=float, help="blow the photos up")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=512, help="of the plain loop and the tower alone")
    parser.add_argument("--rows", nargs="*", type=int, default=[1_000_000, 3_000_000])
    parser.add_argument("--kinds", nargs="*", default=["IVF-PQ", "measured"], help="measured: the choice among all")
    parser.add_argument("--compile", action="store_true", help="measure the compiled tower too")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"embed": embed, "build": build}[args.what](args)


if __name__ == "__main__":
    main()
