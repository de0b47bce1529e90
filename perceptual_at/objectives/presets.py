"""Where the papers and their released codes differ: the keywords of both."""

import functools
import inspect
from collections.abc import Iterable
from typing import Any, Literal

from perceptual_at import _check
from perceptual_at.objectives.combination import BASES

_PAPER_DICAR = {"boundary": "objective", "space": "probabilities", "temperature": 1.0, "average_over": "all"}
_RELEASED_DICAR = {"boundary": "release", "space": "logits", "temperature": 0.5, "average_over": "selected"}

_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "standard": {"paper": {}, "release": {}},
    "random_noise": {"paper": {}, "release": {}},
    "pgd_at": {"paper": {}, "release": {}},
    "trades": {"paper": {}, "release": {"repeat_clean_forward": True}},
    "mart": {"paper": {}, "release": {}},
    "consistency_at": {"paper": {}, "release": {}},
    "rpat": {"paper": {"form": "quotient"}, "release": {"form": "interpolation"}},
    "rebat": {"paper": {}, "release": {}},
    "rpat_plus_plus": {"paper": {}, "release": {}},
    "raat": {"paper": _PAPER_DICAR, "release": _RELEASED_DICAR},
    "raat_plus_plus": {
        "paper": {**_PAPER_DICAR, "beta": 1.0},
        "release": {**_RELEASED_DICAR, "beta": 6.0, "repeat_clean_forward": True},
    },
    "raat_sharp": {"paper": _PAPER_DICAR, "release": _RELEASED_DICAR},
    "rpat_raat": {
        "paper": {**_PAPER_DICAR, "form": "quotient"}, "release": {**_RELEASED_DICAR, "form": "interpolation"},
    },
    "dicar": {source: {name: value for name, value in chosen.items() if name != "boundary"}
              for source, chosen in (("paper", _PAPER_DICAR), ("release", _RELEASED_DICAR))},
    "cure": {"paper": {"beta": 1.0}, "release": {"beta": 5.0}},
    "kd": {"paper": {"form": "kl"}, "release": {"form": "cross_entropy"}},
    # What differs in the others is not among their keywords, or could not be read.
    **{name: {"paper": {}, "release": {}} for name in (
        "adr", "alp", "clp", "ducat", "ewat", "gairat", "grad_align", "hat", "hypersphere", "ikl", "lbgat", "mail",
        "mma", "piat", "score", "sovr", "te",
    )},
}  # fmt: skip


def preset(objective: str, source: Literal["paper", "release"], *, base: str | None = None) -> dict[str, Any]:
    """Keywords that make an objective follow the paper's formula or the released code.

    What is drawn or attacked outside the objective is not in it: RAAT's `mix` (`draw_beta()` in the paper,
    `draw_beta(fold="max")` in the release), the paper's `reduced_attack`, and the attack's `model_mode`.

    Args:
        objective: name of a function of `perceptual_at.objectives`.
        source: `"paper"` or `"release"`.
        base: for `"rpat"` and `"dicar"`, the base they are added to; it and its keywords then come along. Keywords that
            both have (`temperature` of RAAT, `form` of KD) are bound to the base, which is then a partial.

    Returns:
        A new dict of keywords; empty where the two agree.

    Raises:
        ValueError: if a name is unknown, or the objective takes no base.

    Source:
        The pages on each method list the differences.

    Examples:
        >>> preset("rpat", "paper")
        {'form': 'quotient'}
        >>> preset("rpat", "release", base="trades")
        {'base': 'trades', 'repeat_clean_forward': True, 'form': 'interpolation'}
        >>> preset("raat", "release")["temperature"]
        0.5
    """
    _check.choice("preset", "objective", objective, tuple(_PRESETS))
    _check.choice("preset", "source", source, ("paper", "release"))
    keywords = dict(_PRESETS[objective][source])
    if base is not None:
        if objective not in ("rpat", "dicar"):
            raise ValueError(
                f"preset: `base`={base!r} has no effect with objective={objective!r}, which takes no base."
            )
        _check.choice("preset", "base", base, BASES)
        chosen, of_base = bound_base(base, source, [objective])
        keywords = {"base": chosen, **of_base, **keywords}
    return keywords


def bound_base(base: str, source: str, above: Iterable[str]) -> tuple[Any, dict[str, Any]]:
    """A base and the keywords of its preset; those that an objective above it has too are bound to it, as its own."""
    from perceptual_at import objectives  # the names of this package are complete only now

    taken = {name for objective in above for name in inspect.signature(getattr(objectives, objective)).parameters}
    held = {name: value for name, value in _PRESETS[base][source].items() if name in taken}
    rest = {name: value for name, value in _PRESETS[base][source].items() if name not in taken}
    return functools.partial(getattr(objectives, base), **held) if held else base, rest
