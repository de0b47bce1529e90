"""Options that would have no effect beside others: refused where they are given, kept where a recipe brought them."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from perceptual_at.commands.options.method import SPOKEN, asked, epochs_of, keywords, parts, words_of
from perceptual_at.commands.options.settings import Method, Settings
from perceptual_at.commands.options.words import option


class Rule(NamedTuple):
    """Options, when they count, what leaves them without effect, with names of settings in braces, and what does not.

    What would use them is left out where the reason says it.
    """

    options: tuple[str, ...]
    counts: Callable[[Settings], bool]
    beside: str
    used_by: str = ""


def _shifted(chosen: Settings) -> bool:
    return chosen.data.augment == "shift" or (chosen.data.augment is None and not chosen.data.streams)


def _draws(chosen: Settings) -> bool:
    return "mix" in asked(chosen.method) or isinstance(chosen.method.alpha, str)


def calls_an_attack(method: Method) -> bool:
    """Whether the objective calls its attack, in some epoch."""
    pairs = {keywords(method, epoch=epoch).get("pairs") for epoch in epochs_of(method)}
    return method.objective not in ("standard", "random_noise") and (method.objective != "clp" or pairs != {"images"})


STARTING = ("trades", "mart", "cure", "hypersphere", "ikl", "lbgat", "mail", "raat_plus_plus")
"""Objectives whose attack starts where they say; others with a base of their own do so on TRADES and MART."""


def starts_itself(method: Method) -> bool:
    """Whether the objective says where its attack starts."""
    inner = parts(method)[-1]
    base = method.base if inner == method.objective else None
    if base is None and "base" in (own := asked(Method(objective=inner))):
        base = own["base"].default
    noisy = inner == "te" and keywords(method).get("noise") is not None
    return inner in STARTING or base in ("trades", "mart") or noisy


ATTACK = ("attack", "steps", "step_size", "start", "model_mode", "lane", "eps_ramp", "strong_attack_from")
RULES = (
    Rule(("strong_eps", "strong_steps"), lambda s: s.threat.strong_attack_from is not None,
         "without --strong-attack-from"),
    Rule(("peak_at",), lambda s: s.optimisation.schedule == "triangular", "with --schedule {schedule}",
         "--schedule triangular has a peak"),
    Rule(("milestones", "factor"), lambda s: s.optimisation.schedule in ("steps", "rebat"),
         "with --schedule {schedule}", "--schedule steps and rebat drop at milestones"),
    Rule(("extra_share",), lambda s: s.data.extra is not None, "without --extra"),
    Rule(("padding_mode",), lambda s: s.data.padding > 0, "with --padding 0, which moves nothing"),
    Rule(("padding", "padding_mode"), _shifted, "where images are not shifted, with --augment {augment}",
         "--augment shift shifts them"),
    Rule(("flip",), lambda s: s.data.augment != "none", "with --augment none", "the others mirror images"),
    Rule(("root",), lambda s: s.data.on_disk, "with --data {data}, which reads no files", "all other data are read"),
    Rule(("workers",), lambda s: s.data.streams, "with --data {data}, whose images are held in memory",
         "it is for streamed images, --data tars, or folder with --stream"),
    Rule(("held_out",), lambda s: s.evaluation.select_on == "validation", "with --select-on test",
         "--select-on validation holds images out"),
    Rule(("smoothing_over",), lambda s: s.method.smoothing > 0, "without --smoothing"),
    Rule(("concentration",), _draws, "with --objective {objective}, where nothing is drawn from Beta distributions",
         "dicar, the RAAT family and --alpha beta draw"),
    Rule(ATTACK, lambda s: calls_an_attack(s.method), "with --objective {objective}, which attacks nothing",
         "the other objectives attack"),
    Rule(("attack", "step_size", "eps_ramp", "strong_attack_from"), lambda s: s.method.objective != "mma",
         "with --objective mma, which searches for the boundary", "the other objectives use it"),
    Rule(("start", "step_size", "strong_steps"), lambda s: s.threat.attack != "n_fgsm",
         "with --attack n_fgsm, one step of a budget from noise of its own", "the other attacks use it"),
    Rule(("steps", "start", "model_mode", "lane", "eps_ramp", "strong_attack_from"),
         lambda s: s.threat.attack != "free", "with --attack free, which moves one perturbation on",
         "the other attacks use it"),
    Rule(("start",), lambda s: not starts_itself(s.method),
         "with {parts}, whose attack starts at noise around the image", "objectives on PGD-AT use it"),
)  # fmt: skip


def refuse_idle(given: Collection[str], chosen: Settings) -> None:
    """Refuse options that were given but count for nothing.

    Raises:
        ValueError: if there is one.
    """
    values = chosen.flat()
    values["augment"] = values["augment"] or "resized_crop"
    base = f" --base {chosen.method.base}" if chosen.method.base else ""
    values["parts"] = f"--objective {chosen.method.objective}{base}"
    for word in words_of(chosen.method):
        if word.begins is None and word.name in SPOKEN and word.name in given:
            raise ValueError(f"{option(word.name)} has no effect beside {word.written}; give it there.")
    for rule in RULES:
        idle = [name for name in rule.options if name in given]
        if idle and not rule.counts(chosen):
            used = f"; {rule.used_by}" if rule.used_by else ""
            raise ValueError(f"{option(idle[0])} has no effect {rule.beside.format(**values)}{used}.")
