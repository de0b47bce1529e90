"""Train any objective on any data with any network and threat; kill it at any moment and go on.

    perceptual-at train --help                                # the recipes: the papers' settings by name
    perceptual-at train rpat --root data --download           # PGD-AT+RPAT on CIFAR-10, as published
    perceptual-at train rpat --root data --resume             # go on after an interruption
    torchrun --nproc-per-node 4 -m perceptual_at train rpat   # several GPUs: same batch, same evaluation

Everything goes to `--out`: whole states in `states`, the log, TensorBoard's events, the weights `best` and `final`
as safetensors, and `result.json`. What `best` was chosen on is written beside every number.
"""

import dataclasses
import json
import math
import sys
import time
import warnings
from typing import Any

import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from perceptual_at import ema_update, snapshot
from perceptual_at.averaging import Weights
from perceptual_at.checkpoints import read_weights, save_weights, written_whole
from perceptual_at.commands import report, states, steps
from perceptual_at.commands.images import fingerprint, splits
from perceptual_at.commands.networks import network
from perceptual_at.commands.recipes import RECIPES
from perceptual_at.commands.settings import Settings, keywords
from perceptual_at.data import TensorImages

SHOWN_EVERY = 20  # steps between two looks at the loss terms, each of which waits for the device


class Stopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclasses.dataclass
class Run:
    """One run: what it is made of, and where it is."""

    settings: Settings
    accelerator: Accelerator
    images: dict[str, TensorImages]
    data: str
    model: nn.Module
    optimizer: Any
    noise: torch.Generator
    mixes: torch.Generator
    average: Weights | None
    epoch: int = 0
    batch: int = 0
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: Weights | None = None
    seconds: float = 0.0

    @property
    def bare(self) -> nn.Module:
        """The network itself, without wrappers: its names carry no prefix."""
        module: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return module

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return len(self.images["train"]) // self.settings.optimisation.batch

    @property
    def step(self) -> int:
        """Optimiser steps done so far."""
        return self.epoch * self.steps_per_epoch + self.batch


def prepare(settings: Settings) -> Run:
    """Everything before the first step."""
    # Objectives run the model several times per step. Buffers copied at each forward would tie the processes
    # together there, and RAAT leaves forwards out where it finds no pairs: the others would wait for ever.
    # Every objective uses all parameters in its first forward, so none has to be searched for.
    running, optimisation = settings.running, settings.optimisation
    accelerator = Accelerator(
        cpu=running.cpu or not torch.accelerator.is_available(),
        mixed_precision=running.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
    )
    if running.precision == "fp16" and accelerator.device.type == "cpu":
        raise Stopped("--precision fp16 needs an accelerator; take bf16 on a CPU.")
    if optimisation.batch % accelerator.num_processes:
        raise Stopped(f"--batch {optimisation.batch} cannot be shared evenly by {accelerator.num_processes} processes.")
    try:
        steps.threat_of(settings.threat)
        with accelerator.main_process_first():  # only one of them downloads
            images = splits(settings)
        model = network(settings, images["train"])
    except (ValueError, TypeError, ImportError) as error:
        raise Stopped(str(error)) from error
    if len(images["train"]) < optimisation.batch:
        raise Stopped(f"--batch {optimisation.batch} is more than the {len(images['train'])} images to train on.")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=optimisation.lr, momentum=optimisation.momentum, weight_decay=optimisation.weight_decay
    )
    if running.compile:
        model.compile()
    with warnings.catch_warnings():  # Accelerate does not know torch's new name of the option yet
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        model, optimizer = accelerator.prepare(model, optimizer)
    noise = steps.stream(running.seed, "noise", accelerator.process_index, device=accelerator.device)
    mixes = steps.stream(running.seed, "mix")
    average = None if optimisation.average_decay is None else snapshot(model)
    return Run(settings, accelerator, images, fingerprint(images), model, optimizer, noise, mixes, average)


# One epoch --------------------------------------------------------------------------------------------------------


