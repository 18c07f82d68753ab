"""Time and peak memory of the objectives, forward and backward: plain, tiled, and open_clip's, in one run.

    python tests/bench/loss_memory.py [--objective infonce|sigmoid] [--rounds N] [--sizes N,N,...]

The forms take turns, on a CPU each in a fresh process with as many threads as cores: a first run that is not timed,
then three.
Time is the median over all runs, the ratio to the plain form the median of the rounds' ratios. On a CPU the ratio is of
the CPU time, with threads that sleep while they wait, since others may be using the machine; on a GPU of the wall time.
Memory is what one forward and backward pass needs beside the features: the peak of the resident set less the resident
set before, after everything was run once at a small size; on a GPU the peak that torch allocated less what was
allocated before.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from clipkit.training.loss import info_nce, sigmoid_loss, tiled_info_nce, tiled_sigmoid_loss

DIM = 512
TIMED = 3
GPU = torch.cuda.is_available()
SIZES = [2**power for power in range(10, 18 if GPU else 15)]
FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "infonce": {
        "plain": lambda image, text, scale, bias, ids: info_nce(image, text, scale),
        "tiled": lambda image, text, scale, bias, ids: tiled_info_nce(image, text, scale),
        "tiled, with ids": lambda image, text, scale, bias, ids: tiled_info_nce(image, text, scale, text_ids=ids),
        "open_clip": lambda image, text, scale, bias, ids: ClipLoss()(image, text, scale),
    },
    "sigmoid": {
        "plain": lambda image, text, scale, bias, ids: sigmoid_loss(image, text, scale, bias),
        "tiled": lambda image, text, scale, bias, ids: tiled_sigmoid_loss(image, text, scale, bias),
        "open_clip": lambda image, text, scale, bias, ids: SigLipLoss()(image, text, scale, bias),
    },
}


def inputs(count: int, device: str) -> list[Tensor]:
    """Features that tell pairs apart somewhat, the scale, the bias, and ids of which each occurs about twice."""
    torch.manual_seed(0)
    image = torch.randn(count, DIM)
    text = image + 4 * torch.randn(count, DIM)
    numbers = [F.normalize(image), F.normalize(text), torch.tensor(50.0), torch.tensor(-10.0)]
    return [*(t.to(device).requires_grad_() for t in numbers), torch.randint(max(1, count // 2), (count,)).to(device)]


def step(form: Callable[..., Tensor], given: list[Tensor]) -> tuple[float, float]:
    """Seconds of one forward and backward pass, by the clock and of the CPU."""
    for tensor in given:
        tensor.grad = None
    if GPU:
        torch.cuda.synchronize()
    began, worked = time.perf_counter(), time.process_time()
    form(*given).backward()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - worked


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(form: Callable[..., Tensor], count: int) -> dict[str, object]:
    """Seconds of each run by both clocks, and bytes."""
    device = "cuda" if GPU else "cpu"
    step(form, inputs(64, device))
    given = inputs(count, device)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = resident("VmRSS")
    step(form, given)
    seconds, cpu_seconds = zip(*(step(form, given) for _ in range(TIMED)), strict=True)
    peak = torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": peak - before}


def turn(objective: str, form: str, count: int) -> dict[str, list[float]] | None:
    """One measurement, on a CPU in a process of its own; None where memory does not suffice."""
    if GPU:  # torch counts what it gives out there, whatever was before
        try:
            return json.loads(json.dumps(measure(FORMS[objective][form], count)))
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--objective", objective, "--form", form, "--sizes", str(count)]
    done = subprocess.run(command, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, capture_output=True, text=True)
    if done.returncode:
        if done.returncode == -9 or "out of memory" in done.stderr or "can't allocate memory" in done.stderr:
            return None
        raise SystemExit(f"{form} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def hardware() -> str:
    """What this ran on, with versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch"))
    if GPU:
        return f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{torch.get_num_threads()} threads of {name}, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=list(FORMS), default="infonce")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=SIZES)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    args = parser.parse_args()
    forms = FORMS[args.objective]
    if args.form:
        print(json.dumps(measure(forms[args.form], args.sizes[0])))
        return
    print(f"{args.objective}, D={DIM}, float32; {hardware()}; {args.rounds} rounds of {TIMED} runs.\n")
    print("| pairs | form | peak MiB | seconds | CPU seconds | ratio |\n|---:|---|---:|---:|---:|---:|")
    clock = "seconds" if GPU else "cpu_seconds"
    for count in args.sizes:
        orders = [list(forms), list(forms)[::-1]] * args.rounds
        rounds = [{form: turn(args.objective, form, count) for form in order} for order in orders[: args.rounds]]
        for form in forms:
            found = [each for each in rounds if each[form]]
            if not found:
                print(f"| {count:,} | {form} | does not fit | | | |", flush=True)
                continue
            mib = median(each[form]["bytes"] for each in found) / 2**20
            seconds, cpu = (
                median(run for each in found for run in each[form][of]) for of in ("seconds", "cpu_seconds")
            )
            ratios = [median(e[form][clock]) / median(e["plain"][clock]) for e in found if e["plain"]]
            ratio = f"{median(ratios):.2f}" if ratios else ""
            print(f"| {count:,} | {form} | {mib:,.0f} | {seconds:,.3f} | {cpu:,.3f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
