"""What the options of a method mean to its objective: the keywords that it is called with."""

import ast
import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from perceptual_at import objectives
from perceptual_at.commands.options.settings import Method, Settings
from perceptual_at.commands.options.words import literals, meant, option, pairs
from perceptual_at.objectives.combination import BASES
from perceptual_at.objectives.presets import bound_base

SPOKEN = ("form", "criterion", "weight", "alpha", "beta", "eta", "misclassified", "temperature", "consistency_weight",
          "average_over")  # fmt: skip
"""Options that are keywords of objectives under the same name."""
OBJECTIVES = tuple(name for name in objectives.__all__ if name != "preset")
ADDED = ("rpat", "dicar")
"""Objectives that are a term on top of another one."""
SUPPLIED = ("mix", "average", "generator", "threat", "steps", "targets", "margins", "helper", "standard_teacher",
            "robust_teacher", "teacher", "table")  # fmt: skip
"""Keywords that a run supplies, step by step."""
BESIDE: dict[str, dict[str, Any]] = {
    "te": {"start": 90, "length": 60, "momentum": 0.9},
    "mma": {"smallest": 0.005, "search_steps": 10},
    "adr": {"temperature_end": 2.0, "trust_end": 0.95},
    "cure": {"share": 0.3, "natural_weight": 0.1, "robust_weight": 0.9, "update_share": 0.2, "decay": 0.999},
    "piat": {"warmup": 0},
}
"""Numbers that belong to a method but are no keywords of its objective, with the values of the released codes."""
BESIDE_RANGES: dict[str, tuple[type, float, float]] = {
    "start": (int, 0, math.inf), "length": (int, 1, math.inf), "momentum": (float, 0, 1),
    "smallest": (float, 0, math.inf), "search_steps": (int, 1, math.inf), "temperature_end": (float, 0, math.inf),
    "trust_end": (float, 0, 1), "share": (float, 0, 1), "natural_weight": (float, 0, math.inf),
    "robust_weight": (float, 0, math.inf), "update_share": (float, 0, 1), "decay": (float, 0, 1),
    "warmup": (int, 0, math.inf),
}  # fmt: skip
"""Kind, least and greatest value of each."""
ELSEWHERE = {"base": "--base", "perceive": "--perceive"}
"""Keywords that have an option of their own, which more than the objective depends on."""
UNWRITTEN = ("clean_logits", "kappa", "mask", "reduced_attack", "sums")
"""Keywords that are tensors or functions, which no word stands for."""
TWO_VIEWS = ("consistency_at", "dicar", "raat", "raat_plus_plus", "raat_sharp", "rpat_raat")
"""Objectives that look at two augmentations of every image."""


def objective_named(name: str) -> Callable[..., Any]:
    """The function of `perceptual_at.objectives`."""
    if name not in OBJECTIVES:
        raise ValueError(f"--objective knows {', '.join(OBJECTIVES)}, not {name!r}{meant(name, OBJECTIVES)}.")
    function: Callable[..., Any] = getattr(objectives, name)
    return function


def parts(method: Method) -> tuple[str, ...]:
    """The objectives that a method consists of, outermost first: `rpat` on `dicar+trades` has three."""
    added = method.objective in ADDED and method.base is not None
    return (method.objective, *(method.base.split("+") if added and method.base else ()))


def two_views(method: Method) -> bool:
    """Whether the method takes two augmentations of every image; some have a base of their own that does."""
    return bool({*parts(method), method.base} & set(TWO_VIEWS))


def asked(method: Method) -> dict[str, inspect.Parameter]:
    """The keywords that the objective takes, those of its base included."""
    known: dict[str, inspect.Parameter] = {}
    for name in parts(method):
        if name != method.objective and name not in BASES:
            raise ValueError(f"--base knows {', '.join(BASES)}, not {name!r}{meant(name, BASES)}.")
        known = {**inspect.signature(objective_named(name)).parameters, **known}
    return {name: parameter for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY}


def beside(method: Method) -> dict[str, Any]:
    """Numbers of the method that are no keywords of its objective."""
    values = {name: value for part in parts(method) for name, value in BESIDE.get(part, {}).items()}
    return values | {word.name: word.value for word in words_of(method) if word.name in values and word.begins is None}