def train_epoch(run: Run, writer: SummaryWriter | None) -> None:
    """The rest of the present epoch, with a state saved every now and then."""
    settings, accelerator = run.settings, run.accelerator
    optimisation = settings.optimisation
    loss_of_step = steps.objective_of(settings, run.noise, run.mixes)
    batches = steps.rows_of_epoch(settings.running.seed, len(run.images["train"]), optimisation.batch, run.epoch)
    bar = tqdm(
        total=len(batches), initial=run.batch, desc=f"epoch {run.epoch + 1}/{optimisation.epochs}", unit="step",
        leave=False, disable=None if accelerator.is_main_process else True,
    )  # fmt: skip
    run.model.train()
    while run.batch < len(batches):
        began = time.perf_counter()
        rate = steps.learning_rate(optimisation, run.step, run.steps_per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        mine = batches[run.batch].chunk(accelerator.num_processes)[accelerator.process_index]
        x, labels = (part.to(accelerator.device) for part in run.images["train"][mine])
        loss, terms = loss_of_step(run.model, x, labels, epoch=run.epoch, average=run.average)
        run.optimizer.zero_grad()
        accelerator.backward(loss)
        run.optimizer.step()
        if run.average is not None and not run.optimizer.step_was_skipped:
            began = run.epoch >= optimisation.average_start
            decay = optimisation.average_decay if began and optimisation.average_decay is not None else 0.0
            run.average = ema_update(run.average, run.model, decay=decay)
        for name, value in {"loss": loss.detach(), **terms}.items():
            run.sums[name] = run.sums.get(name, 0.0) + value.float()
        run.batch += 1
        run.seconds += time.perf_counter() - began
        bar.update()
        if run.batch % SHOWN_EVERY == 0 or run.batch == len(batches):
            show(run, bar, writer, {"loss": loss.detach(), **terms}, rate)
        if run.step % settings.running.save_every == 0 and run.batch < len(batches):
            save(run)
    bar.close()


def show(run: Run, bar: Any, writer: SummaryWriter | None, terms: dict[str, Tensor], rate: float) -> None:
    """Loss terms of one step on the bar and in TensorBoard; stop where they are not finite."""
    values = {name: float(value) for name, value in terms.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise Stopped(f"the loss is not finite at step {run.step}: {values}. A smaller --lr or --weight may help.")
    bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
    if writer is not None:
        for name, value in {**values, "learning_rate": rate}.items():
            writer.add_scalar(f"train/{name}", value, run.step)


def close_epoch(run: Run, writer: SummaryWriter | None) -> None:
    """Measure the epoch's weights, keep them if they are the best, log, save."""
    chosen, accelerator = run.settings.evaluation, run.accelerator
    share_statistics(run)
    weights = snapshot(run.model) if run.average is None else run.average
    result = report.measure(accelerator, run.settings, run.model, weights, run.images["select"], chosen.select_steps)
    scores = report.percent(result)
    means = {name: accelerator.reduce(total / run.batch, "mean").item()
             for name, total in run.sums.items()}  # fmt: skip
    pgd = f"pgd{chosen.select_steps}"
    # A tie goes to the later epoch, which has seen more.
    is_best = run.best is None or scores[pgd] >= max(entry[chosen.select_on][pgd] for entry in run.log)
    run.epoch, run.batch, run.sums = run.epoch + 1, 0, {}
    run.log.append({
        "epoch": run.epoch, "terms": means, chosen.select_on: scores, "best": is_best,
        "learning_rate": run.optimizer.param_groups[0]["lr"], "seconds": round(run.seconds, 1),
    })  # fmt: skip
    if is_best:
        run.best = {name: value.clone() for name, value in weights.items()}
    save(run)
    if accelerator.is_main_process:
        write_log(run)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        clean, robust = scores["clean"], scores[pgd]
        tqdm.write(f"epoch {run.epoch:3d}  {shown}  {chosen.select_on}: clean {clean:.2f}, {pgd} {robust:.2f}"
                   f"{'  best' if is_best else ''}")  # fmt: skip
    if writer is not None:
        for name, value in {"clean": scores["clean"], pgd: scores[pgd]}.items():
            writer.add_scalar(f"{chosen.select_on}/{name}", value, run.step)
        writer.flush()


def share_statistics(run: Run) -> None:
    """Give all processes the mean of their batch-norm statistics: each collected those of its own batches."""
    if run.accelerator.num_processes == 1:
        return
    for name, buffer in run.bare.named_buffers():
        for held in (buffer, *([] if run.average is None else [run.average[name]])):
            if held.is_floating_point():
                held.copy_(run.accelerator.reduce(held, "mean"))


# State ------------------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Save everything that the rest of the run depends on; what was saved before stays if this fails."""
    accelerator, folder = run.accelerator, run.settings.running.out / "states"
    leader = accelerator.is_main_process
    try:
        with states.written(folder, run.step, leader=leader, meet=accelerator.wait_for_everyone) as beside:
            accelerator.save_state(str(beside))
            save_file(own_tensors(run), beside / f"process_{accelerator.process_index}.safetensors")
            if leader and run.best is not None:
                save_weights(beside / "best.safetensors", run.best)
            if leader:
                (beside / "run.json").write_text(json.dumps(facts(run)))
    except Exception as error:
        raise Stopped(
            f"the state after step {run.step} could not be saved in `{folder}` ({error}). The states there are whole "
            "and untouched; make room, then start again with --resume."
        ) from error


def facts(run: Run) -> dict[str, Any]:
    """The part of the state that is no tensor."""
    return {
        "settings": run.settings.fixed(), "data": run.data, "processes": run.accelerator.num_processes,
        "epoch": run.epoch, "batch": run.batch, "log": run.log, "seconds": run.seconds,
    }  # fmt: skip


def own_tensors(run: Run) -> dict[str, Tensor]:
    """What differs between processes: random states, batch-norm statistics, averaged weights, sums of terms."""
    groups = {
        "random": {"noise": run.noise.get_state(), "mixes": run.mixes.get_state()},
        "buffer": dict(run.bare.named_buffers()),
        "average": run.average or {},
        "sum": run.sums,
    }
    return {
        f"{group}/{name}": value.cpu().contiguous() for group, held in groups.items() for name, value in held.items()
    }


def restore(run: Run) -> bool:
    """Go back to the newest whole state, if there is one."""
    folder = run.settings.running.out / "states"
    state = states.newest_whole(folder)
    if state is None:
        return False
    saved, present = json.loads((state / "run.json").read_text()), facts(run)
    changed = [f"{name} {saved['settings'].get(name)!r} -> {value!r}"
               for name, value in present["settings"].items() if saved["settings"].get(name) != value]  # fmt: skip
    if changed:
        raise Stopped(
            f"the run in `{run.settings.running.out}` has other settings: {', '.join(changed)}. Take another --out."
        )
    for name, what in (("processes", "was saved by {0} processes, not {1}"), ("data", "was trained on other images")):
        if saved[name] != present[name]:
            raise Stopped(f"the run in `{run.settings.running.out}` {what.format(saved[name], present[name])}.")
    run.accelerator.load_state(str(state))
    device = run.accelerator.device
    held = load_file(state / f"process_{run.accelerator.process_index}.safetensors")

    def group(wanted: str) -> dict[str, Tensor]:
        return {name.partition("/")[2]: value for name, value in held.items() if name.startswith(f"{wanted}/")}

    run.noise.set_state(group("random")["noise"])
    run.mixes.set_state(group("random")["mixes"])
    for name, buffer in run.bare.named_buffers():
        buffer.copy_(group("buffer")[name])
    like = snapshot(run.model)  # memory layout counts for the last bit
    if run.average is not None:
        run.average = {name: like[name].clone().copy_(value) for name, value in group("average").items()}
    run.sums = {name: value.to(device) for name, value in group("sum").items()}
    if (state / "best.safetensors").exists():
        best = read_weights(state / "best.safetensors")
        run.best = {name: like[name].clone().copy_(value) for name, value in best.items()}
    run.epoch, run.batch, run.log, run.seconds = (saved[name] for name in ("epoch", "batch", "log", "seconds"))
    return True


def write_log(run: Run) -> None:
    """The log, one line of JSON per epoch."""
    with written_whole(run.settings.running.out / "log.jsonl") as path:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in run.log))


