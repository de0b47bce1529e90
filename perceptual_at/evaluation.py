"""Clean and robust accuracy of a model over a loader, kept per sample."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_at import _check
from perceptual_at.attacks.freeze import Model, frozen
from perceptual_at.metrics import mean_score, nrr
from perceptual_at.objectives.passes import Attack


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Verdicts of one evaluation; every number is derived from them.

    Accuracies are fractions in [0, 1]. A sample is robust against an attack when it is classified right both
    as it is and as the attack returned it.

    Examples:
        >>> result = Evaluation(torch.tensor([True, True, False]), {"pgd": torch.tensor([True, False, False])})
        >>> f"clean {result.clean_accuracy:.2f}, worst case {result.worst_case:.2f}, NRR {result.nrr:.2f}"
        'clean 0.67, worst case 0.33, NRR 0.44'
    """

    correct: Tensor
    """Right on the clean input, boolean `(n,)` in the loader's order."""
    robust: dict[str, Tensor]
    """For each attack, right on the clean and on the adversarial input, boolean `(n,)`."""

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
        verdicts = self.correct
        for robust in self.robust.values():
            verdicts = verdicts & robust
        return _share(verdicts)

    @property
    def mean(self) -> float:
        """Mean of clean and worst-case accuracy."""
        return mean_score(self.clean_accuracy, self.worst_case)

    @property
    def nrr(self) -> float:
        """Harmonic mean of clean and worst-case accuracy."""
        return nrr(self.clean_accuracy, self.worst_case)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the verdicts, for JSON; accuracies are fractions."""
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


def evaluate(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, Attack],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Clean accuracy and robust accuracy against each attack.

    The model runs in eval mode and is left as found. Attacks get only the samples that are still right, so
    nothing is spent on decided ones.

    Args:
        model: maps inputs to logits.
        loader: batches `(x, labels)`, inputs inside the bounds of the threat model.
        attacks: by name, functions `(model, x, labels) -> x_adv`, for example
            `{"pgd20": functools.partial(pgd, threat=Linf(8 / 255), steps=20)}`. Empty gives clean accuracy.
        device: where to run; None means where the model's parameters are (the CPU for other callables).
        progress: show a progress bar, when tqdm is installed.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError: if an attack is not callable or a batch no pair of tensors.
        ValueError: if an attack changes the shape of its inputs, or the loader is empty.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> batch = torch.tensor([[0.875], [0.375]]), torch.tensor([0, 0])
        >>> result = evaluate(model, [batch], {"fgsm": functools.partial(fgsm, threat=Linf(0.25))}, progress=False)
        >>> result.clean_accuracy, result.robust_accuracy["fgsm"]
        (1.0, 0.5)
        >>> print(result)
        clean 100.00, fgsm 50.00, worst_case 50.00, mean 75.00, nrr 66.67 (%, n=2)
    """
    if not callable(model):
        raise TypeError(f"evaluate: `model` must be callable, got {type(model).__name__}.")
    if not isinstance(attacks, Mapping):
        raise TypeError(f"evaluate: `attacks` must map names to attacks, got {type(attacks).__name__}.")
    for name, attack in attacks.items():
        if not callable(attack):
            raise TypeError(
                f"evaluate: attack {name!r} must be a function (model, x, labels) -> x_adv, got "
                f"{type(attack).__name__}."
            )
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = parameter.device if parameter is not None else torch.device("cpu")
    correct: list[Tensor] = []
    robust: dict[str, list[Tensor]] = {name: [] for name in attacks}
    with frozen(model) as f:
        for batch in _with_progress(loader, progress):
            x, labels = _batch(batch, device)
            right = _right(f, x, labels)
            correct.append(right)
            for name, attack in attacks.items():
                verdicts = right.clone()
                if right.any():
                    x_adv = attack(f, x[right], labels[right])
                    _check.same_shape("evaluate", x=x[right], **{f"attacks[{name!r}]": x_adv})
                    verdicts[right] = _right(f, x_adv, labels[right])
                robust[name].append(verdicts)
    if not sum(len(verdicts) for verdicts in correct):
        raise ValueError("evaluate: `loader` gave no sample.")
    return Evaluation(torch.cat(correct).cpu(), {name: torch.cat(verdicts).cpu() for name, verdicts in robust.items()})


def _right(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    _check.logits("evaluate", **{"model(x)": logits})
    _check.labels("evaluate", labels, classes=logits.shape[1], x=x)
    return logits.argmax(dim=1) == labels


def _batch(batch: Any, device: torch.device | str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"evaluate: `loader` must give pairs (x, labels), got {type(batch).__name__}.")
    x, labels = batch
    _check.floating("evaluate", x=x)
    _check.tensor("evaluate", "labels", labels)
    return x.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _share(verdicts: Tensor) -> float:
    return verdicts.double().mean().item()


def _with_progress(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    bar: Iterable[Any] = tqdm(loader, desc="evaluate", unit="batch", leave=False)
    return bar
