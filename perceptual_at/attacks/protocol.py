"""What exactly an ensemble of attacks ran, and what its result may be called."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from perceptual_at.threats import Threat, is_published, norm_name, settings

Options = Mapping[str, Any]
Composition = tuple[tuple[str, Options], ...]

PUBLISHED = ("standard", "plus", "rand")
VERSIONS = (*PUBLISHED, "thorough")

RULE = (
    "a sample counts as broken when one of the attacks found a point inside ball and box that the model misclassifies"
)


def composition_of(version: str, norm: str, classes: int) -> Composition:
    """Attacks and settings of a version of AutoAttack in their order: a published one, or our own `"thorough"`.

    With fewer than ten classes there are fewer than nine wrong ones, and all of them are targets.
    """
    apgd_targets, fab_targets = (min(count, classes - 1) for count in ((5 if norm == "L1" else 9), 9))
    larger: Options = {"from_larger_eps": True} if norm == "L1" else {}
    targeted = ("apgd-t", {"steps": 100, "restarts": 1, "target_classes": apgd_targets, **larger})
    fab_targeted = ("fab-t", {"steps": 100, "restarts": 1, "target_classes": fab_targets})
    square = ("square", {"queries": 5000, "restarts": 1, "reach_edge": False})
    if version == "standard":
        first = ("apgd-ce", {"steps": 100, "restarts": 5 if norm == "L1" else 1, **larger})
        return (first, targeted, fab_targeted, square)
    if version == "thorough":
        surrogate = ("surrogate", {"steps": 200, "restarts": 4, "target_classes": min(9, classes - 1)})
        return (*composition_of("standard", norm, classes), surrogate)
    if version == "plus":
        plain = ("apgd-t", {"steps": 100, "restarts": 1, "target_classes": min(9, classes - 1)})
        five = {"steps": 100, "restarts": 5}
        return (("apgd-ce", five), ("apgd-dlr", five), ("fab", five), square, plain, fab_targeted)
    single = {"steps": 100, "restarts": 1, "eot": 20}
    return (("apgd-ce", single), ("apgd-dlr", single))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The stamp on a result: everything that decides it apart from model and data.

    `name` is that of a published version only where composition, budgets, norm and box are exactly the published
    ones; anything else is called custom and lists its parts. Two results may be compared when their
    `fingerprint` is the same.

    Examples:
        >>> Protocol(Linf(8 / 255), 10, composition_of("standard", "Linf", 10)).name
        'AutoAttack standard, Linf(eps=8/255)'
        >>> Protocol(Linf(8 / 255), 10, (("square", {"queries": 100, "restarts": 1}),)).name
        'custom: square, Linf(eps=8/255)'
    """

    threat: Threat
    classes: int
    composition: Composition
    """Names and settings of the attacks, in their order."""
    backend: str = "native"
    notes: tuple[str, ...] = ()
    """What had to be done otherwise, such as another loss for few classes."""

    @property
    def version(self) -> str:
        """`"standard"`, `"plus"`, `"rand"`, `"thorough"` or `"custom"`."""
        if not is_published(self.threat):
            return "custom"
        for version in VERSIONS:
            if _plain(self.composition) == _plain(composition_of(version, norm_name(self.threat), self.classes)):
                return version
        return "custom"

    @property
    def name(self) -> str:
        """What the result may be called."""
        version = self.version
        what = f"AutoAttack {version}" if version in PUBLISHED else f"{version}: {' + '.join(self.attacks)}"
        return f"{what}, {self.threat!r}"

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks in their order."""
        return tuple(name for name, _ in self.composition)

    @property
    def fingerprint(self) -> str:
        """Digest of everything but the versions of the software."""
        return hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._settings(), "fingerprint": self.fingerprint, "versions": versions()}

    def _settings(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            **settings(self.threat),
            "classes": self.classes,
            "attacks": _plain(self.composition),
            "rule": RULE,
            "backend": self.backend,
            "notes": list(self.notes),
        }


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    from perceptual_at import __version__

    return {"perceptual_at": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _plain(composition: Sequence[tuple[str, Options]]) -> list[list[Any]]:
    """Composition as lists and dictionaries."""
    return [[name, dict(sorted(options.items()))] for name, options in composition]
