"""Threats, lanes and attacks by their names: a name means one thing in every command, and the report says what."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

import perceptual_at as pat
from perceptual_at.commands.options.settings import Budget
from perceptual_at.commands.options.words import option

LANES = {"none": None, "fp32": pat.Lane(), "bf16": pat.Lane(dtype=torch.bfloat16)}
THREATS: dict[str, Callable[[Any], pat.Threat]] = {"linf": pat.Linf, "l2": pat.L2, "l1": pat.L1}
KNOWN = "fgsm, pgd, cw, apgd (each with a number of steps, as pgd20), fab, square, aa"
_PLAIN: dict[str, Callable[..., Any]] = {
    "fgsm": pat.fgsm, "fab": pat.fab, "square": pat.square, "aa": pat.auto_attack
}  # fmt: skip
_STEPPED: dict[str, Callable[..., Any]] = {"pgd": pat.pgd, "cw": pat.cw, "apgd": pat.apgd}


def threat_of(chosen: Budget, *, name: str = "eps") -> pat.Threat:
    """The threat model; `name` is the option that its budget comes from.

    Raises:
        ValueError: if there is no such budget.
    """
    try:
        return THREATS[chosen.norm](chosen.eps)
    except ValueError as error:
        raise ValueError(f"{option(name)}: {error}") from error


def named_attack(name: str, threat: pat.Threat, *, step_size: float | None = None) -> Callable[..., Any]:
    """An attack by the name it has in tables, `pgd20` say: verdicts of the last iterate after 20 steps.

    The step of `pgd` and `cw` is 2.5 eps over their number unless `step_size` says otherwise.

    Raises:
        ValueError: if the name is unknown.
    """
    kind, steps = _read(name)
    if kind in _PLAIN:
        return functools.partial(_PLAIN[kind], threat=threat, verdict=True)
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    if takes_steps(name) and step_size is not None:
        options["step_size"] = step_size
    return functools.partial(_STEPPED[kind], threat=threat, **options, verdict=True)


def takes_steps(name: str) -> bool:
    """Whether an attack takes steps of a length that can be chosen.

    Raises:
        ValueError: if the name is unknown.
    """
    return _read(name)[0] in ("pgd", "cw")


def _read(name: str) -> tuple[str, int | None]:
    """Kind and number of steps, None where the name says none."""
    if name in _PLAIN:
        return name, None
    match = re.fullmatch(r"(pgd|cw|apgd)(\d*)", name)
    if match is None or match[2].startswith("0"):
        raise ValueError(f"--attacks knows {KNOWN}, not {name!r}.")
    return match[1], int(match[2]) if match[2] else None


def described(name: str, threat: pat.Threat, *, step_size: float | None = None) -> str:
    """What an attack's name means, in words for the report."""
    kind, steps = _read(name)
    if not takes_steps(name):
        named = {"aa": "AutoAttack, standard version"}.get(kind, f"{kind} as the library has it by default")
        return named if steps is None else f"{named}, but with {steps} steps"
    steps = steps or (30 if kind == "cw" else 10)
    length = f"{step_size:.6g}" if step_size is not None else "2.5 eps / steps"
    loss = (
        "the margin (our reading of the column C&W; the source of the printed values is unknown)"
        if kind == "cw"
        else "cross entropy"
    )
    return f"{steps} steps of {length} on {loss}, one random start, last iterate, {threat!r}"
