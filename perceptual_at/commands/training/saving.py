"""The state of a run on the disk: saved whole, restored to the last bit."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from perceptual_at.averaging import Weights, snapshot
from perceptual_at.checkpoints import read_weights, save_weights
from perceptual_at.commands.endings import Stopped
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.training import companions, shards, states
from perceptual_at.commands.training.run import Run


def save_run(run: Run) -> None:
    """Save everything that the rest of the run depends on; what was saved before stays if this fails."""
    accelerator, folder = run.accelerator, run.settings.running.out / "states"
    refuse_what_is_not_finite(run)
    try:
        with states.written(folder, run.step, leader=run.leader, meet=accelerator.wait_for_everyone) as beside:
            if not run.settings.running.shard:
                accelerator.save_state(str(beside))
            save_file(own_tensors(run), beside / f"process_{accelerator.process_index}.safetensors")
            if run.leader and run.best is not None:
                save_weights(beside / "best.safetensors", run.best)
            if run.leader:
                (beside / "run.json").write_text(json.dumps(facts(run)))
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        raise Stopped(
            f"the state after step {run.step} could not be saved in `{folder}` ({error}). The states there are whole "
            "and untouched; make room, then start again with --resume."
        ) from error


def refuse_what_is_not_finite(run: Run) -> None:
    """Stop where the loss or the weights are not finite, in any process; such a state is never kept."""
    own = map(shards.part_of, run.bare.state_dict().values())
    held = [*run.sums.values(), *(value for value in own if value.is_floating_point())]
    well = torch.stack([value.isfinite().all() for value in held]).all()
    if not run.agreed(well):
        newest = states.newest_name(run.settings.running.out / "states")
        again = "start again with a smaller --lr or --weight"
        kept = (
            f"the newest state, {newest}, is good. Go on from it with --resume --change lr --lr and a smaller rate, or "
            f"{again}."
            if newest
            else f"no state was saved before; {again}."
        )
        raise Stopped(f"the loss or the weights are not finite at step {run.step}; {kept}")


def facts(run: Run) -> dict[str, Any]:
    """The part of the state that is no tensor."""
    return {
        "settings": run.settings.fixed(), "data": run.fingerprints, "processes": run.accelerator.num_processes,
        "epoch": run.epoch, "batch": run.batch, "log": run.log, "seconds": run.seconds, "changes": run.changes,
    }  # fmt: skip


def own_tensors(run: Run) -> Weights:
    """What differs between processes: random states, batch-norm statistics, averaged weights, sums of terms."""
    groups = {
        "random": {"noise": run.sources.noise.get_state(), "mixes": run.sources.mixes.get_state()},
        "buffer": dict(run.bare.named_buffers()),
        "average": run.average or {},
        "kept": companions.flat_state(run.kept),
        "sum": run.sums,
        "part": shards.states_of(run.bare, run.optimizer) if run.settings.running.shard else {},
    }
    return {
        f"{group}/{name}": shards.part_of(value).cpu().contiguous()
        for group, held in groups.items() for name, value in held.items()
    }  # fmt: skip


def restore_run(run: Run) -> bool:
    """Go back to the newest whole state, if there is one."""
    folder = run.settings.running.out / "states"
    state = states.newest_whole(folder)
    if state is None:
        return False
    saved = json.loads((state / "run.json").read_text())
    run.changes = _changes_since(run, state, saved)
    held = load_file(state / f"process_{run.accelerator.process_index}.safetensors")
    _refuse_what_the_state_lacks(run, state, held)
    if not run.settings.running.shard:
        _load(run, state)
    device = run.accelerator.device

    def group(wanted: str) -> dict[str, Tensor]:
        return {name.partition("/")[2]: value for name, value in held.items() if name.startswith(f"{wanted}/")}

    run.sources.noise.set_state(group("random")["noise"])
    run.sources.mixes.set_state(group("random")["mixes"])
    for name, buffer in run.bare.named_buffers():
        buffer.copy_(group("buffer")[name])
    if run.settings.running.shard:
        shards.put_back(run.bare, run.optimizer, group("part"))
    like = shards.whole(snapshot(run.model))  # memory layout counts for the last bit
    if run.average is not None:
        run.average = {name: _like(run.average[name], value) for name, value in group("average").items()}
    run.kept = companions.refilled(run.kept, group("kept"))
    run.sums = {name: value.to(device) for name, value in group("sum").items()}
    if (state / "best.safetensors").exists():
        shape = like if run.average is None else shards.whole(run.average)
        run.best = {name: _like(shape[name], value) for name, value in read_weights(state / "best.safetensors").items()}
    run.epoch, run.batch, run.log, run.seconds = (saved[name] for name in ("epoch", "batch", "log", "seconds"))
    return True


def _changes_since(run: Run, state: Path, saved: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings that were changed so far; refuses a state of another run, or one that this version cannot go on from."""
    out, present = run.settings.running.out, facts(run)
    if missing := present.keys() - saved.keys():
        raise Stopped(
            f"`{state}` lacks {', '.join(sorted(missing))}: another version wrote it, which can go on from it."
        )
    changes: list[dict[str, Any]] = saved["changes"] + changed(run.settings, saved["settings"], saved["epoch"])
    if saved["processes"] != present["processes"]:
        raise Stopped(f"the run in `{out}` was saved by {saved['processes']} processes, not {present['processes']}.")
    other = [name for name in saved["data"] | present["data"] if saved["data"].get(name) != present["data"].get(name)]
    if set(other) - {"test"}:
        raise Stopped(f"the run in `{out}` was trained on other images ({', '.join(other)}).")
    if other:
        warnings.warn("the test images are others than when the run began.", stacklevel=1)
    return changes


