"""Options that would have no effect beside others: refused where they are given, kept where a recipe brought them."""

from collections.abc import Callable
from typing import NamedTuple

from perceptual_at.commands.options.method import asked
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.options.words import option


class Rule(NamedTuple):
    """Options, when they count, and what leaves them without effect, with names of settings in braces."""

    options: tuple[str, ...]
    counts: Callable[[Settings], bool]
    beside: str


def _shifted(chosen: Settings) -> bool:
    streamed = chosen.data.data == "tars" or chosen.data.stream
    return chosen.data.augment == "shift" or (chosen.data.augment is None and not streamed)


def _draws(chosen: Settings) -> bool:
    return "mix" in asked(chosen.method) or isinstance(chosen.method.alpha, str)


def _attacks(chosen: Settings) -> bool:
    return chosen.method.objective not in ("standard", "random_noise")


RULES = (
    Rule(("strong_eps", "strong_steps"), lambda s: s.threat.strong_attack_from is not None,
         "without --strong-attack-from"),
    Rule(("peak_at",), lambda s: s.optimisation.schedule == "triangular", "with --schedule {schedule}"),
    Rule(("milestones", "factor"), lambda s: s.optimisation.schedule in ("steps", "rebat"),
         "with --schedule {schedule}"),
    Rule(("padding", "padding_mode"), _shifted, "where images are not shifted, with --augment {augment}"),
    Rule(("flip",), lambda s: s.data.augment != "none", "with --augment none"),
    Rule(("smoothing_over",), lambda s: s.method.smoothing > 0, "without --smoothing"),
    Rule(("concentration",), _draws, "with --objective {objective}, where nothing is drawn from Beta distributions"),
    Rule(("step_size",), lambda s: s.threat.attack != "n_fgsm", "with --attack n_fgsm"),
    Rule(("lane", "eps_ramp", "strong_attack_from"), lambda s: s.threat.attack != "free", "with --attack free"),
    Rule(("attack", "lane", "eps_ramp", "strong_attack_from"), _attacks,
         "with --objective {objective}, which attacks nothing"),
)  # fmt: skip


def refuse_idle(start: Settings, chosen: Settings) -> None:
    """Refuse options that differ from those of the recipe but count for nothing.

    Raises:
        ValueError: if there is one.
    """
    before, values = start.flat(), chosen.flat()
    values["augment"] = values["augment"] or "resized_crop"
    for rule in RULES:
        idle = [name for name in rule.options if values[name] != before[name]]
        if idle and not rule.counts(chosen):
            raise ValueError(f"{option(idle[0])} has no effect {rule.beside.format(**values)}.")
