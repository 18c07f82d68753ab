"""Speed of whole training steps, clipkit's beside open_clip's own trainer, from the same shards.

    python tests/bench/train_speed.py [--captions LIST] [--steps N] [--rounds N] [--models NAME ...] [--only PATTERN]

open_clip gets an environment of its own (`rival`) and is run through `open_clip_train.main`. Both read, decode, crop,
train and log; same architecture, batch, learning rate, warmup, decay and clipping. Every run is a fresh process, the
rows take turns, and the order is turned round after each round. In both programs a hook on the optimizer's step looks
at the clock and at the CPU time of the process and its loader workers; a speed is that of all steps after the first
third. What is waited for data is the programs' own account. A run waits until the machine is idle and is done again
where others took more than a twentieth of it. open_clip runs with so many and so many loader workers in the first round
and keeps the faster; clipkit runs with its defaults. A figure is the median over the rounds, a ratio the median of the
rounds' ratios to open_clip with amp_bf16; its default, `amp`, is fp16, which is measured on GPUs only: a CPU without
fp16 instructions takes a minute for a step.

On a CPU the model is a small pair of 14 M parameters at 64 px. On a GPU they are ViT-B-32 and ViT-B-16 at 224 px, and
the share of the device's peak that the model's own operations reach is stated too (three times those of the forward
pass, which `torch.utils.flop_counter` counts; the peak is an H200's for dense bf16 unless --peak says otherwise).
"""

import argparse
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rival import environment

PAIR = {
    "embed_dim": 192,
    "vision_cfg": {"layers": 6, "width": 192, "patch_size": 8, "image_size": 64},
    "text_cfg": {"context_length": 32, "width": 192, "heads": 3, "layers": 4},
}
MODELS = {"cpu": {"pair": 128}, "cuda": {"ViT-B-32": 1024, "ViT-B-16": 512}}  # with their batch sizes
# (program, precision, compiled); all ratios are to the first.
ROWS = [
    ("open_clip", "amp_bf16", False),
    ("open_clip", "fp32", False),
    ("open_clip", "pure_bf16", False),
    ("clipkit", "fp32", False),
    ("clipkit", "amp_bf16", False),
    ("clipkit", "bf16", False),
]
MORE = {
    "cpu": [],
    "cuda": [
        ("open_clip", "amp", False),
        ("open_clip", "amp_bf16", True),
        ("open_clip", "pure_bf16", True),
        ("clipkit", "bf16", True),
    ],
}
WORKERS = {"cpu": (1, 2), "cuda": (8, 14)}
RATE = {"lr": 1e-3, "warmup": 10, "weight_decay": 0.1, "beta2": 0.98, "eps": 1e-6, "clip": 1.0}
SHARDS = 16
TRIES = 4  # of a run that others disturbed
EVERY = 5  # steps a report
LINE = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)")
LIBRARIES = ("open_clip_torch", "torch", "torchvision", "webdataset")

Row = tuple[str, str, bool]