# The whole run ----------------------------------------------------------------------------------------------------


def finish(run: Run) -> None:
    """Test the best and the final weights once, in full precision, and write down what came of it."""
    settings, accelerator = run.settings, run.accelerator
    chosen, out = settings.evaluation, settings.running.out
    plain = network(settings, run.images["train"]).to(accelerator.device)
    final = snapshot(run.model) if run.average is None else run.average
    best = final if run.best is None else run.best
    selected = max(entry["epoch"] for entry in run.log if entry["best"])
    tested = {}
    for name, weights, epoch in (("best", best, selected), ("final", final, settings.optimisation.epochs)):
        result = report.measure(accelerator, settings, plain, weights, run.images["test"], chosen.test_steps)
        tested[name] = {"epoch": epoch, "test": report.percent(result)}
        if accelerator.is_main_process:
            tested[name]["weights"] = save_weights(out / f"{name}.safetensors", weights)
            print(f"{name} (epoch {epoch}), test: {result}")
    if chosen.select_on == "test" and accelerator.is_main_process:
        print("`best` was chosen on the test set, so its numbers are not those of unseen images.")
    if accelerator.is_main_process:
        record = {
            "selected_on": chosen.select_on, **tested, "seed": settings.running.seed,
            "weights_of": "average" if run.average is not None else "model",
            "threat": repr(steps.threat_of(settings.threat)),
            "images": {name: len(part) for name, part in run.images.items()},
            "settings": settings.fixed(), "objective_options": keywords(settings.method), "log": run.log,
            "seconds": round(run.seconds, 1), **report.made_by(accelerator, settings),
        }  # fmt: skip
        with written_whole(out / "result.json") as path:
            path.write_text(json.dumps(record, indent=1) + "\n")


