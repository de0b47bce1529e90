"""Attacks by the names that tables give them. A name means one thing in every command, and the report says what."""

import functools
import re
from collections.abc import Callable
from typing import Any

import perceptual_at as pat

KNOWN = "fgsm, pgd, cw, apgd (each with a number of steps, as pgd20), fab, square, aa"
_PLAIN: dict[str, Callable[..., Any]] = {
    "fgsm": pat.fgsm, "fab": pat.fab, "square": pat.square, "aa": pat.auto_attack
}  # fmt: skip
_STEPPED: dict[str, Callable[..., Any]] = {"pgd": pat.pgd, "cw": pat.cw, "apgd": pat.apgd}


def named_attack(name: str, threat: pat.Threat, *, step_size: float | None = None) -> Callable[..., Any]:
    """An attack by the name it has in tables, `pgd20` say: verdicts of the last iterate after 20 steps.

    The step of `pgd` and `cw` is 2.5 eps over their number unless `step_size` says otherwise.

    Raises:
        ValueError: if the name is unknown.
    """
    if name in _PLAIN:
        return functools.partial(_PLAIN[name], threat=threat, verdict=True)
    match = re.fullmatch(r"(pgd|cw|apgd)(\d*)", name)
    if match is None or match[2].startswith("0"):
        raise ValueError(f"--attacks knows {KNOWN}, not {name!r}.")
    options: dict[str, Any] = {"steps": int(match[2])} if match[2] else {}
    if match[1] != "apgd" and step_size is not None:
        options["step_size"] = step_size
    return functools.partial(_STEPPED[match[1]], threat=threat, **options, verdict=True)


def described(name: str, threat: pat.Threat, *, step_size: float | None = None) -> str:
    """What an attack's name means, in words for the report."""
    match = re.fullmatch(r"(pgd|cw)(\d*)", name)
    if match is None:
        return {"aa": "AutoAttack, standard version"}.get(name, f"{name} as the library has it by default")
    steps = int(match[2]) if match[2] else 30 if match[1] == "cw" else 10
    length = f"{step_size:.6g}" if step_size is not None else "2.5 eps / steps"
    loss = (
        "the margin (our reading of the column C&W; the source of the printed values is unknown)"
        if match[1] == "cw"
        else "cross entropy"
    )
    return f"{steps} steps of {length} on {loss}, one random start, last iterate, {threat!r}"
