"""What the options of a method mean to its objective: the keywords that it is called with."""

import ast
import inspect
from collections.abc import Callable
from typing import Any

from perceptual_at import objectives
from perceptual_at.commands.settings import Method, Settings
from perceptual_at.commands.words import meant, option, pairs

SPOKEN = ("form", "criterion", "weight", "alpha", "beta", "eta", "misclassified", "temperature", "consistency_weight",
          "average_over")  # fmt: skip
"""Options that are keywords of objectives under the same name."""
OBJECTIVES = tuple(name for name in objectives.__all__ if name != "preset")


def objective_named(name: str) -> Callable[..., Any]:
    """The function of `perceptual_at.objectives`."""
    if name not in OBJECTIVES:
        raise ValueError(f"--objective knows {', '.join(OBJECTIVES)}, not {name!r}{meant(name, OBJECTIVES)}.")
    function: Callable[..., Any] = getattr(objectives, name)
    return function


def asked(method: Method) -> dict[str, inspect.Parameter]:
    """The keywords that the objective takes, those of its base included."""
    own = dict(inspect.signature(objective_named(method.objective)).parameters)
    if "base" in own and method.base is not None:
        own = {**inspect.signature(objective_named(method.base)).parameters, **own}
    return own


def keywords(method: Method) -> dict[str, Any]:
    """The keywords of the objective: the preset's, then those given. One that it does not take is refused."""
    known = asked(method)
    chosen = _preset(method)
    for name in SPOKEN:
        value = getattr(method, name)
        if value is None:
            continue
        taken = name if name in known else {"temperature": "consistency_temperature"}.get(name, "")
        by_group = name == "eta" and (method.boundary_perturbation or method.interior_perturbation)
        if by_group:
            continue
        if taken not in known:
            raise ValueError(f"{option(name)} has no effect with --objective {method.objective}.")
        if not isinstance(value, str) or name != "alpha":  # a drawn alpha is supplied step by step
            chosen[taken] = value
    if method.source == "paper" and "reduced_attack" in known:
        chosen.pop("eta", None)  # the paper's reduced sample comes from an attack of its own, of that size
    for name, text in pairs("options", method.options).items():
        if name not in known:
            raise ValueError(f"--options: {method.objective} takes no {name!r}{meant(name, known)}.")
        try:
            chosen[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            chosen[name] = text
    if method.base is not None and "base" not in known:
        raise ValueError(f"--base has no effect with --objective {method.objective}.")
    return chosen


def effective(method: Method) -> dict[str, Any]:
    """The options of the method with the values that they really have, where they were left to the objective."""
    known, chosen = asked(method), keywords(method)
    values = {}
    for name in SPOKEN:
        taken = name if name in known else "consistency_temperature" if name == "temperature" else name
        if taken in known:
            default = known[taken].default
            values[name] = chosen.get(taken, None if default is inspect.Parameter.empty else default)
    if isinstance(method.alpha, str):
        values["alpha"] = method.alpha
    if "eta" in values and values["eta"] is None:
        values["eta"] = 0.1 if method.eta is None else method.eta
    return {name: value for name, value in values.items() if value is not None}


def check(settings: Settings) -> None:
    """Refuse options of the method that contradict each other.

    Raises:
        ValueError: if one has no effect or needs another.
    """
    method, optimisation = settings.method, settings.optimisation
    known = asked(method)
    keywords(method)
    if "average" in known and optimisation.average_decay is None:
        raise ValueError(f"--average-decay is needed by {method.objective}, whose term takes averaged weights.")
    if optimisation.average_decay is None and optimisation.average_start:
        raise ValueError("--average-start has no effect without --average-decay.")
    if method.perceive is not None and "perceive" not in known:
        raise ValueError(f"--perceive has no effect with --objective {method.objective}.")
    if (method.boundary_perturbation or method.interior_perturbation) and method.objective != "pgd_at":
        raise ValueError("--boundary-perturbation and --interior-perturbation go with --objective pgd_at.")
    if method.source == "paper" and not _preset(method) and not _paper_differs(settings):
        raise ValueError(
            f"--source paper has no effect with --objective {method.objective}, where paper and release agree."
        )
    if optimisation.awp is None and optimisation.awp_start:
        raise ValueError("--awp-start has no effect without --awp.")


def _preset(method: Method) -> dict[str, Any]:
    if method.objective == "dicar":  # DICAR by RAAT's choices, on whatever base
        shared = objectives.preset("raat", method.source)
        chosen = {name: shared[name] for name in ("space", "temperature", "average_over")}
        base = {} if method.base is None else {"base": method.base, **objectives.preset(method.base, method.source)}
        return chosen | base
    try:
        if method.base is not None and method.objective == "rpat":
            return objectives.preset("rpat", method.source, base=method.base)
        return objectives.preset(method.objective, method.source)
    except ValueError:  # an objective whose paper and release agree on all that can be chosen
        return {}


def _paper_differs(settings: Settings) -> bool:
    """Whether `--source` decides anything outside of the objective's keywords."""
    known = asked(settings.method)
    if "mix" in known or "average" in known:
        return True
    preset: dict[str, Any] = {}
    try:
        preset = objectives.preset(settings.method.objective, "release")
    except ValueError:
        return False
    return bool(preset)