def train(settings: Settings) -> None:
    """Prepare or restore, train, report."""
    running = settings.running
    run = prepare(settings)
    if (running.out / "states").is_dir() and any((running.out / "states").iterdir()) and not running.resume:
        raise Stopped(f"`{running.out}` holds a run already: add --resume to go on with it, or take another --out.")
    run.accelerator.wait_for_everyone()
    restored = running.resume and restore(run)
    leader = run.accelerator.is_main_process
    if leader:
        running.out.mkdir(parents=True, exist_ok=True)
        where = f"goes on after step {run.step}" if restored else "starts"
        print(f"{settings.method.objective} {where}: {len(run.images['train'])} images, {run.accelerator.device}, "
              f"{run.accelerator.num_processes} process(es)")  # fmt: skip
        write_log(run)
    writer = SummaryWriter(running.out / "tensorboard", purge_step=run.step) if leader else None
    while run.epoch < settings.optimisation.epochs:
        train_epoch(run, writer)
        close_epoch(run, writer)
    finish(run)
    if writer is not None:
        writer.close()
    run.accelerator.end_training()


def settings_of(arguments: list[str]) -> Settings:
    """The settings that the words of a command line mean."""
    described: dict[str, tuple[str, Settings]] = {name: (made.title, made.settings) for name, made in RECIPES.items()}
    return tyro.extras.overridable_config_cli(
        described, args=arguments, prog="perceptual-at train", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )


def command(arguments: list[str]) -> None:
    """`perceptual-at train`: settings from the command line, errors as one line."""
    try:
        train(settings_of(arguments))
    except (Stopped, states.NoWholeState, OSError) as error:
        sys.exit(f"perceptual-at train: {error}")
