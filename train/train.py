"""Train an image and a text tower together on shards of captioned images.

The loop is a program: read it top to bottom, copy it, change it. What it reads is a recipe (`clipkit recipes`), what
it leaves is a run folder: config.yaml, metrics.jsonl, checkpoints/, ledger.jsonl where samples were unusable, and
model/ with the last weights and everything that is needed to use them.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job, recipes


@click.command(cls=Job)
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, such as optim.lr=1e-3.")
@click.option("--resume", is_flag=True, help="Go on where the run in OUT stands; start it where there is none.")
@click.option("--init-from", metavar="MODEL", help="Start a new run from another's weights.")
@click.option("--show-config", is_flag=True, help="Print the resolved settings and stop.")
@click.option("--overwrite", is_flag=True, help="Remove the run that stands in OUT first.")
def main(
    recipe: str,
    out: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    init_from: str | None,
    show_config: bool,
    overwrite: bool,
) -> int:
    """Train RECIPE (a name from `clipkit recipes`, or a YAML file) on shards.

    The shards are named by --set data.train=SHARDS; nothing else must be set. Run under torchrun or accelerate launch
    for several devices. On --resume the length, logging and checkpoint settings may change, other keys may not.
    """
    from clipkit.config import dump_yaml, load_config
    from clipkit.errors import ClipkitError, did_you_mean

    path = recipes().get(recipe, Path(recipe))
    if not path.is_file():
        known = recipes()
        raise ClipkitError(
            f"no recipe {recipe!r}{did_you_mean(recipe, known)}; there are {', '.join(known)}, or name a YAML file"
        )
    if init_from is not None:
        overrides = (*overrides, f"model={json.dumps(init_from)}")
    config = load_config(path, overrides)
    if show_config:
        click.echo(dump_yaml(config), nl=False)
        return 0
    if out is None:
        raise ClipkitError("name a folder for the run: --out RUN")
    if not config.data.parts:
        raise ClipkitError("the recipe names no training data; add --set data.train=SHARDS (made by clipkit pack)")
    return train(config, out, resume=resume, overwrite=overwrite)


def train(config: Any, out: Path, *, resume: bool, overwrite: bool) -> int:
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    from clipkit import checkpoint
    from clipkit.artifact import MODEL_FOLDER
    from clipkit.embed import fast_bf16
    from clipkit.errors import ClipkitError
    from clipkit.evaluation import evaluate_retrieval
    from clipkit.loader import Batches, describe, open_train_data, train_batches
    from clipkit.log import note, progress, warn
    from clipkit.loss import info_nce, sigmoid_loss
    from clipkit.optim import learning_rate, parameter_groups
    from clipkit.run import MetricsLog, Run, refuse_too_many
    from clipkit.sources import open_source
    from clipkit.towers import create_model, load_model, pick_device

    # accelerate joins the ranks of a CPU launch only when it is told that the CPU is meant.
    process = PartialState(cpu=pick_device().type == "cpu")
    if process.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise ClipkitError(f"accelerate joined {process.num_processes} of {os.environ['WORLD_SIZE']} processes")
    device = torch.device(process.device or "cpu")
    rank, world_size = process.process_index, process.num_processes
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_bf16(device))
    AcceleratorState._reset_state()  # a notebook may train twice, with another precision
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")

    # Everything that can be wrong with the input is found before the run folder is touched.
    run = Run(out, config, is_main=accelerator.is_main_process)
    run.check(resume=resume, overwrite=overwrite)
    excluded = run.excluded if resume else None
    data = open_train_data(config.data, config.seed, excluded=excluded, is_main=accelerator.is_main_process)
    identity = data.identity()
    steps = config.total_steps(data.size)
    held_out = config.validation.retrieval
    validation = None if held_out is None else open_source(held_out, captions_required=True)
    if resume and run.finished_steps >= steps:
        note(f"{out} is trained to step {run.finished_steps} already; a larger --set steps=N goes on")
        return 1 if run.left_out else 0

    # Where the weights come from: 1. the last checkpoint of this run, 2. a model named by `model`, 3. random.
    set_seed(config.seed)
    last = run.last_checkpoint() if resume else None
    model = load_model(last / MODEL_FOLDER) if last else create_model(config.model, config.preprocess)
    if config.loss.kind == "sigmoid" and model.logit_bias is None:
        raise ClipkitError("loss.kind=sigmoid needs a bias; set model.init_logit_bias=-10 (and init_logit_scale=2.3)")
    model.to(device).train()
    groups = parameter_groups(model.named_parameters(), config.optim.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True
    )
    state = (
        checkpoint.load_checkpoint(last, model, optimizer, rank)
        if last
        else {"step": 0, "samples": 0, "data": identity}
    )
    if state["data"] != identity:
        raise ClipkitError(
            f"data.train holds other samples than {out} was trained on, or mixes them otherwise; "
            "use --init-from to go on"
        )
    first = state["step"]
    accelerator.wait_for_everyone()  # every rank has looked at the folder before one changes it
    if accelerator.is_main_process:
        run.begin(resume=resume)
        if excluded is None:
            run.pin_plan(data.excluded, data.left_out)
        run.rewind(first)
    accelerator.wait_for_everyone()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if first == 0 and world_size > 1:
        set_seed(config.seed + rank)  # dropout differs between ranks; the weights are made already

    maker = Batches(data, model.preprocess, model.tokenizer, config.data, config.seed)
    batches = train_batches(
        maker,
        first_step=first,
        steps=steps,
        batch_size=config.batch_size,
        rank=rank,
        world_size=world_size,
        pin_memory=device.type == "cuda",
    )
    parameters = sum(p.numel() for p in model.parameters())
    note(f"{parameters / 1e6:.1f} M parameters, {accelerator.mixed_precision} on {world_size} x {device.type}")
    note(f"steps {first:,} to {steps:,} of {config.batch_size}: {describe(data, steps * config.batch_size)}")

    log = MetricsLog(run, is_main=accelerator.is_main_process)
    max_log_scale = torch.tensor(config.loss.max_logit_scale).log().item()
    began = ended = time.perf_counter()
    waited, reported, losses, bad = 0.0, first, math.nan, 0
    for step, batch in enumerate(progress(batches, "train", steps - first, "steps"), first):
        fetched = time.perf_counter()
        waited += fetched - ended
        schedule = {"peak": config.optim.lr, "warmup": config.optim.warmup_steps, "floor": config.optim.min_lr}
        rate = learning_rate(step, steps=steps, **schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate

        image, text, scale, bias = wrapped(maker.on_device(batch, device), batch["tokens"].to(device))
        ids = {}
        if config.loss.multi_positive:
            ids = {"image_ids": batch["image_ids"].to(device), "text_ids": batch["text_ids"].to(device)}
        loss = (
            info_nce(image, text, scale, **ids)
            if bias is None or config.loss.kind == "infonce"
            else (sigmoid_loss(image, text, scale, bias, **ids))
        )
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.optim.clip_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, max_log_scale)

        run.add_to_ledger(batch["left_out"])
        bad += len(batch["left_out"])
        done = step + 1
        state.update(step=done, samples=done * config.batch_size)
        last_step = done == steps
        saves = done % (config.checkpoint.every_steps or steps) == 0 or last_step
        reports = done % config.log.every_steps == 0 or last_step
        if saves or reports:
            # The .item() calls wait for the device; that is why they happen only here.
            figures = torch.tensor([loss.detach().item(), bad], device=device)
            losses, bad_of_rank = accelerator.reduce(figures, "mean").tolist()
            refuse_too_many(
                bad_of_rank * world_size, (done - first) * config.batch_size, config.data.max_bad_share, out
            )
            if not math.isfinite(losses):
                raise ClipkitError(
                    f"the loss is {losses} at step {done}; lower optim.lr, and look at {run.metrics_path}"
                )
        if reports:
            now = time.perf_counter()
            log.write(
                step=done,
                samples=state["samples"],
                loss=losses,
                lr=rate,
                grad_norm=norm.item() if norm is not None else 0.0,
                logit_scale=float(model.logit_scale.detach().exp()),
                samples_per_second=(done - reported) * config.batch_size / (now - began),
                data_wait=waited / (now - began),
                left_out=run.left_out,
            )
            began, waited, reported = now, 0.0, done
        if validation is not None and (last_step or done % (config.validation.every_steps or steps) == 0):
            before = time.perf_counter()
            if accelerator.is_main_process:
                found = evaluate_retrieval(model, validation)
                named = {f"val_{name}": value for name, value in found.figures.items()}
                log.write(step=done, samples=state["samples"], **named)
                if found.left_out:
                    warn(f"{len(found.left_out)} samples of {held_out} cannot be used and were left out")
            accelerator.wait_for_everyone()
            began += time.perf_counter() - before
        if saves:
            scratch = checkpoint.scratch_folder(out, done)
            if accelerator.is_main_process:
                checkpoint.save_shared(scratch, model, optimizer.optimizer, state)
            accelerator.wait_for_everyone()
            checkpoint.save_rank(scratch, rank)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                checkpoint.publish(scratch, config.checkpoint.keep)
            accelerator.wait_for_everyone()
        ended = time.perf_counter()

    if accelerator.is_main_process:
        manifest = run.finish(model, state)
        name = manifest["model"]["fingerprint"][:12]
        note(f"{out}: step {state['step']}, loss {run.last_loss():.3f}, model {name} in {out / 'model'}")
        note(f"next: clipkit embed FOLDER --model {out} --out emb/")
        if run.left_out:
            warn(f"{run.left_out:,} unusable samples were replaced, listed in {out / 'ledger.jsonl'}")
    accelerator.end_training()
    return 1 if run.left_out else 0


if __name__ == "__main__":
    main()