def make_shards(captions: Path, out: Path, least: int) -> None:
    """Shards of a list's images, or of drawn pictures where there is no such list.

    Each holds so many samples at least, some of them again under another name: of a worker whose shards do not fill a
    batch open_clip waits for one without end.
    """
    import numpy as np

    from clipkit.data import COLOURS, SHAPES, PackOptions, caption, draw, pack, random_scene
    from clipkit.data.sources import open_source

    if not captions.is_file():
        print(f"{captions} is not there; pictures are drawn in its place", file=sys.stderr)
        captions, rng = out.with_name("drawn") / "list.tsv", np.random.default_rng(0)
        captions.parent.mkdir()
        rows = ["path\tcaption\n"]
        for number in range(4000):
            scene = random_scene(rng, [(colour, shape) for colour in COLOURS for shape in SHAPES])
            draw(scene, rng, 128).save(captions.parent / f"{number}.jpg", quality=90)
            rows.append(f"{number}.jpg\t{caption(scene, rng)}\n")
        captions.write_text("".join(rows), encoding="utf-8")
    packed = out.with_name("packed")
    pack(open_source(captions), packed, PackOptions(shards=8))
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for shard in sorted(packed.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                data = tar.extractfile(member)
                samples.setdefault(f"{shard.stem}/{stem}", []).append((extension, data.read() if data else b""))
    each = list(samples.values())
    out.mkdir()
    count = max(least, -(-len(each) // SHARDS))
    for number in range(SHARDS):
        with tarfile.open(out / f"{number:06d}.tar", "w") as tar:
            for at in range(count):
                for extension, data in each[(number * count + at) % len(each)]:
                    about = tarfile.TarInfo(f"{number:03d}{at:06d}.{extension}")
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))


def run_open_clip(task: dict[str, Any]) -> list[float]:
    """Train with open_clip's trainer, in its environment. Returns shares of the time that waited for data."""
    import logging

    import open_clip
    from open_clip_train.main import main as train

    folder, shards = Path(task["out"]), sorted(Path(task["shards"]).glob("*.tar"))
    if task["model"] == "pair":
        (folder / "pair.json").write_text(json.dumps(PAIR))
        open_clip.add_model_config(folder / "pair.json")
    train(
        [
            *("--train-data", f"{task['shards']}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"),
            *("--dataset-type", "webdataset", "--train-num-samples", str(task["steps"] * task["batch"])),
            *("--model", task["model"], "--batch-size", str(task["batch"]), "--workers", str(task["workers"])),
            *("--precision", task["precision"], "--device", task["device"], "--epochs", "1", "--save-frequency", "0"),
            *("--lr", str(RATE["lr"]), "--warmup", str(RATE["warmup"]), "--wd", str(RATE["weight_decay"])),
            *("--beta2", str(RATE["beta2"]), "--eps", str(RATE["eps"]), "--grad-clip-norm", str(RATE["clip"])),
            *("--log-every-n-steps", str(EVERY), "--logs", str(folder), "--name", "log"),
            *(["--torchcompile"] if task["compile"] else []),
        ]
    )
    logging.shutdown()
    found = [LINE.search(line) for line in (folder / "log" / "out.log").read_text().splitlines()]
    return [float(match[1]) / float(match[2]) for match in found if match]


def run_clipkit(task: dict[str, Any]) -> list[float]:
    """The same with `clipkit train`, in this environment."""
    import yaml

    from clipkit.cli import run_job

    folder = Path(task["out"])
    optim = {"lr": RATE["lr"], "warmup_steps": RATE["warmup"], "weight_decay": RATE["weight_decay"]}
    optim |= {"betas": [0.9, RATE["beta2"]], "eps": RATE["eps"], "clip_grad_norm": RATE["clip"]}
    recipe = {
        "model": PAIR if task["model"] == "pair" else f"open_clip:{task['model']}",
        "data": {"train": task["shards"], "augment": {"scale": [0.9, 1.0]}},  # as open_clip crops
        "batch_size": task["batch"],
        "steps": task["steps"],
        "precision": task["precision"],
        "compile": task["compile"],
        "optim": optim,
        "log": {"every_steps": EVERY},
        "checkpoint": {"every_steps": None},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if run_job("train", [str(folder / "recipe.yaml"), "--out", str(folder / "run")]):
        raise SystemExit("clipkit train failed")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["data_wait"] for line in lines if "data_wait" in line]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One training run in this process: samples per second and CPU second, share that waited for data, peak GiB."""
    import psutil
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    moments: list[tuple[float, float, float]] = []

    def look(*_: Any) -> None:
        own = psutil.Process()
        times = [process.cpu_times() for process in [own, *own.children(recursive=True)]]
        machine = psutil.cpu_times()
        busy = sum(machine[:8]) - machine.idle - getattr(machine, "iowait", 0.0)
        moments.append((time.perf_counter(), sum(each.user + each.system for each in times), busy))

    register_optimizer_step_post_hook(look)
    shares = run_open_clip(task) if task["program"] == "open_clip" else run_clipkit(task)
    first, last = len(moments) // 3, len(moments) - 1  # open_clip rounds its steps up to a multiple of its workers
    samples = (last - first) * task["batch"]
    wall, own, busy = (after - before for before, after in zip(moments[first], moments[last], strict=True))
    gpu = torch.cuda.is_available()
    return {
        "speed": samples / wall,
        "per_cpu": samples / own,
        "others": max(0.0, busy - own) / (wall * (os.cpu_count() or 1)),
        "waited": median(shares[len(shares) // 3 :]),
        "memory": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
        "device": torch.cuda.get_device_name() if gpu else f"{cores()} cores of {cpu_name()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """What the processor calls itself."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.is_file() else None
    return found[1] if found else platform.machine()


def in_process(task: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process of the right environment, when the machine is idle; again where others disturbed."""
    import psutil

    found: dict[str, Any] = {"others": 2.0}
    for _ in range(TRIES):
        for _ in range(100):
            if psutil.cpu_percent(3.0) < 100 * task["disturbed"]:
                break
        again = in_process_once(task)
        found = again if again["others"] < found["others"] else found
        if found["others"] < task["disturbed"]:
            break
        print(f"others took {again['others']:.0%} of the machine, {again['speed']:.1f}/s", file=sys.stderr, flush=True)
    return found


def in_process_once(task: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process of the right environment."""
    ours = task["program"] == "clipkit"
    python = Path(sys.executable) if ours else environment()
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path if ours else ""}
    with tempfile.TemporaryDirectory() as out:
        command = [str(python), __file__, "--task", json.dumps({**task, "out": out})]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def operations(name: str) -> float:
    """Floating point operations of a training step per sample."""
    import torch
    from PIL import Image
    from torch.utils.flop_counter import FlopCounterMode

    from clipkit.models import ModelConfig, create_model

    model = create_model(ModelConfig.model_validate(PAIR) if name == "pair" else f"open_clip:{name}").eval()
    pixels = torch.from_numpy(model.load_image(Image.new("RGB", (8, 8))))[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, model.tokenize([""]))
    return 3.0 * counter.get_total_flops()


def rounds_of(task: dict[str, Any], rows: list[Row], rounds: int) -> dict[Row, list[dict[str, Any]]]:
    """Every row, round after round, each round in the other direction."""
    found: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
    workers: dict[Row, int] = {}
    for number in range(rounds):
        for row in rows if number % 2 == 0 else rows[::-1]:
            program, precision, compiled = row
            this = {**task, "program": program, "precision": precision, "compile": compiled}
            choices = (0,) if program == "clipkit" else task["tried"]
            tried = {n: in_process({**this, "workers": n}) for n in ([workers[row]] if row in workers else choices)}
            workers[row] = max(tried, key=lambda n: tried[n]["speed"])
            found[row].append(tried[workers[row]] | {"workers": workers[row]})
            print(
                f"round {number + 1}: {row} {found[row][-1]['speed']:.1f}/s, {found[row][-1]['per_cpu']:.1f}/CPU s",
                file=sys.stderr,
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[3] / "shared" / "data" / "flickr8k" / "train.tsv"
    parser.add_argument("--captions", type=Path, default=default, help="a list of images with captions")
    parser.add_argument("--steps", type=int, default=45, help="of each run; the first third warms up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", help="some of the device's [default: all]")
    parser.add_argument("--only", default="", help="a pattern for rows, such as 'clipkit|open_clip amp_bf16$'")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOPS of the GPU")
    parser.add_argument("--workers", nargs="*", type=int, help="open_clip's, of which the faster are kept")
    parser.add_argument("--disturbed", type=float, default=0.05, help="share of the machine that others may take")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print("\n" + json.dumps(measure(json.loads(args.task))), flush=True)
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = {(*row[:2], "compiled") if row[2] else row[:2]: row for row in [*ROWS, *MORE[device]]}
    rows = [row for name, row in named.items() if re.search(args.only, " ".join(name))]
    print("| model | program | precision | samples/s | ratio | per CPU s | ratio | waiting | GiB | of peak |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        make_shards(args.captions, shards, max(MODELS[device].values()))
        for model, batch in MODELS[device].items():
            if args.models and model not in args.models:
                continue
            task = {"model": model, "batch": batch, "device": device, "shards": str(shards), "steps": args.steps}
            task |= {"disturbed": args.disturbed, "tried": args.workers or WORKERS[device]}
            found = rounds_of(task, rows, args.rounds)
            for row, runs in found.items():
                speed, per_cpu = (median(run[key] for run in runs) for key in ("speed", "per_cpu"))
                ratio, per_cpu_ratio = (
                    median(a[key] / b[key] for a, b in zip(runs, found[rows[0]], strict=True))
                    for key in ("speed", "per_cpu")
                )
                share = f"{speed * operations(model) / (args.peak * 1e12):.3f}" if device == "cuda" else ""
                memory = f"{max(run['memory'] for run in runs):.1f}" if device == "cuda" else ""
                waited = median(run["waited"] for run in runs)
                named = f"{row[1]}{', compiled' if row[2] else ''}"
                more = f" ({runs[-1]['workers']} workers)" if row[0] == "open_clip" else ""
                print(
                    f"| {model}, {batch} | {row[0]}{more} | {named} | {speed:.1f} | {ratio:.2f} "
                    f"| {per_cpu:.1f} | {per_cpu_ratio:.2f} | {waited:.3f} | {memory} | {share} |"
                )
    for row in {row[0]: row for row in rows}.values():
        print(f"\n{row[0]} ran on {found[row][0]['device']} with {found[row][0]['versions']}")


if __name__ == "__main__":
    main()