class Word(NamedTuple):
    """A keyword that was written in `--options`, or in `--later` with the epoch from which it counts."""

    begins: int | None
    name: str
    value: Any
    written: str


def words_of(method: Method) -> list[Word]:
    """All keywords that were written out, in the order in which they count."""
    found = [Word(None, name, _literal(text), f"--options {name}={text}")
             for name, text in pairs("options", method.options).items()]  # fmt: skip
    later: list[Word] = []
    for word in method.later:
        epoch, colon, pair = word.partition(":")
        name, equals, text = pair.partition("=")
        if not (colon and epoch.isdecimal() and name and equals and text):
            raise ValueError(f"--later takes epoch:name=value, got {word!r}.")
        if any((other.begins, other.name) == (int(epoch), name) for other in later):
            raise ValueError(f"--later gives {name!r} twice at epoch {epoch}.")
        later.append(Word(int(epoch), name, _literal(text), f"--later {word}"))
    return found + sorted(later, key=lambda word: word.begins or 0)


def epochs_of(method: Method) -> list[int]:
    """The epochs in which keywords begin to count, the first one included."""
    return sorted({0, *(word.begins or 0 for word in words_of(method))})


def keywords(method: Method, *, epoch: int = 0) -> dict[str, Any]:
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
    for word in words_of(method):
        _refuse_word(word, method, known)
        if word.name in known and (word.begins or 0) <= epoch:
            chosen[word.name] = word.value
    if method.base is not None:
        chosen["base"] = _base(method, known)
    return chosen


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _refuse_word(word: Word, method: Method, known: dict[str, inspect.Parameter]) -> None:
    """Refuse a keyword that the method does not take, or takes from somewhere else."""
    own = beside(method)
    if word.name in own:
        if word.begins is not None:
            raise ValueError(f"{word.written}: {word.name!r} is the same in all epochs; give it in --options.")
        _check_beside(word, BESIDE_RANGES[word.name])
        return
    if word.name not in known:
        close = meant(word.name, [*known, *own])
        raise ValueError(f"{word.written}: {method.objective} takes no {word.name!r}{close}.")
    instead = ELSEWHERE.get(word.name)
    if word.name == "scale" and "hypersphere" in parts(method):
        instead = "--cosines"
    if word.name == "alpha" and isinstance(method.alpha, str):
        instead = f"--alpha {method.alpha}"
    if instead:
        raise ValueError(f"{word.written} has no effect: {instead} says it.")
    averaged = word.name == "teacher_mode" and "average" in known and "cure" not in parts(method)
    if word.name in UNWRITTEN or averaged or (word.name in SUPPLIED and (word.name, word.value) != ("table", None)):
        raise ValueError(f"{word.written} has no effect: the run supplies {word.name!r}.")


def _check_beside(word: Word, within: tuple[type, float, float]) -> None:
    kind, least, most = within
    value = word.value
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (fits and least <= value <= most and (value > 0 or word.name not in ("smallest", "temperature_end"))):
        wanted = "a whole number" if kind is int else "a number"
        limits = f"of at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
        above = ", above 0" if word.name in ("smallest", "temperature_end") else ""
        raise ValueError(f"{word.written} must be {wanted} {limits}{above}.")


