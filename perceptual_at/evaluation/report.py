"""What an evaluation found: verdicts per sample, and every number that follows from them."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceptual_at._files import written_whole
from perceptual_at.evaluation.checks import Check
from perceptual_at.evaluation.statistics import Interval, wilson_interval
from perceptual_at.evaluation.tables import latex_table, markdown_table
from perceptual_at.metrics import mean_score, nrr

RESERVED = ("n", "clean", "worst_case", "mean", "nrr")
"""Names of numbers in the report, which no attack can have."""

_FORMAT = "perceptual_at evaluation, version 1"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an attack took for all samples it was given.

    Examples:
        >>> Cost(1.5, gradients=200, forwards=210).gradients
        200
    """

    seconds: float
    """Time of the attack and of judging what it returned."""
    gradients: int | None = None
    """Input gradients, if the attack counted them (`verdict=True`)."""
    forwards: int | None = None
    """Forward passes, those of the gradients included."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Verdicts of one evaluation; every number is derived from them.

    Accuracies are fractions in [0, 1]. A sample is robust against an attack when it is classified right both
    as it is and as the attack returned it.

    Examples:
        >>> result = Evaluation(torch.tensor([True, True, False]), {"pgd": torch.tensor([True, False, False])})
        >>> f"clean {result.clean_accuracy:.2f}, worst case {result.worst_case:.2f}, NRR {result.nrr:.2f}"
        'clean 0.67, worst case 0.33, NRR 0.44'
        >>> f"{result.interval('worst_case').high:.2f}"  # three samples say little
        '0.79'
    """

    correct: Tensor
    """Right on the clean input, boolean `(n,)` in the loader's order."""
    robust: dict[str, Tensor]
    """For each attack, right on the clean and on the adversarial input, boolean `(n,)`. With `cascade`, and on the
    adversarial inputs of all attacks before."""
    _: dataclasses.KW_ONLY
    labels: Tensor | None = None
    """Class of each sample, `(n,)`."""
    index: Tensor | None = None
    """What the loader called each sample, `(n,)`."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    costs: Mapping[str, Cost] = dataclasses.field(default_factory=dict)
    """Time and queries per attack."""
    repeated: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """For a random model judged several times, the verdicts of every repeat by `"clean"` and attack, boolean
    `(repeats, n)`. `correct` and `robust` are then their worst case: right every time."""
    cascade: bool = False
    """Whether samples left after the first attack that broke them."""
    warnings: tuple[str, ...] = ()
    """What speaks against taking the numbers at face value."""
    checks: tuple[Check, ...] = ()
    """The sanity checks, if they were run."""
    attacks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """For each attack its call, which point was judged, and its protocol if it has one."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fingerprints of model and data, settings, versions, device."""

    def __len__(self) -> int:
        return self.correct.shape[0]

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that are right on the clean input."""
        return _share(self.correct)

    @property
    def robust_accuracy(self) -> dict[str, float]:
        """Share of samples that are robust, per attack."""
        return {name: _share(verdicts) for name, verdicts in self.robust.items()}

    @property
    def worst_case(self) -> float:
        """Share of samples that are robust against every attack."""
        return _share(self.verdicts("worst_case"))

    @property
    def mean(self) -> float:
        """Mean of clean and worst-case accuracy."""
        return mean_score(self.clean_accuracy, self.worst_case)

    @property
    def nrr(self) -> float:
        """Harmonic mean of clean and worst-case accuracy."""
        return nrr(self.clean_accuracy, self.worst_case)

    def verdicts(self, name: str) -> Tensor:
        """Verdicts per sample, boolean `(n,)`, by `"clean"`, `"worst_case"` or the name of an attack."""
        if name == "clean":
            return self.correct
        if name != "worst_case":
            return self.robust[name]
        verdicts = self.correct
        for robust in self.robust.values():
            verdicts = verdicts & robust
        return verdicts

    def interval(self, name: str, *, confidence: float = 0.95) -> Interval:
        """Wilson's interval of an accuracy: what it may be on other samples of the same distribution."""
        verdicts = self.verdicts(name)
        return wilson_interval(int(verdicts.sum()), len(verdicts), confidence=confidence)

    def per_class(self) -> dict[str, dict[str, float]]:
        """For each class that occurs, its number of samples `"n"` and its accuracies by name."""
        if self.labels is None:
            raise ValueError("Evaluation.per_class: the classes of the samples are not known.")
        found = {}
        for label in sorted(set(self.labels.tolist())):
            of_class = self.labels == label
            numbers = {name: _share(self.verdicts(name)[of_class]) for name in self.columns}
            found[self.classes[label] if self.classes else str(label)] = {"n": int(of_class.sum()), **numbers}
        return found

    def mean_over_repeats(self) -> dict[str, float]:
        """For a random model, the mean accuracy of the repeats by `"clean"` and attack; else the accuracies."""
        return {name: _share(self.repeated.get(name, self.verdicts(name))) for name in ("clean", *self.robust)}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the accuracies: clean, the attacks, the worst case."""
        return ("clean", *self.robust, "worst_case")

    def to_dict(self) -> dict[str, Any]:
        """The numbers alone, for JSON; accuracies are fractions."""
        return {
            "n": len(self),
            "clean": self.clean_accuracy,
            **self.robust_accuracy,
            "worst_case": self.worst_case,
            "mean": self.mean,
            "nrr": self.nrr,
        }

    def __str__(self) -> str:
        numbers = [f"{name} {100 * value:.2f}" for name, value in self.to_dict().items() if name != "n"]
        return f"{', '.join(numbers)} (%, n={len(self)})"

    def to_markdown(self) -> str:
        """The report: a table in percent, how it was measured, and what speaks against it."""
        head = ("", "accuracy, %", "95 % interval", "gradients", "forwards", "seconds")
        lines = [markdown_table(head, self._rows()), "", *self._statements()]
        if self.labels is not None:
            names = ("class", "n", *self.columns)
            rows = [
                (name, *(_cell(key, value) for key, value in row.items())) for name, row in self.per_class().items()
            ]
            lines += ["", markdown_table(names, rows)]
        lines += ["", *(f"- Warning: {text}." for text in self.warnings)] if self.warnings else []
        lines += ["", *(f"- {check}" for check in self.checks)] if self.checks else []
        return "\n".join(lines) + "\n"

    def to_latex(self) -> str:
        """The accuracies and their intervals, in percent, as a `tabular`."""
        return latex_table(("", r"accuracy, \%", r"95\,\% interval"), [row[:3] for row in self._rows()])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything, verdicts included, to a file, whole or not at all."""
        content = {
            "format": _FORMAT,
            "summary": self.to_dict(),
            "intervals": {name: self.interval(name) for name in self.columns},
            "verdicts": {"clean": _text(self.correct)} | {name: _text(own) for name, own in self.robust.items()},
            "labels": None if self.labels is None else self.labels.tolist(),
            "index": None if self.index is None else self.index.tolist(),
            "classes": self.classes,
            "costs": {name: dataclasses.asdict(cost) for name, cost in self.costs.items()},
            "repeated": {name: [_text(own) for own in passes] for name, passes in self.repeated.items()},
            "cascade": self.cascade,
            "warnings": self.warnings,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "attacks": self.attacks,
            "provenance": self.provenance,
        }
        with written_whole(path) as beside:
            beside.write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """What `to_json` wrote.

        Raises:
            ValueError: if the file is of another kind.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"Evaluation.from_json: {os.fspath(path)!r} was not written by Evaluation.to_json.")
        verdicts = {name: _mask(text) for name, text in content["verdicts"].items()}
        return cls(
            verdicts.pop("clean"),
            verdicts,
            labels=None if content["labels"] is None else torch.tensor(content["labels"]),
            index=None if content["index"] is None else torch.tensor(content["index"]),
            classes=tuple(content["classes"]),
            costs={name: Cost(**cost) for name, cost in content["costs"].items()},
            repeated={name: torch.stack([_mask(t) for t in texts]) for name, texts in content["repeated"].items()},
            cascade=content["cascade"],
            warnings=tuple(content["warnings"]),
            checks=tuple(Check(**check) for check in content["checks"]),
            attacks=content["attacks"],
            provenance=content["provenance"],
        )

    def plot(self, *, ax: Any = None) -> Any:
        """Bars of the accuracies with their intervals; see `plotting.accuracy_bars`."""
        from perceptual_at.plotting import accuracy_bars  # matplotlib stays optional

        return accuracy_bars({"": self}, ax=ax)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for name in self.columns:
            low, high = self.interval(name)
            cost = self.costs.get(name)
            spent = (cost.gradients, cost.forwards, f"{cost.seconds:.1f}") if cost else (None, None, None)
            cells = ("" if value is None else str(value) for value in spent)
            share = f"{100 * _share(self.verdicts(name)):.2f}"
            rows.append(
                (name.replace("worst_case", "worst case"), share, f"{100 * low:.2f} to {100 * high:.2f}", *cells)
            )
        blank = ("",) * 4
        return [*rows, ("mean", f"{100 * self.mean:.2f}", *blank), ("NRR", f"{100 * self.nrr:.2f}", *blank)]

    def _statements(self) -> list[str]:
        """How it was measured, in sentences."""
        points = ", ".join(f"{name}: {held['judged']}" for name, held in self.attacks.items() if "judged" in held)
        judged = f" ({points})" if points else ""
        rule = f"Robust: right without attack and on the input that the attack returned{judged}."
        lines = [f"{len(self)} samples. {rule} The worst case is taken per sample."]
        if self.cascade:
            lines.append(
                "In cascade: each attack was given what those before it left, and its column counts all of them."
            )
        if self.repeated:
            means = ", ".join(f"{name} {100 * value:.2f}" for name, value in self.mean_over_repeats().items())
            times = len(self.repeated["clean"])
            lines.append(
                f"The model is random: right means right in all of {times} passes. Mean of the passes: {means} %."
            )
        calls = []
        for name, held in self.attacks.items():
            protocol = (held.get("protocol") or {}).get("name")
            parts = ", ".join(f"{part} {count}" for part, count in held.get("broken_by", {}).items())
            calls.append(
                f"- {name}: `{held['call']}`{f', protocol {protocol}' if protocol else ''}"
                f"{f', broke samples by {parts}' if parts else ''}."
            )
        shown = [f"{name} {self.provenance[name]}" for name in ("model", "data") if name in self.provenance]
        shown += [f"{name} {version}" for name, version in self.provenance.get("versions", {}).items()]
        known = [f"Fingerprints and versions: {', '.join(shown)}."] if shown else []
        return [*lines, "", *calls, *([""] if calls else []), *known]


def _share(verdicts: Tensor) -> float:
    return verdicts.double().mean().item()


def _cell(name: str, value: float) -> str:
    return str(value) if name == "n" else f"{100 * value:.2f}"


def _text(verdicts: Tensor) -> str:
    return "".join("01"[verdict] for verdict in verdicts.tolist())


def _mask(text: str) -> Tensor:
    return torch.tensor([digit == "1" for digit in text])
