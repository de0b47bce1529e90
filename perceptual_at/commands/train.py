"""Train any objective on any data with any network and threat; kill it at any moment and go on.

    perceptual-at train rpat --root data --download           # PGD-AT+RPAT on CIFAR-10, as published
    perceptual-at train rpat --root data --resume             # go on after an interruption
    perceptual-at train --row "RAAT/1/CIFAR-10/linf/ResNet-18/RAAT" --root data
    torchrun --nproc-per-node 4 -m -- perceptual_at train rpat   # several GPUs: same batch, same evaluation

Everything goes to `--out`: whole states in `states`, the log, TensorBoard's events, the weights `best` and `final`
as safetensors, and `result.json`. What `best` was chosen on is written beside every number.
"""

import contextlib
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import perceptual_at as pat
from perceptual_at.averaging import Weights
from perceptual_at.checkpoints import save_weights, written_whole
from perceptual_at.commands.endings import Stopped, collected, locked, said
from perceptual_at.commands.ingredients import networks
from perceptual_at.commands.ingredients.images import batches
from perceptual_at.commands.ingredients.protocol import threat_of
from perceptual_at.commands.options import method
from perceptual_at.commands.options.reading import settings_of
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.training import companions, logs, report, shards
from perceptual_at.commands.training.batches import rows_of, training_batches
from perceptual_at.commands.training.rates import learning_rate
from perceptual_at.commands.training.run import Run, prepare
from perceptual_at.commands.training.saving import refuse_what_is_not_finite, restore_run, save_run
from perceptual_at.commands.training.splits import task_of
from perceptual_at.commands.training.states import NoWholeState
from perceptual_at.commands.training.steps import Result, Step
from perceptual_at.schedules import ramped_decay
from perceptual_at.weight_perturbation import ascend
from perceptual_at.weight_perturbation import restore as put_back

# One epoch --------------------------------------------------------------------------------------------------------


