"""What clipkit's recipes learn beside open_clip's trainer, in one run: the same samples, model, batch and length.

    python tests/bench/learn.py [--steps N] [--work DIR] [--data DIR] [--only NAME ...] [--table]

Two held-out retrieval tasks on real data: Flickr8k's dev photos by caption, and the emoji of a third vendor by name
after two other vendors taught. Both sides see as many samples of the same shards (rows in a random order, transparency
laid over white beforehand) and are evaluated by `clipkit evaluate retrieval`; open_clip's checkpoint becomes an
open_clip folder first. open_clip gets its own trainer in an environment of its own (see `loader.py`), its default
precision, our warmup, decay and colours, its own crop, and the best of three learning rates on seed 0; on Flickr8k
there is a second open_clip that reads every caption from a CSV list, which is the most its loaders can give.

A run that is done is not done again: results stand as JSON in the work folder. Every call prints the table of what
is there, as markdown.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipkit-bench"
SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3, 5e-4)
SHARDS = 8
BATCH, WARMUP, DECAY = 256, 50, 0.1
MODEL = {
    "embed_dim": 192,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 32, "image_size": 64},
    "text_cfg": {"context_length": 16, "width": 192, "heads": 3, "layers": 2},
}
LIBRARIES = ("torch", "open_clip_torch")
FIGURES = [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)]
RECIPES = {"flickr8k": "flickr8k", "emoji": "tiny"}
RIVALS = (("emoji", "shards"), ("flickr8k", "shards"), ("flickr8k", "csv, all captions"))
# What each part of our recipe earns: the same run without it.
COMMON = {
    "multi_positive off": ["loss.multi_positive=false"],
    "no augmentation": ["data.augment={}"],
    "AdamW in place of Muon": ["optim.kind=adamw"],
}
PARTS: dict[str, dict[str, list[str]]] = {
    "flickr8k": {
        "first caption only": ["data.caption=first"],
        "no average of the weights": ["optim.ema=null"],
        **COMMON,
    },
    "emoji": COMMON,
}


@dataclass(frozen=True)
class Job:
    """One training run and its evaluation."""

    task: str
    side: str
    variant: str
    seed: int
    steps: int
    settings: list[str] = field(default_factory=list, hash=False)

    def folder(self, work: Path) -> Path:
        name = f"{self.side}, {self.variant}, seed {self.seed}".replace(" ", "_")
        return work / f"runs-{self.steps}" / self.task / name


def flat_emoji(emoji: Path, out: Path) -> None:
    """The drawings over white: open_clip lays transparency over whatever colour it hides, which is not learning."""
    from clipkit.images import decode

    for path in sorted(emoji.glob("*/*.png")):
        made = out / path.relative_to(emoji)
        made.parent.mkdir(parents=True, exist_ok=True)
        decode(path.read_bytes()).save(made)


def prepare(data: Path, work: Path) -> None:
    """The lists, the shards and open_clip's CSV of each task."""
    for task in RECIPES:
        folder = work / "data" / task
        if (folder / "complete").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if task == "emoji":
            flat_emoji(data / "emoji", folder)
            header, *rows = (data / "emoji" / "emoji.tsv").read_text(encoding="utf-8").splitlines()
            vendor = header.split("\t").index("vendor")
            taught = [row for row in rows if row.split("\t")[vendor] != "fluentui"]
            asked = [row for row in rows if row.split("\t")[vendor] == "fluentui"]
        else:
            (folder / "images").unlink(missing_ok=True)
            (folder / "images").symlink_to((data / "flickr8k" / "images").resolve())
            header, *taught = (data / "flickr8k" / "train.tsv").read_text(encoding="utf-8").splitlines()
            asked = (data / "flickr8k" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
        rng = random.Random(0)
        by_image: dict[str, list[str]] = {}
        for row in taught:
            by_image.setdefault(row.partition("\t")[0], []).append(row)
        images = list(by_image.values())
        rng.shuffle(images)
        taught = [row for rows in images for row in rows]
        for name, rows in (("taught", taught), ("asked", asked)):
            (folder / f"{name}.tsv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
        clipkit("pack", folder / "taught.tsv", "--shards", SHARDS, "--out", folder / "shards", "--overwrite")
        (folder / "complete").touch()


def clipkit(*args: Any) -> str:
    """Run the command; its standard output."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "clipkit", *map(str, args)], env=environ, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"clipkit {args[0]} failed:\n{done.stderr}")
    return done.stdout


def open_clip_main(data: Path, csv: bool, rate: float, seed: int, steps: int, out: Path) -> None:
    """open_clip's trainer, then its checkpoint as an open_clip folder; runs in open_clip's environment."""
    import open_clip
    import torch
    from open_clip_train.main import main as train
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    warmup = min(WARMUP, steps // 5)  # as `clipkit.training.learning_rate` has it
    (out / "bench-tiny.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(out / "bench-tiny.json")
    listed = ["--train-data", out / "pairs.csv", "--dataset-type", "csv"]
    listed += ["--csv-separator", "\t", "--csv-img-key", "path", "--csv-caption-key", "caption"]
    packed = ["--train-data", f"{data / 'shards'}/{{000000..{SHARDS - 1:06d}}}.tar", "--dataset-type", "webdataset"]
    packed += ["--train-num-samples", BATCH * steps]
    if csv:
        # Whole copies of the list and a random rest, so that one epoch is the whole run.
        header, *rows = (data / "taught.tsv").read_text(encoding="utf-8").splitlines()
        copies, rest = divmod(BATCH * steps, len(rows))
        pairs = [f"{data}/{row}" for row in rows * copies + random.Random(seed).sample(rows, rest)]
        (out / "pairs.csv").write_text("\n".join([header, *pairs, ""]), encoding="utf-8")
    flags = [*(listed if csv else packed), "--model", "bench-tiny", "--device", "cpu", "--precision", "amp_bf16"]
    flags += ["--batch-size", BATCH, "--epochs", 1, "--warmup", warmup, "--lr", rate, "--wd", DECAY]
    flags += ["--aug-cfg", "scale=(0.9,1.0)", "color_jitter=(0.2,0.2,0.3,0.05)", "color_jitter_prob=1.0"]
    flags += ["gray_scale_prob=0.1", "--workers", 1, "--seed", seed, "--logs", out, "--name", "log"]
    train([str(flag) for flag in flags])
    # Written by this very process, a moment ago.
    state = torch.load(out / "log" / "checkpoints" / "epoch_1.pt", map_location="cpu", weights_only=True)
    (out / "model").mkdir(exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in state["state_dict"].items()}
    save_file(weights, out / "model" / "open_clip_model.safetensors")
    (out / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}))


def versions(python: Path) -> dict[str, str]:
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {LIBRARIES}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def perform(job: Job, work: Path) -> dict[str, Any]:
    """Train, evaluate, keep the result."""
    out, data = job.folder(work), work / "data" / job.task
    done = out / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    print(f"{job.task}: {job.side}, {job.variant}, seed {job.seed}", file=sys.stderr, flush=True)
    python = Path(sys.executable)
    if job.side == "clipkit":
        recipe = RECIPES[job.task]
        flags = [flag for each in job.settings for flag in ("--set", each)]
        fixed = ["--set", f"data.train={data / 'shards'}", "--set", f"seed={job.seed}", "--set", f"steps={job.steps}"]
        clipkit("train", recipe, *fixed, *flags, "--out", out / "run", "--overwrite")
        model = out / "run"
    else:
        python = CACHE / "open_clip" / "bin" / "python"
        out.mkdir(parents=True, exist_ok=True)
        (out / "log" / "out.log").unlink(missing_ok=True)
        call = {"data": str(data), "csv": "csv" in job.variant, "seed": job.seed, "steps": job.steps, "out": str(out)}
        call["rate"] = float(job.settings[0])
        environ = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        with (out / "output.log").open("w") as log:
            command = [python, __file__, "--rival", json.dumps(call)]
            if subprocess.run(command, env=environ, stdout=log, stderr=log).returncode:
                raise SystemExit(f"open_clip failed; see {log.name}")
        model = out / "model"
    told = json.loads(clipkit("evaluate", "retrieval", data / "asked.tsv", "--model", model, "--format", "json"))
    result = {name: getattr(job, name) for name in ("task", "side", "variant", "seed", "steps", "settings")}
    result |= {"figures": {name: told[name] for name in FIGURES}, "versions": versions(python), "cpu": cpu()}
    result |= {"images": told["images"], "captions": told["captions"]}
    done.write_text(json.dumps(result, indent=1))
    return result


def cpu() -> str:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{os.cpu_count()} cores of {name} ({torch.backends.cpu.get_cpu_capability()})"


def score(result: dict[str, Any]) -> float:
    """The mean of the six recalls."""
    return mean(result["figures"].values())


def jobs(work: Path, steps: int) -> Iterator[Job]:
    """What is to be run, in order: the later ones look at the results of the earlier."""
    for task, kind in RIVALS:
        tried = [Job(task, "open_clip", f"{kind}, lr {rate:g}", 0, steps, [str(rate)]) for rate in RATES]
        yield from tried
        best = max(tried, key=lambda job: score(perform(job, work)))
        yield from (Job(task, "open_clip", best.variant, seed, steps, best.settings) for seed in SEEDS[1:])
    for task in RECIPES:
        yield from (Job(task, "clipkit", "recipe", seed, steps) for seed in SEEDS)
    for task, parts in PARTS.items():
        yield from (Job(task, "clipkit", name, 0, steps, settings) for name, settings in parts.items())


def table(work: Path, steps: int) -> str:
    """All results that are there, as markdown, each figure in per cent with the spread (standard deviation)."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob(f"runs-{steps}/*/*/result.json"))]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in found:
        groups.setdefault((each["task"], each["side"], each["variant"]), []).append(each)
    heads = [f"{side} R@{k}" for side in ("text→image", "image→text") for k in (1, 5, 10)]
    lines = [f"| data | trainer | variant | seeds | {' | '.join(heads)} | mean |", "|---|---|---|---|" + "---:|" * 7]
    for (task, side, variant), results in sorted(groups.items()):
        columns = [[100 * each["figures"][name] for each in results] for name in FIGURES]
        columns.append([100 * score(each) for each in results])
        cells = [f"{mean(c):.1f}" + (f" ± {stdev(c):.1f}" if len(c) > 1 else "") for c in columns]
        lines.append(f"| {task} | {side} | {variant} | {len(results)} | {' | '.join(cells)} |")
    made = sorted({f"{each['cpu']}; {', '.join(f'{n} {v}' for n, v in each['versions'].items())}" for each in found})
    return "\n".join([*lines, "", f"Batch {BATCH}, {steps} steps. {' / '.join(made)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of every run, of 256 samples each")
    parser.add_argument("--work", type=Path, default=CACHE / "learn", help="where runs and results are kept")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="holds flickr8k/ and emoji/")
    parser.add_argument("--only", nargs="*", default=[], help="run only those whose name contains one of these")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rival:
        call = json.loads(args.rival)
        open_clip_main(**{**call, "data": Path(call["data"]), "out": Path(call["out"])})
        return
    work = args.work.resolve()
    if not args.table:
        prepare(args.data, work)
        for job in jobs(work, args.steps):
            name = "/".join(job.folder(work).parts[-2:])
            if not args.only or any(each in name for each in args.only):
                perform(job, work)
    print(table(work, args.steps))


if __name__ == "__main__":
    main()
