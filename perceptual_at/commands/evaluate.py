"""Evaluate any model, or whole run folders, under named attacks; killed at any moment, the same call goes on.

    perceptual-at evaluate --run runs/rpat-0 runs/rpat-1 --attacks pgd20 cw20 aa
    perceptual-at evaluate --model "my_package.models:build(3, wide=True)" --checkpoint model.pt --data digits
    perceptual-at evaluate --model robustbench:Wong2020Fast --root data --samples 1000
    torchrun --nproc-per-node 4 -m -- perceptual_at evaluate --run runs/rpat-0  # processes share the samples

A run folder is enough: network, weights, images and threat come from its result.json, best and final weights are both
evaluated. `--model module:function(...)` imports code, also from the working folder, and so does a run that was trained
with one. Reports are report.json and report.md, with the verdicts so far in a record (record-*.jsonl): below the run
folder, or in `--out`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import perceptual_at as pat
from perceptual_at.checkpoints import weights_checksum, written_whole
from perceptual_at.commands.endings import Stopped, collected, locked, said
from perceptual_at.commands.evaluating.results import report_at
from perceptual_at.commands.evaluating.sharing import Processes, join, joined_processes, name_of, part_path
from perceptual_at.commands.evaluating.targets import Target, chosen_rows, targets_of
from perceptual_at.commands.evaluating.wishes import Measures, Wishes, check
from perceptual_at.commands.ingredients.images import batches, fingerprint, images_of
from perceptual_at.commands.ingredients.protocol import LANES, described, named_attack
from perceptual_at.commands.options.reading import parse


def evaluated(target: Target, wishes: Wishes, processes: Processes) -> pat.Evaluation | None:
    """The report on one target, written and given by the leading process."""
    protocol, threat = wishes.evaluation, target.threat
    attacks = {name: named_attack(name, threat, step_size=protocol.step_size) for name in protocol.attacks}
    with processes.leader_first():
        try:
            images = images_of(target.images, wishes.images.split)
        except FileNotFoundError as error:
            hint = "" if wishes.images.root else " If they are elsewhere, --root says where."
            raise Stopped(f"{error}{hint}") from error
    other = None if wishes.running.against is None else report_at(wishes.running.against)  # which this may write over
    present = torch.accelerator.is_available() and not wishes.running.cpu  # a build for CUDA names it without one
    device = (torch.accelerator.current_accelerator() if present else None) or torch.device("cpu")
    model = target.made(images).to(device)
    weights, leader = weights_checksum(model), processes.rank == 0
    rows = torch.split(chosen_rows(images, wishes), protocol.batch)
    what = (wishes.models.model, weights, fingerprint(images), wishes.images.samples, threat, _decisive(protocol))
    whole = target.out / name_of(*what)

    def judged(rows: Sequence[Tensor], record: Path, *, checks: bool) -> pat.Evaluation:
        served = batches(images, rows, workers=wishes.images.workers)
        return pat.evaluate(
            model, ((x, labels, index) for index, (x, labels) in zip(rows, served, strict=True)), attacks,
            device=device, progress=leader and sys.stderr.isatty(), seed=protocol.seed, cascade=protocol.cascade,
            repeats=protocol.repeats, checks=checks, classes=images.classes, lane=LANES[protocol.lane], record=record,
        )  # fmt: skip

    with locked(target.out, "--out") if leader else contextlib.nullcontext():
        part, mine = part_path(whole, processes), rows[processes.rank :: processes.ranks]
        if mine and processes.ranks > 1:
            judged(mine, part, checks=False)
        processes.meet()
        if not leader:
            return None
        join(whole)
        result = judged(rows, whole, checks=protocol.checks)
        said = {"weights": weights, "images": f"{target.images.data}, {wishes.images.split}"}
        result = dataclasses.replace(result, provenance={**result.provenance, **said})
        write_result(result, target, wishes, other)
    return result


def _decisive(protocol: Measures) -> Measures:
    """The part of the protocol that verdicts depend on."""
    return dataclasses.replace(protocol, batch=Measures.batch, checks=False)


def write_result(result: pat.Evaluation, target: Target, wishes: Wishes, other: pat.Evaluation | None) -> None:
    """report.json and report.md, with a comparison where there is another evaluation."""
    names = wishes.evaluation.attacks
    meant = {name: described(name, target.threat, step_size=wishes.evaluation.step_size) for name in names}
    lines = [f"# {target.name}", "", f"{target.images.data}, {target.threat!r}", "", result.to_markdown()]
    lines += ["", "What the columns mean:", "", *(f"- {name}: {text}" for name, text in meant.items()), ""]
    result.to_json(target.out / "report.json")  # before what else may be wrong
    if other is not None:
        comparison = pat.compare(result, other, names=("this", "the other"))
        lines += [f"Against {wishes.running.against}:", "", comparison.to_markdown(), ""]
    text = "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # names of files need not be text
    with written_whole(target.out / "report.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text, flush=True)


def main(wishes: Wishes) -> list[pat.Evaluation | None]:
    """Evaluate everything that was asked for.

    Raises:
        Stopped: if something cannot be evaluated.
    """
    check(wishes)
    with joined_processes(cpu=wishes.running.cpu) as processes:
        try:
            return [evaluated(target, wishes, processes) for target in targets_of(wishes)]
        except NotImplementedError as error:  # torch's: a network without `forward`, an operation a device lacks
            raise Stopped(str(error)) from error


def command(arguments: list[str]) -> None:
    """`perceptual-at evaluate`: settings from the command line, errors as one line."""
    with said("perceptual-at evaluate", "The same call goes on where it stopped."), collected():
        wishes = parse(arguments, Wishes, Wishes(), "perceptual-at evaluate", description=__doc__ or "")
        main(wishes)