def train_epoch(run: Run, scalars: logs.Scalars | None) -> None:
    """The rest of the present epoch, with a state saved every now and then."""
    settings, accelerator = run.settings, run.accelerator
    optimisation, epoch = settings.optimisation, run.epoch
    rows = rows_of(run.parts, settings, epoch)
    mine = [batch.chunk(accelerator.num_processes)[accelerator.process_index] for batch in rows[run.batch :]]
    pinned = accelerator.device.type == "cuda"
    bar = logs.bar_of(run, len(rows))
    run.model.train()
    began = time.perf_counter()
    served = training_batches(settings, run.parts, mine, epoch=epoch, pinned=pinned)
    for index, (x, labels) in zip(mine, served, strict=True):
        rate = learning_rate(optimisation, run.step, run.steps_per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        x, labels, index = _on(accelerator.device, x), *(rows.to(accelerator.device) for rows in (labels, index))
        terms = take_step(run, x, labels, index)
        for name, value in terms.items():
            run.sums[name] = run.sums.get(name, 0.0) + value.float()
        run.batch += 1
        run.seconds += time.perf_counter() - began
        began = time.perf_counter()
        bar.update()
        if run.batch % logs.SHOWN_EVERY == 0 or run.batch == len(rows):
            show(run, bar, scalars, terms, rate)
        if run.step % settings.running.save_every == 0 and run.batch < len(rows):
            if scalars is not None:
                scalars.flush()
            save_run(run)
            began = time.perf_counter()
    bar.close()


def _on(device: Any, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(x, tuple):
        return tuple(view.to(device, non_blocking=True) for view in x)
    return x.to(device, non_blocking=True)


def take_step(run: Run, x: Tensor | tuple[Tensor, ...], labels: Tensor, index: Tensor) -> dict[str, Tensor]:
    """One step of the optimiser, or several on one batch; gives the loss and its terms."""
    settings, companion = run.settings, companions.companion_of(run.settings)
    step = Step(settings, run.sources, x, labels, epoch=run.epoch, average=run.average)
    run.kept = companions.supplied(run, step, index)
    for _ in range(settings.optimisation.replays):
        loss, terms = _move(run, step, companion)
        if run.average is not None and not run.optimizer.step_was_skipped:
            run.average = _averaged(run, run.average)
        run.kept = companion.stepped(run)
    step.after(run.model)
    return {"loss": loss.detach(), **terms}


def _move(run: Run, step: Step, companion: companions.Companion) -> Result:
    """Gradients and the optimiser's step, at perturbed weights where the settings say so."""
    optimisation, perturbed = run.settings.optimisation, None
    if run.perturbs:
        which: Literal["all", "weights"] = "all" if optimisation.awp_form == "sam" else "weights"
        size = optimisation.awp or 0.0
        perturbed = ascend(run.model, lambda: step.trial(run.model), size=size, parameters=which)
    run.optimizer.zero_grad()
    loss, terms = companion.backward(run, step)
    companions.share_gradients(run)
    if perturbed is not None and optimisation.awp_form == "sam":
        put_back(run.model, perturbed, form="sam")
    run.optimizer.step()
    if perturbed is not None and optimisation.awp_form == "awp":
        put_back(run.model, perturbed, form="awp")
    return loss, terms


def _averaged(run: Run, average: Weights) -> Weights:
    """The averaged weights after a step; until averaging begins, and with SWA until the epoch's end, a copy."""
    optimisation = run.settings.optimisation
    after = run.step - optimisation.average_start * run.steps_per_epoch
    if optimisation.averaging == "swa":
        return average if after >= 0 else pat.ema_update(average, run.model, decay=0.0)
    if optimisation.averaging == "ramp":
        decay = ramped_decay(run.step, decay=optimisation.average_decay or 0.0, warmup=run.step - after)
        return pat.ema_update(average, run.model, decay=decay, buffers="copy")
    return pat.ema_update(average, run.model, decay=optimisation.average_decay or 0.0 if after >= 0 else 0.0)


def _averaged_over_epochs(run: Run, average: Weights) -> Weights:
    """SWA: the mean of the epochs' last weights, with batch norm's statistics over the clean training images."""
    count = run.epoch - run.settings.optimisation.average_start
    if count < 0:
        return average
    images, size = len(run.parts.train), run.settings.evaluation.eval_batch
    rows = torch.arange(images).tensor_split(tuple(range(size, images - 1, size)))  # a lone last one has no variance
    served = batches(run.parts.train, rows, workers=run.settings.data.workers)
    seen = (x.to(run.accelerator.device) for x, _ in served)
    return pat.refresh_batch_norm(run.bare, pat.swa_update(average, run.bare, count=count), seen)


def show(run: Run, bar: Any, scalars: logs.Scalars | None, terms: dict[str, Tensor], rate: float) -> None:
    """Loss terms of one step on the bar and in TensorBoard; stop where they are not finite."""
    values = {name: float(value) for name, value in terms.items()}
    if not run.agreed(all(math.isfinite(value) for value in values.values())):
        refuse_what_is_not_finite(run)  # says which state is good
        raise Stopped(f"the loss is not finite at step {run.step}: {values}. A smaller --lr or --weight may help.")
    bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
    if scalars is not None:
        scalars.add("train", {**values, "learning_rate": rate}, run.step)


def close_epoch(run: Run, scalars: logs.Scalars | None) -> None:
    """Measure the epoch's weights, keep them if they are the best, log, save."""
    settings, chosen = run.settings, run.settings.evaluation
    refuse_what_is_not_finite(run)
    share_statistics(run)
    run.kept = companions.companion_of(settings).closed(run)
    if run.average is not None and settings.optimisation.averaging == "swa":
        run.average = _averaged_over_epochs(run, run.average)
    weights = run.evaluated()
    result = report.measure(run, run.measured, weights, run.parts.select, chosen.select_steps)
    scores = report.percent(result)
    seen = logs.looks(run)
    means = {name: run.accelerator.reduce(total / run.batch, "mean").item() for name, total in run.sums.items()}
    pgd = f"pgd{chosen.select_steps}"
    # A tie goes to the later epoch, which has seen more.
    is_best = run.best is None or scores[pgd] >= max(entry[chosen.select_on].get(pgd, -1.0) for entry in run.log)
    took = run.seconds - (run.log[-1]["seconds"] if run.log else 0.0)
    images = run.batch * settings.optimisation.batch
    run.epoch, run.batch, run.sums = run.epoch + 1, 0, {}
    run.log.append({
        "epoch": run.epoch, "terms": means, chosen.select_on: scores, "best": is_best, **seen,
        "learning_rate": run.optimizer.param_groups[0]["lr"], "seconds": round(run.seconds, 3),
        "epoch_seconds": round(took, 3), "images_per_second": round(images / max(took, 1e-9), 1),
        "remaining_seconds": round((settings.optimisation.epochs - run.epoch) * run.seconds / run.epoch, 1),
    })  # fmt: skip
    if is_best:
        run.best = {name: value.clone() for name, value in weights.items()}
    if scalars is not None:
        scalars.add(chosen.select_on, {name: value for name, value in scores.items() if name != "n"}, run.step)
        scalars.add("epoch", means, run.step)
        for kind, values in seen.items():
            scalars.add(kind, values, run.step)
        scalars.flush()
    save_run(run)
    if run.leader:
        logs.write_log(run)
        tqdm.write(logs.line_of(run.log[-1], chosen.select_on, settings.optimisation.epochs))


def share_statistics(run: Run) -> None:
    """Give all processes the mean of their batch-norm statistics: each collected those of its own batches."""
    if run.accelerator.num_processes == 1:
        return
    own = dict(run.bare.named_buffers())
    averaged = [] if run.average is None else [run.average[name] for name in own]
    for held in (*own.values(), *averaged, *companions.statistics(run)):
        if held.is_floating_point():
            held.copy_(run.accelerator.reduce(held, "mean"))


# The whole run ----------------------------------------------------------------------------------------------------


def finish(run: Run) -> None:
    """Save the best and the final weights, test both once, in full precision, and write down what came of it."""
    settings, out = run.settings, run.settings.running.out
    chosen = settings.evaluation
    task = task_of(run.parts, settings.network)
    plain = networks.network(settings.network, task, seed=settings.running.seed).to(run.accelerator.device)
    final = run.evaluated()
    best = final if run.best is None else run.best
    selected = max(entry["epoch"] for entry in run.log if entry["best"])
    tested: dict[str, Any] = {}
    for name, weights, epoch in (("best", best, selected), ("final", final, settings.optimisation.epochs)):
        tested[name] = {"epoch": epoch}
        if run.leader:
            tested[name]["weights"] = save_weights(out / f"{name}.safetensors", weights)
    if run.average is not None:
        trained = shards.whole(pat.snapshot(run.model))  # the weights that were trained, not averaged
        if run.leader:
            save_weights(out / "final_model.safetensors", trained)
    for name, weights in (("best", best), ("final", final)):
        result = report.measure(run, plain, weights, run.parts.test, chosen.test_steps)
        tested[name] |= {"test": report.percent(result), "per_class": report.per_class(result)}
        if run.leader:
            print(f"{name} (epoch {tested[name]['epoch']}), test: {report.in_words(tested[name]['test'])}")
            for text in result.warnings:
                warnings.warn(f"{name}, test: {text}", stacklevel=1)
    if chosen.select_on == "test" and run.leader:
        print("`best` was chosen on the test set, so its numbers are not those of unseen images.")
    if run.leader:
        record = {
            "selected_on": chosen.select_on, **tested, "seed": settings.running.seed,
            "weights_of": "average" if run.average is not None else "model",
            "threat": repr(threat_of(settings.threat)), "protocol": report.protocol(settings),
            "images": run.parts.sizes(), "shape": list(run.parts.shape), "classes": run.parts.classes,
            "settings": settings.flat() | method.effective(settings.method), "folder": str(Path.cwd()),
            "objective_options": _plain(settings), "changes": run.changes,
            "warnings": run.notes, "log": run.log, "seconds": round(run.seconds, 1),
            **report.made_by(run.accelerator, settings),
        }  # fmt: skip
        with written_whole(out / "result.json") as path:
            path.write_text(json.dumps(record, indent=1) + "\n")


def _plain(settings: Settings) -> dict[str, Any]:
    """The keywords of the objective for JSON."""
    options = method.keywords(settings.method, epoch=settings.optimisation.epochs)
    options |= {} if settings.method.base is None else {"base": settings.method.base}
    return {name: value if isinstance(value, (str, int, float, bool)) else repr(value)
            for name, value in options.items()}  # fmt: skip


def train(settings: Settings) -> None:
    """Train the method's teachers if it has any, then prepare or restore, train, report.

    Raises:
        Stopped: if the run cannot begin or go on.
    """
    _refuse_taken(settings)
    try:
        firsts = list(companions.first_runs(settings))
    except ValueError as error:
        raise Stopped(str(error)) from error
    for chosen in (*firsts, settings):
        with collected() as notes:
            run = prepare(chosen)
            run.notes = notes
            _train(run)
    run.accelerator.end_training()


def _refuse_taken(settings: Settings) -> None:
    """Refuse a folder whose run or result would be written over, before anything is read or trained."""
    running = settings.running
    out, states = running.out, running.out / "states"
    if states.is_dir() and any(states.iterdir()):
        if not running.resume:
            raise Stopped(f"`{out}` holds a run already: add --resume to go on with it, or take another --out.")
    elif (out / "result.json").exists():
        raise Stopped(f"`{out}` holds the result of a run, but no state to go on from; take another --out.")
    elif any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise Stopped(f"`{out}` is no folder, or below a file; take another --out.")


def _train(run: Run) -> None:
    settings, running = run.settings, run.settings.running
    run.accelerator.wait_for_everyone()
    alone = locked(running.out, "--out") if run.leader else contextlib.nullcontext()
    with alone:
        restored = running.resume and restore_run(run)
        if run.leader:
            where = f"goes on after step {run.step}" if restored else "starts"
            print(f"{settings.method.objective} {where}: {len(run.parts.train)} images, {run.accelerator.device}, "
                  f"{run.accelerator.num_processes} process(es)", flush=True)  # fmt: skip
            for change in run.changes:
                print(f"changed at epoch {change['epoch']}: {change['option']} {change['from']} -> {change['to']}")
            logs.write_log(run)
        scalars = logs.Scalars(run)
        while run.epoch < settings.optimisation.epochs:
            train_epoch(run, scalars)
            close_epoch(run, scalars)
        finish(run)
        scalars.close()


def command(arguments: list[str]) -> None:
    """`perceptual-at train`: settings from the command line, errors as one line."""
    with said("perceptual-at train"):
        settings = settings_of(arguments)
    again = f"The states in `{settings.running.out}` are whole; the same command with --resume goes on."
    with said("perceptual-at train", again):
        try:
            train(settings)
        except NoWholeState as error:
            raise Stopped(str(error)) from error