def _base(method: Method, known: dict[str, inspect.Parameter]) -> Any:
    """What stands for the base in the call: a name, or both terms on one."""
    if "base" not in known:
        raise ValueError(f"--base has no effect with --objective {method.objective}.")
    own, *below = parts(method)
    if not below:  # a base of the objective's own
        allowed = literals(typing.get_type_hints(objective_named(own))["base"])
        if method.base not in allowed:
            raise ValueError(f"--base knows {', '.join(allowed)} with --objective {own}, not {method.base!r}.")
        return method.base
    if len(below) > 2 or (len(below) == 2 and (own, below[0]) != ("rpat", "dicar")):
        raise ValueError(f"--base is a name, or dicar+NAME with --objective rpat, not {method.base!r}.")
    if "dicar" in (own, *below[:-1]) and "mix" in inspect.signature(objective_named(below[-1])).parameters:
        raise ValueError(f"--base {method.base}: {below[-1]} has DICAR's term already.")
    last: Any = "pgd_at" if below == ["dicar"] else bound_base(below[-1], method.source, parts(method)[:-1])[0]
    if below[0] != "dicar":
        return last
    return functools.partial(objectives.dicar, **objectives.preset("dicar", method.source), base=last)


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
    missing = [name for name, parameter in known.items() if parameter.default is parameter.empty
               and name not in (*keywords(method), *SUPPLIED)]  # fmt: skip
    if missing:
        raise ValueError(f"--options {missing[0]}=VALUE is needed by {method.objective}.")
    if "average" in known and "cure" not in parts(method) and optimisation.average_decay is None:
        raise ValueError(f"--average-decay is needed by {method.objective}, whose term takes averaged weights.")
    if optimisation.averaging == "swa" and optimisation.average_decay is not None:
        raise ValueError("--average-decay has no effect with --averaging swa.")
    if optimisation.averaging == "ramp" and optimisation.average_decay is None:
        raise ValueError("--averaging ramp needs --average-decay, the decay in the end.")
    if not optimisation.averages and optimisation.average_start:
        raise ValueError("--average-start has no effect without --average-decay.")
    if method.perceive is not None and "perceive" not in known:
        raise ValueError(f"--perceive has no effect with --objective {method.objective}.")
    if (method.boundary_perturbation or method.interior_perturbation) and method.objective != "pgd_at":
        raise ValueError("--boundary-perturbation and --interior-perturbation go with --objective pgd_at.")
    if method.source == "paper" and not _preset(method) and not _paper_differs(settings):
        raise ValueError(
            f"--source paper has no effect with --objective {method.objective}, where paper and release agree."
        )
    if optimisation.awp is None and (optimisation.awp_start or optimisation.awp_form != "awp"):
        raise ValueError("--awp-start and --awp-form have no effect without --awp.")
    _check_parts(settings)


def _check_parts(settings: Settings) -> None:
    """Refuse what goes with one method or attack and not with this one."""
    method, threat, network = settings.method, settings.threat, settings.network
    names = parts(method)
    if ("ducat" in names) != network.dummies:
        raise ValueError("--dummies goes with ducat, which needs it.")
    if ("hypersphere" in names) != (network.cosines is not None):
        raise ValueError("--cosines SCALE goes with hypersphere, which needs it.")
    if network.second is not None and "lbgat" not in names:
        raise ValueError(f"--second has no effect with --objective {method.objective}.")
    if threat.attack != "friendly" and (threat.patience or threat.attack_noise):
        raise ValueError("--patience and --attack-noise go with --attack friendly.")
    if threat.attack == "free" and (names != ("pgd_at",) or settings.optimisation.awp is not None or method.smoothing):
        raise ValueError("--attack free goes with --objective pgd_at alone, without --awp and --smoothing.")
    if settings.optimisation.replays > 1 and threat.attack != "free":
        raise ValueError("--replays goes with --attack free.")
    if threat.strong_attack_from is not None and threat.strong_eps < threat.eps:
        raise ValueError(
            f"--strong-eps {threat.strong_eps:g} is less than --eps {threat.eps:g}; the later attack is the stronger."
        )
    if threat.attack == "n_fgsm" and threat.steps != 1:
        raise ValueError(f"--attack n_fgsm takes one step: --steps must be 1, got {threat.steps}.")
    if "cure" in names and settings.running.precision == "fp16":
        raise ValueError("--precision fp16 cannot be had with cure, which revises gradients that are not scaled.")
    if method.cutmix and threat.attack in ("friendly", "least_likely"):
        raise ValueError(f"--cutmix cannot be had with --attack {threat.attack}, which needs one right class.")
    if method.smoothing and method.cutmix:
        raise ValueError("--smoothing has no effect with --cutmix, which makes labels of its own.")


def _preset(method: Method) -> dict[str, Any]:
    """The keywords of the source, those of the last base included that nothing above it has."""
    *above, last = parts(method)
    chosen = objectives.preset(method.objective, method.source)
    if above and last != "dicar":
        _, of_base = bound_base(last, method.source, above)
        chosen = of_base | chosen
    return chosen


def _paper_differs(settings: Settings) -> bool:
    """Whether `--source` decides anything outside of the objective's keywords."""
    known = asked(settings.method)
    release = dataclasses.replace(settings.method, source="release")
    return "mix" in known or "average" in known or bool(_preset(release))
