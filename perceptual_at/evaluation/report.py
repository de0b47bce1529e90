"""What an evaluation found: verdicts per sample, and every number that follows from them."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._tables import latex_table, markdown_table
from perceptual_at._values import FrozenDict, Value
from perceptual_at.evaluation.checks import Check
from perceptual_at.evaluation.ledger import worse
from perceptual_at.evaluation.records import read_report, write_report
from perceptual_at.evaluation.statistics import Interval, mean_interval, wilson_interval
from perceptual_at.metrics import mean_score, nrr

RESERVED = ("n", "clean", "worst_case", "mean", "nrr", "inspected")
"""Names of numbers in the report, which no attack can have."""


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
class Evaluation(Value):
    """Verdicts of one evaluation; every number is derived from them.

    Accuracies are fractions in [0, 1]. A sample is robust against an attack when it is classified right both
    as it is and as the attack returned it. For tasks other than classification verdicts are scores in [0, 1],
    accuracies their means, and the score against an attack is the smaller of the clean one and that of what the attack
    returned.

    Two evaluations are equal when all they hold is; they can be copied and pickled, and nothing in them replaced.

    Examples:
        >>> result = Evaluation(torch.tensor([True, True, False]), {"pgd": torch.tensor([True, False, False])})
        >>> f"clean {result.clean_accuracy:.2f}, worst case {result.worst_case:.2f}, NRR {result.nrr:.2f}"
        'clean 0.67, worst case 0.33, NRR 0.44'
        >>> f"{result.interval('worst_case').high:.2f}"  # three samples say little
        '0.79'
        >>> Evaluation(torch.tensor([1.0, 0.5]), {"pgd": torch.tensor([0.5, 0.75])}).robust_accuracy["pgd"]
        0.5
    """

    correct: Tensor
    """Right on the clean input, boolean `(n,)` in the loader's order; scores in [0, 1] for other tasks than classes."""
    robust: Mapping[str, Tensor]
    """For each attack, right on the clean and on the adversarial input, boolean `(n,)`. With `cascade`, and on the
    adversarial inputs of all attacks before. Scores: the smallest of these."""
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
    suspicious: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Samples whose verdict may be due to the attacks, boolean `(n,)` by reason: those that resist for want of a
    gradient, by a tie, or because an attack did not move them, and those that only Square breaks."""
    warnings: tuple[str, ...] = ()
    """What speaks against taking the numbers at face value."""
    checks: tuple[Check, ...] = ()
    """The sanity checks, if they were run."""
    attacks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """For each attack its call, which point was judged, and its protocol if it has one."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fingerprints of model and data, settings, versions, device."""

    def __post_init__(self) -> None:
        correct = _column("correct", self.correct)
        robust = {}
        for name, verdicts in _mapping("robust", self.robust).items():
            check_name("Evaluation", name)
            robust[name] = worse(correct, _column(f"robust[{name!r}]", verdicts, like=correct))
        suspicious = {
            reason: _column(f"suspicious[{reason!r}]", mask, like=correct, masks=True)
            for reason, mask in _mapping("suspicious", self.suspicious).items()
        }
        for name in ("labels", "index"):
            value = getattr(self, name)
            if value is not None:
                _check.labels("Evaluation", value, correct=correct, name=name)
                object.__setattr__(self, name, value.detach().clone())
        frozen = {
            "correct": correct, "robust": robust, "suspicious": suspicious,
            "repeated": _repeats(_mapping("repeated", self.repeated), len(correct)),
            **{name: dict(_mapping(name, getattr(self, name))) for name in ("costs", "attacks", "provenance")},
        }  # fmt: skip
        for name, value in frozen.items():
            object.__setattr__(self, name, FrozenDict(value) if isinstance(value, dict) else value)
        for name, kind in (("costs", Cost), ("attacks", Mapping)):
            for key, value in getattr(self, name).items():
                if not isinstance(value, kind):
                    raise TypeError(
                        f"Evaluation: `{name}[{key!r}]` must be a {kind.__name__}, got {type(value).__name__}."
                    )
        for name in ("classes", "warnings"):
            _check.names("Evaluation", name, getattr(self, name))
        for check in self.checks:
            if not isinstance(check, Check):
                raise TypeError(
                    f"Evaluation: `checks` must hold what `sanity_checks` gives, got {type(check).__name__}."
                )
        for name in ("classes", "warnings", "checks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

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

    @property
    def suspicion_rate(self) -> float:
        """Share of the samples that count as robust in the worst case for which there is a reason in `suspicious`."""
        robust = self.verdicts("worst_case") > 0
        marked = torch.zeros_like(robust)
        for mask in self.suspicious.values():
            marked = marked | mask
        return _share(marked[robust]) if bool(robust.any()) else 0.0

    def verdicts(self, name: str) -> Tensor:
        """Verdicts or scores per sample, `(n,)`, by `"clean"`, `"worst_case"` or the name of an attack."""
        if name == "clean":
            return self.correct
        if name != "worst_case":
            if name not in self.robust:
                raise KeyError(f"Evaluation: `name` must be one of {', '.join(self.columns)}, got {name!r}.")
            return self.robust[name]
        verdicts = self.correct
        for robust in self.robust.values():
            verdicts = worse(verdicts, robust)
        return verdicts

    def interval(self, name: str, *, confidence: float = 0.95) -> Interval:
        """What an accuracy may be on other samples of the same kind: Wilson's interval; for scores, that of a mean."""
        _check.number("Evaluation.interval", "confidence", confidence, above=0.0, below=1.0)
        verdicts = self.verdicts(name)
        if verdicts.dtype == torch.bool:
            return wilson_interval(int(verdicts.sum()), len(verdicts), confidence=confidence)
        spread = float(verdicts.double().std()) if len(verdicts) > 1 else math.inf
        return mean_interval(_share(verdicts), spread, len(verdicts), confidence=confidence)

    def per_class(self) -> dict[str, dict[str, float]]:
        """For each class that occurs, its number of samples `"n"` and its accuracies by name."""
        if self.labels is None:
            raise ValueError("Evaluation.per_class: the classes of the samples are not known.")
        found = {}
        for label in sorted(set(self.labels.tolist())):
            of_class = self.labels == label
            numbers = {name: _share(self.verdicts(name)[of_class]) for name in self.columns}
            found[self.class_name(label)] = {"n": int(of_class.sum()), **numbers}
        return found

    def class_name(self, label: int) -> str:
        """What a class is called; with its number where another has the same name, as two of ImageNet's have."""
        name = self.classes[label] if 0 <= label < len(self.classes) else str(label)
        return f"{name} ({label})" if self.classes.count(name) > 1 else name

    def mean_over_repeats(self) -> dict[str, float]:
        """For a random model, the mean accuracy of the repeats by `"clean"` and attack; else the accuracies."""
        return {name: _share(self.repeated.get(name, self.verdicts(name))) for name in ("clean", *self.robust)}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the accuracies: clean, the attacks, the worst case."""
        return ("clean", *self.robust, "worst_case")

    @property
    def counts(self) -> bool:
        """Whether verdicts are right or wrong, and not scores in between."""
        return self.correct.dtype == torch.bool and all(one.dtype == torch.bool for one in self.robust.values())

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
        head = (
            "",
            "accuracy, %" if self.counts else "mean score, %",
            "95 % interval",
            "gradients",
            "forwards",
            "seconds",
        )
        lines = [markdown_table(head, self._rows()), "", *self._statements()]
        if self.labels is not None:
            rows = [
                (name, *(str(value) if key == "n" else f"{100 * value:.2f}" for key, value in row.items()))
                for name, row in self.per_class().items()
            ]
            lines += ["", markdown_table(("class", "n", *(_said(name) for name in self.columns)), rows)]
        lines += ["", *(f"- Warning: {text}." for text in self.warnings)] if self.warnings else []
        lines += ["", *(f"- {check}" for check in self.checks)] if self.checks else []
        return "\n".join(lines) + "\n"

    def to_latex(self) -> str:
        """The accuracies and their intervals, in percent, as a `tabular`."""
        head = ("", r"accuracy, \%" if self.counts else r"mean score, \%", r"95\,\% interval")
        return latex_table(head, [row[:3] for row in self._rows()])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything, verdicts included, to a file, whole or not at all."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["costs"] = {name: dataclasses.asdict(cost) for name, cost in self.costs.items()}
        fields["checks"] = [
            dataclasses.asdict(check)
            | ({} if math.isfinite(check.value) else {"value": str(check.value)})  # as JSON can
            for check in self.checks
        ]
        intervals = {name: self.interval(name) for name in self.columns}
        write_report(path, {"summary": self.to_dict(), "intervals": intervals}, fields)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """What `to_json` wrote, in this release or an earlier one.

        Raises:
            ValueError: if the file is of another kind, or damaged.
        """
        fields = read_report(path)
        try:
            fields["costs"] = {name: Cost(**cost) for name, cost in fields["costs"].items()}
            fields["checks"] = tuple(Check(**{**check, "value": float(check["value"])}) for check in fields["checks"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"Evaluation.from_json: {os.fspath(path)!r} is damaged: {error!r}.") from error

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for name in self.columns:
            low, high = self.interval(name)
            cost = self.costs.get(name)
            spent = (cost.gradients, cost.forwards, f"{cost.seconds:.1f}") if cost else (None, None, None)
            cells = ("" if value is None else str(value) for value in spent)
            share = f"{100 * _share(self.verdicts(name)):.2f}"
            rows.append((_said(name), share, f"{100 * low:.2f} to {100 * high:.2f}", *cells))
        blank = ("",) * 4
        return [*rows, ("mean", f"{100 * self.mean:.2f}", *blank), ("NRR", f"{100 * self.nrr:.2f}", *blank)]

    def _statements(self) -> list[str]:
        """How it was measured, in sentences."""
        points = ", ".join(f"{name}: {held['judged']}" for name, held in self.attacks.items() if "judged" in held)
        judged = f" ({points})" if points else ""
        rule = f"Robust: right without attack and on the input that the attack returned{judged}."
        if not self.counts:
            rule = (
                "A sample's score against an attack is the smaller of the one without attack and the one on the input "
                f"that the attack returned{judged}."
            )
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
        found = [f"{reason} {int(mask.sum())}" for reason, mask in self.suspicious.items() if bool(mask.any())]
        if found:
            rate = f"{100 * self.suspicion_rate:.2f} % of the robust samples are suspicious"
            lines.append(f"Suspicious samples: {', '.join(found)}; {rate}.")
        calls = []
        for name, held in self.attacks.items():
            protocol = (held.get("protocol") or {}).get("name")
            parts = ", ".join(f"{part} {count}" for part, count in held.get("broken_by", {}).items())
            sizes = ", ".join(f"{norm} {size:.4g}" for norm, size in held.get("farthest", {}).items())
            calls.append(
                f"- {name}: `{held.get('call', '')}`{f', protocol {protocol}' if protocol else ''}"
                f"{f', broke samples by {parts}' if parts else ''}"
                f"{f', moved inputs by up to {sizes}' if sizes else ''}."
            )
        shown = [f"{name} {self.provenance[name]}" for name in ("model", "data") if name in self.provenance]
        shown += [f"{name} {version}" for name, version in self.provenance.get("versions", {}).items()]
        known = [f"Fingerprints and versions: {', '.join(shown)}."] if shown else []
        return [*lines, "", *calls, *([""] if calls else []), *known]


def check_name(function: str, name: Any, *more: str) -> None:
    """Require a name that an attack can have."""
    if not isinstance(name, str):
        raise ValueError(
            f"{function}: an attack cannot be called {name!r}: a name is a text, got {type(name).__name__}."
        )
    if name in (*RESERVED, *more):
        raise ValueError(f"{function}: an attack cannot be called {name!r}: that is a name of the report's own.")


def _said(name: str) -> str:
    return name.replace("worst_case", "worst case")


def _column(name: str, value: Any, *, like: Tensor | None = None, masks: bool = False) -> Tensor:
    """One verdict or score per sample, as a copy that nobody else writes to."""
    _check.tensor("Evaluation", name, value)
    if value.ndim != 1 or not len(value) or (like is not None and value.shape != like.shape):
        wanted = "(n,) with n >= 1" if like is None else f"({len(like)},), as `correct`"
        raise ValueError(f"Evaluation: `{name}` must be of shape {wanted}, got shape {tuple(value.shape)}.")
    if like is not None:
        _check.same_device("Evaluation", name, value.device, "correct", like.device)
    if value.dtype != torch.bool and (masks or not value.is_floating_point()):
        raise TypeError(
            f"Evaluation: `{name}` must be boolean{'' if masks else ' or scores in [0, 1]'}, got {value.dtype}."
        )
    if value.dtype != torch.bool and not bool(((value >= 0) & (value <= 1)).all()):  # NaN is neither
        raise ValueError(f"Evaluation: `{name}` must hold scores in [0, 1], got others or NaN.")
    own: Tensor = value.detach().clone()
    return own if own.dtype == torch.bool else own.double()  # as `from_json` gives them back


def _repeats(repeated: Mapping[Any, Any], samples: int) -> dict[Any, Tensor]:
    """Verdicts or scores of every repeat, by name."""
    if repeated and "clean" not in repeated:
        raise ValueError(f"Evaluation: `repeated` must hold 'clean', got {', '.join(map(repr, repeated))}.")
    for name, passes in repeated.items():
        if not isinstance(passes, Tensor) or passes.ndim != 2 or passes.shape[1] != samples:
            raise ValueError(
                f"Evaluation: `repeated[{name!r}]` must be of shape (repeats, {samples}), got "
                f"{tuple(passes.shape) if isinstance(passes, Tensor) else type(passes).__name__}."
            )
        if passes.dtype != torch.bool and not passes.is_floating_point():
            raise TypeError(f"Evaluation: `repeated[{name!r}]` must be boolean or scores, got {passes.dtype}.")
    return {name: passes if passes.dtype == torch.bool else passes.double() for name, passes in repeated.items()}


def _mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"Evaluation: `{name}` must be a dictionary, got {type(value).__name__}.")
    return value


def _share(verdicts: Tensor) -> float:
    return verdicts.double().mean().item()
