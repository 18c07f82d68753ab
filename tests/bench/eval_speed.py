"""Evaluation speed, clipkit's beside CLIP_benchmark's and the Hugging Face zero-shot pipeline's: whole processes.

    python tests/bench/eval_speed.py [--images N] [--retrieval N] [--rounds N]

Two tasks on the same files: zero-shot of 100 classes by 10 templates over 200 photos, and retrieval on 1,000 photos
with 5 captions each, both as datasets in CLIP_benchmark's layout (its own reader reads them there). One ViT-B/32 with
random weights for it and clipkit, in open_clip's form; another in Hugging Face's for the pipeline and clipkit. Each
rival stands in an environment of its own. The pipeline takes one template, not ten, and has no retrieval. clipkit runs
twice: with an empty cache, and again; the others compute everything every time. Programs take turns; the figures are
medians over rounds. CLIP_benchmark's results are compared with its mixed precision off; with it on, as is its default,
it is timed where the CPU has instructions for bfloat16.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
WORDS = ("dog", "beach", "child", "ball", "street", "snow", "bike", "water", "field", "crowd")
KINDS = ("small", "large", "red", "old", "wet", "bright", "distant", "blurred", "wooden", "plain")
CLASSES = [f"{kind} {word}" for kind in KINDS for word in WORDS]
TEMPLATES = [
    f"a {kind} of {{c}}."
    for kind in (
        "photo",
        "bad photo",
        "cropped photo",
        "drawing",
        "close-up",
        "picture",
        "view",
        "video",
        "scan",
        "print",
    )
]
PIPELINE = """
import json, sys
from pathlib import Path
from transformers import pipeline
model, photos, classes = sys.argv[1:]
names = json.loads(classes)
ask = pipeline("zero-shot-image-classification", model=model)
paths = sorted(str(path) for path in Path(photos).glob("*.jpg"))
found = ask(paths, candidate_labels=names, hypothesis_template="a photo of {}.", batch_size=8)
print(json.dumps([each[0]["label"] for each in found]))
"""


def write_shards(folder: Path, samples: list[dict[str, bytes]], count: int = 2) -> None:
    """Webdataset shards with `nshards.txt`; as many as CLIP_benchmark has workers, as each of them wants one."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, len(samples), count):
                for extension, data in samples[number].items():
                    about = tarfile.TarInfo(f"s{number:06d}.{extension}")
                    about.size = len(data)
                    tar.addfile(about, BytesIO(data))
    (folder / "nshards.txt").write_text(str(count))


