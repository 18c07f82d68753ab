"""Train an image and a text tower together on shards of captioned images.

The loop is a program: read it top to bottom, copy it, change it. What it reads is a recipe (`clipkit recipes`), what
it leaves is a run folder: config.yaml, metrics.jsonl, checkpoints/, ledger.jsonl where samples were unusable,
nonfinite.jsonl where steps were, and model/ with the last weights and everything that is needed to use them.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit.cli import Job, find_recipe
from clipkit.options import format_option

if TYPE_CHECKING:
    from clipkit.training import TrainConfig


@click.command(cls=Job)
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, such as optim.lr=1e-3.")
@click.option("--resume", is_flag=True, help="Go on where the run in OUT stands; start it where there is none.")
@click.option("--init-from", metavar="MODEL", help="Start a new run from another's weights.")
@click.option("--gpus", type=click.IntRange(1), help="Train on so many GPUs of this machine.")
@click.option("--processes", type=click.IntRange(1), help="Train in so many processes on the CPU.")
@click.option("--plan", is_flag=True, help="Say what the run would take, from a few timed steps, and stop.")
@click.option("--show-config", is_flag=True, help="Print the resolved settings and stop.")
@click.option("--overwrite", is_flag=True, help="Remove the run that stands in OUT first.")
@format_option
def main(
    recipe: str,
    out: Path | None,
    overrides: tuple[str, ...],
    init_from: str | None,
    gpus: int | None,
    processes: int | None,
    show_config: bool,
    **how: Any,
) -> int:
    """Train RECIPE (a name from `clipkit recipes`, or a YAML file) on shards.

    The shards are named by --set data.train=SHARDS; nothing else must be set. Exit status 75 means that the run was
    told to stop (SIGTERM, SIGINT, SIGUSR1), has saved itself, and goes on with --resume. On --resume the length,
    validation, logging and checkpoint settings may change, and how the same thing is computed; other keys may not.
    """
    from clipkit.core import ClipkitError, launch, launched
    from clipkit.training import dump_yaml, load_config

    if init_from is not None:
        # A recipe that takes towers from elsewhere would take them again, over what was trained.
        own = ("towers.image.init=null", "towers.text.init=null")
        overrides = (*overrides, f"model={json.dumps(init_from)}", *own)
    config = load_config(find_recipe(recipe), overrides)
    if show_config:
        click.echo(dump_yaml(config), nl=False)
        return 0
    if out is None:
        raise ClipkitError("name a folder for the run: --out RUN")
    if not config.data.parts:
        raise ClipkitError("the recipe names no training data; add --set data.train=SHARDS (made by clipkit pack)")
    if gpus and processes:
        raise ClipkitError("--gpus and --processes say the same thing of other devices; keep one")
    if (gpus or processes) and not launched():
        return launch(__file__, sys.argv[1:], gpus or processes or 1, gpus=gpus is not None)
    return train(config, out, **how)


def train(config: "TrainConfig", out: Path, *, resume: bool, overwrite: bool, plan: bool, fmt: str) -> int:
    from clipkit.core import PREEMPTED, ClipkitError, StopRequest, emit, meter, note, warn
    from clipkit.models import create_model, load_model
    from clipkit.storage import MODEL_FOLDER
    from clipkit.training import (
        Distributed,
        Guard,
        Learner,
        MetricsLog,
        Pace,
        Phases,
        Run,
        Saver,
        learning_rate,
        make_objective,
        memory_gib,
        newest_usable,
        open_validation,
        plan_run,
        prepare_towers,
        refuse_too_many,
        set_seed,
        validate,
    )
    from clipkit.training.batches import Batches, describe, open_train_data, train_batches

    distributed = Distributed(config, out)
    device = distributed.device

    # Everything that can be wrong with the input is found before the run folder is touched.
    run = Run(out, config, is_main=distributed.is_main)
    run.check(resume=resume, overwrite=overwrite)
    excluded = run.excluded if resume else None
    data = open_train_data(config.data, config.seed, excluded=excluded, is_main=distributed.is_main)
    steps = config.total_steps(data.size)
    validation = open_validation(config.validation)
    if resume and run.finished_steps >= steps:
        note(f"{out} is trained to step {run.finished_steps} already; a larger --set steps=N goes on")
        return 1 if run.left_out else 0

    # Where the weights come from: 1. the last checkpoint of this run, 2. a model named by `model`, 3. random.
    set_seed(config.seed)
    last = distributed.from_main(lambda: newest_usable(out)) if resume else None
    model = load_model(last / MODEL_FOLDER) if last else create_model(config.model, config.preprocess, config.towers)
    prepare_towers(model, config.towers)
    phases = Phases(config, steps, model)
    objective_of = make_objective(config, data, device, has_bias=model.logit_bias is not None)
    learner = Learner(model, config, distributed)
    fresh = {"step": 0, "samples": 0, "jumped": 0, "data": data.identity(), "best": None, "skipped": 0, "rollbacks": 0}
    if distributed.world_size > 1:
        set_seed(config.seed + distributed.rank)  # dropout differs between ranks; the weights are made already
    state = learner.restore(last) if last else fresh
    run.check_data(state["data"], fresh["data"])
    size, first = config.batch_size, state["step"]

    def start(first_step: int, end: int) -> Any:
        """Makes batches, and the batches, of steps from the first to the end."""
        nonlocal data
        if data.size is None and first_step != first:  # a stream is not read backwards
            data = open_train_data(config.data, config.seed, is_main=distributed.is_main)
        jumped = state["jumped"]
        before = phases.preprocessing(jumped, size)
        maker = Batches(data, model.preprocess, model.tokenizer, config.data, config.seed, before)
        window = {"first_step": first_step + jumped, "steps": end + jumped, "batch_size": size}
        return maker, train_batches(maker, **window, **distributed.share(), pin_memory=device.type == "cuda")

    def gradient_of(maker: Batches, batch: Any, step: int) -> Any:
        phases.enter(step)
        pixels = maker.on_device(batch, device)  # which may replace a sample, so it comes first
        tokens = phases.tokens(batch["tokens"], step).to(device, non_blocking=True)
        return learner.gradient(pixels, tokens, objective_of(batch))

    if plan:
        figures = plan_run(learner, phases.stretches(first, steps), start, gradient_of, out)
        if distributed.is_main:
            emit(figures, fmt, f"{steps - first:,} steps of {size}: {describe(data, steps * size)}")
        distributed.end()
        return 1 if figures["problems"] else 0

    maker, batches = start(first, steps)  # nothing is read yet
    distributed.wait()  # every rank has looked at the folder before one changes it
    if distributed.is_main:
        run.begin(resume=resume)
        if excluded is None:
            run.pin_plan(data.excluded, data.left_out)
        run.rewind(state["step"], (state["step"] + state["jumped"]) * size)
    distributed.wait()
    guard = Guard(config.guard, state["skipped"], state["rollbacks"])
    saver = Saver(out, learner.shape, keep=config.checkpoint.keep)  # used on the main rank
    log, pace = MetricsLog(run, distributed), Pace()
    distributed.track(config)
    parameters = sum(p.numel() for p in learner.shape.parameters())
    note(f"{parameters / 1e6:.1f} M parameters, {distributed.precision} on {distributed.world_size} x {device.type}")
    note(f"steps {first:,} to {steps:,} of {size}: {describe(data, steps * size)}")

    def go_back(to_step: int) -> dict[str, Any]:
        """Where the last checkpoint stands, and on with the samples after those of `to_step`."""
        folder = distributed.from_main(lambda: saver.wait() or newest_usable(out))
        if folder is None:
            raise ClipkitError(f"not finite at step {to_step}, and no checkpoint to go back to; lower optim.lr")
        restored = learner.restore(folder)
        restored |= {"jumped": to_step + state["jumped"] - restored["step"]}
        warn(f"not finite at step {to_step}: back to {folder.name}, and on with other samples")
        if distributed.is_main:
            run.rewind(restored["step"], (restored["step"] + restored["jumped"]) * size)
        return restored | {"skipped": guard.skipped, "rollbacks": guard.rollbacks}

    loss, bad, stopping, saved_at = math.nan, 0, False, time.monotonic()
    with StopRequest() as stop, saver, meter("train", steps, "steps", done=first) as advance:
        while state["step"] < steps and not stopping:
            batch = pace.next(batches)
            step, position = state["step"], (state["step"] + state["jumped"]) * size
            gradient, norm = gradient_of(maker, batch, step)

            # The one message and the one wait for the device of a step: all ranks decide alike.
            broken = not (math.isfinite(norm.item()) and math.isfinite(gradient.loss.item()))
            late = time.monotonic() - saved_at > 60 * (config.checkpoint.every_minutes or math.inf)
            broken, stopping, due = distributed.any([broken, stop.requested, distributed.is_main and late])
            if broken:
                named = [data.name(batch["references"][row]) for row in learner.bad_rows(gradient)]
                run.add_nonfinite(named, step=step + 1, position=position, rank=distributed.rank)
            verdict = guard.judge(finite=not broken, step=step + 1)
            rate = learning_rate(step, steps=steps, **config.optim.schedule)
            learner.step(rate, step + 1) if verdict == "step" else learner.skip()
            run.add_to_ledger(batch["left_out"])
            bad += len(batch["left_out"])
            done = step + 1
            state |= {"step": done, "samples": done * size, "skipped": guard.skipped, "rollbacks": guard.rollbacks}
            advance(1)
            pace.used(size)
            if verdict == "rollback":
                batches.close()
                state = go_back(done)
                maker, batches = start(state["step"], steps)
                continue

            last_step = done == steps
            every = config.checkpoint.every_steps
            # Not after a step that could not be taken: what led there need not be kept.
            saves = last_step or stopping or (verdict == "step" and (due or (every and done % every == 0)))
            reports = done % config.log.every_steps == 0 or last_step
            if saves or reports:
                loss, bad_of_rank = distributed.mean([gradient.loss.item(), bad])
                bad_share = config.data.max_bad_share
                refuse_too_many(bad_of_rank * distributed.world_size, (done - first) * size, bad_share, out)
            if reports:
                seen = {"loss": loss, "grad_norm": norm.item()} if verdict == "step" else {}
                seen |= {"lr": rate, "logit_scale": learner.scale(), "memory_gib": memory_gib(device)}
                seen |= {"left_out": run.left_out, "skipped": guard.skipped}
                log.write(step=done, samples=state["samples"], **seen, **pace.take())
            best, score = False, None
            validates = last_step or (not stopping and done % (config.validation.every_steps or steps) == 0)
            if validation is not None and validates:
                before = time.perf_counter()
                found = validate(validation, learner.final_model(), distributed.share())
                named = {f"val_{name}": value for name, value in found.items()}
                log.write(step=done, samples=state["samples"], **named)
                score = found.get(config.validation.best or "")
                best = score is not None and (state["best"] is None or score > state["best"])
                state["best"] = score if best else state["best"]
                pace.pause(time.perf_counter() - before)
            if saves or best:
                snapshot, saved_at = learner.snapshot(state, saver.spare()), time.monotonic()
                if snapshot is not None:
                    saver.save(snapshot, best=best, score=score)

        # Nobody leaves before the main rank has written: who starts several processes ends all when one has ended.
        finished = state["step"] == steps
        tensors = dict(learner.final_tensors()) if finished else {}
        distributed.from_main(lambda: saver.wait(final=True))
        manifest = distributed.from_main(lambda: run.finish(learner.shape, state, tensors)) if finished else {}
    distributed.end()
    if not finished:
        note(f"told to stop: saved at step {state['step']:,} of {steps:,}; the same command with --resume goes on")
        return PREEMPTED
    name = manifest["model"]["fingerprint"][:12]
    note(f"{out}: step {state['step']}, loss {run.last_loss():.3f}, model {name} in {out / 'model'}")
    note(f"next: clipkit embed FOLDER --model {out} --out emb/")
    if run.left_out:
        warn(f"{run.left_out:,} unusable samples were replaced, listed in {out / 'ledger.jsonl'}")
    return 1 if run.left_out else 0


if __name__ == "__main__":
    main()
