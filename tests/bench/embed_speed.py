"""Embedding speed, clipkit's beside clip-retrieval's: one Hugging Face CLIP ViT-B/32, the same JPEGs, whole processes.

    python tests/bench/embed_speed.py [--photos FOLDER] [--rounds N] [--images N] [--large N]

clip-retrieval gets an environment of its own (`rival`), in which the model (random weights) is made and saved; both
load that folder. The photos, under as many names as there are to be images, are read from the disk as they are and at
12 megapixels. A run is a whole process, `clip-retrieval inference` or `clipkit embed`, on so many images and on twice
as many: what the difference takes is the steady state. The programs take turns; figures are medians over the rounds.
clip-retrieval runs with its defaults and with a batch of 64 and two workers once, and keeps the faster.

Then: the share of clipkit's time that the towers take (batches of pixels that are there already, alone), and the
cosine of its vectors (bf16 where the device is fast at that, large JPEGs decoded to less) to those of fp32 and exact
pixels, and to clip-retrieval's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
VARIANTS = ([], ["--batch_size", "64", "--num_prepro_workers", "2"])


def model_at(folder: Path, python: Path) -> None:
    """A ViT-B/32 with random weights and the real tokenizer, in Hugging Face's form, made by a rival's transformers."""
    if (folder / "model.safetensors").is_file():
        return
    import gzip

    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(line.split()) for line in lines)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    alone = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(python), __file__, "--make-model", str(folder)], env=alone, check=True)


def make_model(folder: Path) -> None:
    """The rest of it, in the rival's environment."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    config = CLIPConfig(projection_dim=512, vision_config={"patch_size": 32, "image_size": 224})
    CLIPModel(config).save_pretrained(folder)


def photos_at(folder: Path, photos: Path, count: int, megapixels: float | None) -> None:
    """So many JPEGs in a folder: the photos, each under several names, or blown up."""
    from PIL import Image

    done = folder / ".complete"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sources = sorted(photos.glob("*.jpg"))
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if number >= len(sources):
            os.link(folder / f"{number % len(sources):05d}.jpg", path)
        elif megapixels is None:
            shutil.copyfile(sources[number], path)
        else:
            image = Image.open(sources[number]).convert("RGB")
            scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
            size = round(image.width * scale), round(image.height * scale)
            image.resize(size, Image.Resampling.LANCZOS).save(path, quality=90)
    done.touch()


def timed(command: list[Any], environ: dict[str, str]) -> float:
    """Seconds that a whole process takes."""
    began = time.perf_counter()
    done = subprocess.run([str(part) for part in command], env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def towers_alone(model: Path, batch_size: int, compile: bool) -> float:
    """Images per second of the image tower, of pixels that are there already."""
    import torch

    from clipkit.core import keep_freed_memory, pick_device
    from clipkit.models import cast_for_inference, compiled_image_tower, load_model

    keep_freed_memory()
    towers = cast_for_inference(load_model(model, pick_device()), "auto")
    pixels = torch.randint(256, (batch_size, 3, 224, 224), dtype=torch.uint8)
    spent = []
    encode = compiled_image_tower(towers, batch_size) if compile else towers.encode_image
    with torch.inference_mode():
        for _ in range(20):
            began = time.perf_counter()
            encode(pixels.to(towers.device)).cpu()
            spent.append(time.perf_counter() - began)
    return batch_size / median(spent[4:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="JPEGs of about 500 x 375")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "clipkit-bench" / "embed")
    parser.add_argument("--images", type=int, default=1000, help="as they are; 0 for none")
    parser.add_argument("--large", type=int, default=200, help="images of 12 megapixels; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make_model:
        make_model(args.make_model)
        return
    from rival import environment

    python = environment("clip_retrieval")
    alone = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    own = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    model = args.work / "model"
    model_at(model, python)
    outputs = {side: args.work / f"out-{side}" for side in ("clip-retrieval", "clipkit", "compiled", "exact")}

    def run(side: str, folder: Path, more: list[str]) -> float:
        shutil.rmtree(outputs[side], ignore_errors=True)
        if side == "clip-retrieval":
            command = [python.with_name("clip-retrieval"), "inference", "--input_dataset", folder]
            command += ["--output_folder", outputs[side], "--clip_model", f"hf_clip:{model}", "--enable_text", "False"]
            return timed([*command, *more], alone)
        command = [sys.executable, "-m", "clipkit", "embed", folder, "--model", model, "--out", outputs[side]]
        return timed([*command, "--sides", "image", *more], own)

    def vectors(side: str) -> np.ndarray:
        parts = sorted((outputs[side] / "img_emb").glob("*.npy"))
        return np.concatenate([np.load(part) for part in parts]).astype(np.float32)

    alone_at = {side: towers_alone(model, 32, side == "compiled") for side in ("clipkit", "compiled")}
    print("the tower alone: {clipkit:.1f} images/s, compiled {compiled:.1f}\n".format(**alone_at), flush=True)
    print("| images | program | whole process s | ratio | steady state images/s | ratio | towers' share |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    notes = []
    for name, count, megapixels in (("as they are", args.images, None), ("12 megapixels", args.large, 12.0)):
        if not count:
            continue
        few, many = (args.work / f"{name.replace(' ', '-')}-{n}" for n in (count, 2 * count))
        photos_at(few, args.photos, count, megapixels)
        photos_at(many, args.photos, 2 * count, megapixels)
        variant = min(VARIANTS, key=lambda more: run("clip-retrieval", few, more))
        flags = {"clip-retrieval": variant, "clipkit": ["--no-compile"], "compiled": ["--compile"]}
        spent: dict[str, list[tuple[float, float]]] = {side: [] for side in flags}
        for number in range(args.rounds):
            for side in sorted(flags, reverse=bool(number % 2)):
                spent[side].append((run(side, many, flags[side]), run(side, few, flags[side])))
        whole = {side: median(short for _, short in pairs) for side, pairs in spent.items()}
        steady = {side: median(count / (long - short) for long, short in pairs) for side, pairs in spent.items()}
        for side, name_ in (("clip-retrieval",) * 2, ("clipkit",) * 2, ("compiled", "clipkit --compile")):
            faster = whole["clip-retrieval"] / whole[side], steady[side] / steady["clip-retrieval"]
            share = f"{steady[side] / alone_at[side]:.0%}" if side in alone_at else ""
            print(
                f"| {count} {name} | {name_} | {whole[side]:.1f} | {faster[0]:.2f} | {steady[side]:.1f} | "
                f"{faster[1]:.2f} | {share} |",
                flush=True,
            )
        run("exact", few, ["--precision", "fp32", "--decode", "exact"])
        ours = vectors("clipkit")
        for other in ("exact", "clip-retrieval"):
            cosines = (ours * vectors(other)).sum(axis=1)
            told = {"exact": "fp32 and exact pixels", "clip-retrieval": "clip-retrieval's"}[other]
            notes.append(f"{name}: cosine to {told}: median {np.median(cosines):.6f}, least {cosines.min():.6f}")
        options = " ".join(variant) or "its defaults"
        notes.append(f"{name}: clip-retrieval ran with {options}")
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