def make_data(work: Path, images: int, pairs: int) -> None:
    """Both datasets, and the photos of the first as plain files."""
    if (work / "complete").is_file():
        return
    photos = sorted((DATA / "photos").glob("*.jpg"))
    (work / "photos").mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(images):
        data = photos[number % len(photos)].read_bytes()
        (work / "photos" / f"{number:04d}.jpg").write_bytes(data)
        samples.append({"jpg": data, "cls": str(number * 7 % len(CLASSES)).encode()})
    write_shards(work / "zeroshot" / "test", samples)
    (work / "zeroshot" / "classnames.txt").write_text("\n".join(CLASSES))
    (work / "zeroshot" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    captions: dict[str, list[str]] = {}
    with (DATA / "flickr8k" / "dev.tsv").open(encoding="utf-8") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            captions.setdefault(row["path"], []).append(row["caption"])
    chosen = list(captions.items())[:pairs]
    read = [((DATA / "flickr8k" / path).read_bytes(), "\n".join(said).encode()) for path, said in chosen]
    write_shards(work / "retrieval" / "test", [{"jpg": image, "txt": text} for image, text in read])
    (work / "retrieval" / "dataset_type.txt").write_text("retrieval")
    (work / "complete").touch()


def timed(command: list[Any], environ: dict[str, str]) -> tuple[float, str]:
    """Seconds that a whole process takes, and what it prints."""
    began = time.perf_counter()
    done = subprocess.run([str(part) for part in command], env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - began, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "clipkit-bench" / "eval")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--retrieval", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-pipeline", action="store_true")
    args = parser.parse_args()
    import torch
    from embed_speed import model_at
    from rival import environment

    from clipkit.core import fast_bf16

    # Mixed precision is bfloat16 on a CPU, which takes hours where there are no instructions for it.
    variants = [["--no_amp"], *([[]] if fast_bf16(torch.device("cpu")) else [])]
    work = args.work
    make_data(work, args.images, args.retrieval)
    own = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CLIPKIT_CACHE": str(work / "cache")}
    alone = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    model, other = work / "open_clip", work.parent / "embed" / "model"
    if not (model / "open_clip_config.json").is_file():
        make = (
            "from clipkit.models import create_model; import sys, pathlib, torch; torch.manual_seed(0); "
            "create_model('open_clip:ViT-B-32-quickgelu').save(pathlib.Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", make, str(model)], env=own, check=True)
    theirs = environment("clip_benchmark")
    if not args.no_pipeline:
        model_at(other, environment("hf_pipeline"))
    spent: dict[tuple[str, str], list[float]] = {}
    figures: dict[tuple[str, str], dict[str, float]] = {}

    def ours(task: str, *command: Any) -> None:
        for which in ("first", "second"):
            if which == "first":
                shutil.rmtree(work / "cache", ignore_errors=True)
            seconds, out = timed([sys.executable, "-m", "clipkit", *command, "--format", "json"], own)
            spent.setdefault((task, f"clipkit, {which} run"), []).append(seconds)
            if command[0] == "evaluate":
                figures[task, "clipkit"] = json.loads(out)

    def clip_benchmark(task: str, name: str, more: list[str]) -> None:
        result = work / "result.json"
        result.unlink(missing_ok=True)
        command = [
            theirs.with_name("clip_benchmark"),
            "eval",
            "--dataset",
            f"wds/{name}",
            "--dataset_root",
            work / name,
        ]
        command += ["--model", f"local-dir:{model}", "--pretrained", "", "--task", f"zeroshot_{task}"]
        command += ["--output", result, "--batch_size", "64", "--num_workers", "2", "--recall_k", "1", "5", "10", *more]
        told = "CLIP_benchmark" + (", fp32" if more else "")
        spent.setdefault((name, told), []).append(timed(command, alone)[0])
        figures[name, told] = json.loads(result.read_text())["metrics"]

    for _ in range(args.rounds):
        for name, task in (("zeroshot", "classification"), ("retrieval", "retrieval")):
            ours(name, "evaluate", name, work / name, "--model", model)
            for more in variants:
                clip_benchmark(task, name, more)
        if not args.no_pipeline:
            labels = ",".join(CLASSES)
            ours(
                "classify",
                "classify",
                work / "photos",
                "--labels",
                labels,
                "--model",
                other,
                "--prompts",
                "a photo of {}.",
            )
            script = [environment("hf_pipeline"), "-c", PIPELINE, other, work / "photos", json.dumps(CLASSES)]
            spent.setdefault(("classify", "Hugging Face pipeline"), []).append(timed(script, alone)[0])
    print("| task | program | seconds | ratio to clipkit's first run | to its second |\n|---|---|---:|---:|---:|")
    for (task, program), seconds in spent.items():
        base = [median(spent[task, f"clipkit, {which} run"]) for which in ("first", "second")]
        took = median(seconds)
        print(f"| {task} | {program} | {took:.1f} | {took / base[0]:.2f} | {took / base[1]:.1f} |")
    programs = ["CLIP_benchmark, fp32", *(["CLIP_benchmark"] if len(variants) > 1 else [])]
    print(f"\n| task | figure | clipkit | {' | '.join(programs)} |\n|---|---|---:|{'---:|' * len(programs)}")
    names = {
        "zeroshot_acc@1": "acc1",
        "zeroshot_acc@5": "acc5",
        "zeroshot_mean_per_class_recall": "mean_per_class_recall",
    }
    for task in ("zeroshot", "retrieval"):
        for name, value in figures[task, "clipkit"].items():
            key = names.get(name, name)
            if key in figures[task, programs[0]]:
                each = " | ".join(f"{figures[task, program][key]:.5f}" for program in programs)
                print(f"| {task} | {name} | {value:.5f} | {each} |")


if __name__ == "__main__":
    main()