def _load(run: Run, state: Path) -> None:
    """Weights, momenta and the scaler of a state; momentum and weight decay stay those of the settings."""
    chosen = [{name: value for name, value in held.items() if name != "params"} for held in run.optimizer.param_groups]
    run.accelerator.load_state(str(state))
    for held, own in zip(run.optimizer.param_groups, chosen, strict=True):
        held.update(own)


def _refuse_what_the_state_lacks(run: Run, state: Path, held: Weights) -> None:
    """Refuse to go on with averages, or with what a method keeps, that the run did not have."""
    for name in own_tensors(run).keys() - held.keys():
        group, _, key = name.partition("/")
        if group in ("average", "kept"):
            what = "no averaged weights" if group == "average" else f"no {key.partition('/')[0]}"
            named = " ".join(run.settings.running.change)
            raise Stopped(f"--change {named}: `{state}` holds {what}, which the run would need; take another --out.")


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    made = tensor.clone()
    shards.part_of(made).copy_(value)
    return made


def changed(settings: Settings, saved: dict[str, Any], epoch: int) -> list[dict[str, Any]]:
    """Settings that differ from the run's, all of them named by --change or --extend.

    Raises:
        Stopped: if one is not named, or the epochs are fewer than it allows.
    """
    running, present = settings.running, settings.fixed()
    differing = {name: (saved.get(name), value) for name, value in present.items() if saved.get(name) != value}
    unnamed = differing.keys() - running.may_change
    others = [f"{name} {before!r} -> {after!r}" for name, (before, after) in differing.items() if name in unnamed]
    if others:
        raise Stopped(
            f"the run in `{running.out}` has other settings: {', '.join(others)}. Take another --out, or name what may "
            "differ in --change."
        )
    if present["epochs"] < epoch:
        raise Stopped(f"the run has done {epoch} epochs already, and --epochs is {present['epochs']}.")
    if running.extend and present["epochs"] < saved["epochs"]:
        raise Stopped(
            f"--extend is for more epochs than the run's {saved['epochs']}, and --epochs is {present['epochs']}; with "
            "--change epochs they can be fewer."
        )
    return [{"epoch": epoch, "option": name, "from": before, "to": after}
            for name, (before, after) in differing.items()]  # fmt: skip
