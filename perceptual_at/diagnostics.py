"""Looking inside a trained model: how perception moves under attack, and who is trained on what.

These are the papers' motivating experiments as functions; `examples/perception_gap.py` runs them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from perceptual_at import _check, _random
from perceptual_at._shapes import per_sample
from perceptual_at._values import Value
from perceptual_at.divergences import squared_error
from perceptual_at.metrics import Score, judge
from perceptual_at.objectives.passes import Attack, Perceive
from perceptual_at.partitions import Partition, boundary_partition
from perceptual_at.paths import interpolate
from perceptual_at.threats import Threat, check_threat
from perceptual_at.victims import Model, asked, in_step, lent

Strength = Literal["full", "reduced", "clean"]


@dataclasses.dataclass(frozen=True, eq=False)
class PerceptionGap(Value):
    """Per sample, how far a perturbation moved the perception, and whether the prediction held."""

    distance: Tensor
    """Mean squared difference between the perceptions of the clean and the perturbed input, `(n,)`."""
    defended: Tensor
    """Right on the perturbed input, boolean `(n,)`: the success cases. Or a score in [0, 1]: the share of success."""
    correct: Tensor
    """Right on the clean input, boolean `(n,)`, or its score."""

    def __post_init__(self) -> None:
        _check.floating("PerceptionGap", distance=self.distance)
        for name in ("defended", "correct"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == self.distance.shape:
                _check.same_device("PerceptionGap", name, value.device, "distance", self.distance.device)
            else:
                _check.mask("PerceptionGap", name, value, distance=self.distance)

    @property
    def success(self) -> float | None:
        """Mean distance of the success cases, weighted by their scores; None if there are none."""
        return _mean(self.distance, self.defended.double())

    @property
    def failure(self) -> float | None:
        """Mean distance of the failure cases, weighted by what their scores lack; None if there are none."""
        return _mean(self.distance, 1 - self.defended.double())

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that are right on the clean input; the mean of scores."""
        return self.correct.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that are right on the perturbed input, whatever the clean one; the mean of scores."""
        return self.defended.double().mean().item()

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the papers' figure, for JSON."""
        return {
            "n": len(self.distance),
            "success_mse": self.success,
            "failure_mse": self.failure,
            "clean": self.clean_accuracy,
            "robust": self.robust_accuracy,
        }


def perception_gap(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    perturb: Attack,
    *,
    perceive: Perceive | None = None,
    score: Score | None = None,
) -> PerceptionGap:
    r"""How far perturbations move the perception of samples that resist and of samples that give in.

    $$ d_i = \tfrac1K \| h(x_i + \delta_i) - h(x_i) \|_2^2 $$

    kept per sample, so that the groups' means depend on no batch size. The model runs in eval mode. Of dense outputs,
    or with a `score`, a sample is defended in part, and counts in both groups by its share.

    Args:
        model: maps inputs to logits `(B, K)` or `(B, K, *S)`; with `score`, to a tensor of any kind. Another module's
            dict or tuple goes through `models.logits_of`.
        loader: batches `(x, labels)` on the model's device.
        perturb: `(model, x, labels) -> x_adv`, e.g. `functools.partial(pgd, threat=Linf(8 / 255), steps=20)` or
            `functools.partial(random_noise, threat=Linf(8 / 255))`.
        perceive: `x -> (logits, perception)` for a perception other than the logits; it must run `model`.
        score: what counts as right, `(outputs, labels) -> (B,)`, boolean or in [0, 1]. None is 0/1 correctness for
            classes, and the share of right places for dense labels.

    Returns:
        A `PerceptionGap` with one entry per sample.

    Raises:
        TypeError: if `perturb` is no function, or it or the model returns no tensor.
        ValueError: if the loader is empty, shapes do not fit, labels are out of range, or a score is outside [0, 1].

    Source:
        RPAT, Sec. 3, Fig. 2 and Fig. 5: failure cases move less than success cases after adversarial training.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> batch = torch.tensor([[0.875], [0.375]]), torch.tensor([0, 0])
        >>> gap = perception_gap(model, [batch], functools.partial(pgd, threat=Linf(0.25)))
        >>> gap.defended.tolist(), gap.success, gap.failure
        ([True, False], 0.0625, 0.0625)
        >>> near = lambda outputs, labels: 1 - (outputs[:, 0] - labels).abs()  # a regression, scored by its error
        >>> noise = lambda model, x, labels: x + 0.25
        >>> perception_gap(nn.Identity(), [(batch[0], torch.tensor([1.0, 0.5]))], noise, score=near).defended
        tensor([0.8750, 0.8750])
    """
    _check.model("perception_gap", model)
    given = {"perceive": perceive, "score": score}
    _check.called("perception_gap", **{name: one for name, one in given.items() if one is not None})
    _check.attack("perception_gap", "`perturb`", perturb)
    batches = _check.loader("perception_gap", loader)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with lent("perception_gap", model) as borrowed, in_step(borrowed) as f:
        perceived: Perceive = perceive or (lambda x: (logits := asked("perception_gap", f, x), logits))
        for batch in batches:
            x, labels = _pair("perception_gap", batch)
            if not len(x):
                continue
            x_adv = _perturbed("perception_gap", "perturb", perturb, f, x, labels)
            with torch.no_grad():
                (clean_outputs, clean), (adv_outputs, adv) = map(_two, (perceived(x.clone()), perceived(x_adv.clone())))
            _check_perception("perception_gap", clean, x)
            defended, correct = (
                judge("perception_gap", outputs, labels, score).score for outputs in (adv_outputs, clean_outputs)
            )
            parts.append((squared_error(adv, clean), defended, correct))
    if not parts:
        raise ValueError("perception_gap: `loader` gave no batch.")
    distance, defended, correct = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return PerceptionGap(distance, defended, correct)


def perception_path(model: Model, x: Tensor, x_adv: Tensor, alphas: Sequence[float]) -> Tensor:
    r"""How far the outputs have moved at several places of the straight path from clean to adversarial.

    $$ \sqrt{\tfrac1K \| f(x + \alpha (x_{\mathrm{adv}} - x)) - f(x) \|_2^2} $$

    A model with robust perception draws straight lines. One forward pass per place, and one of `x`.

    Args:
        model: maps inputs to a tensor of any shape `(B, ...)`, of which K is the number of entries; a module runs in
            eval mode.
        x: clean inputs, shape `(B, ...)`.
        x_adv: adversarial inputs, the same shape.
        alphas: places in [0, 1].

    Returns:
        Shape `(len(alphas), B)`, in units of the outputs.

    Raises:
        TypeError: if the model returns no floating tensor.
        ValueError: if shapes differ, an alpha is outside [0, 1], or there is none.

    Source:
        RPAT, Definition 1 and Fig. 3.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)  # linear: the path is even
        >>> perception_path(model, torch.zeros(1, 1), torch.ones(1, 1), [0.0, 0.25, 1.0])
        tensor([[0.0000],
                [0.2500],
                [1.0000]])
    """
    _check.model("perception_path", model)
    _check.same_shape("perception_path", x=x, x_adv=x_adv)
    alphas = list(_check.numbers_of("perception_path", "alphas", alphas, at_least=0.0, at_most=1.0))
    if not alphas:
        raise ValueError("perception_path: `alphas` must hold at least one place.")
    with torch.no_grad(), lent("perception_path", model) as f:
        run = functools.partial(asked, "perception_path", f)
        clean = run(x)
        _check_perception("perception_path", clean, x)
        return torch.stack([squared_error(run(interpolate(x, x_adv, alpha)), clean).sqrt() for alpha in alphas])


def random_noise(
    model: Model,  # noqa: ARG001
    x: Tensor,
    labels: Tensor,  # noqa: ARG001
    threat: Threat,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random point of the threat model around each input: the perturbation that asks no gradient.

    Has the signature of an attack, so that it can stand where an attack does.

    Args:
        model: not used.
        x: clean inputs, shape `(B, ...)`.
        labels: not used.
        threat: a threat model.
        generator: source of the noise.

    Returns:
        Perturbed inputs of the shape of `x`.

    Raises:
        TypeError: if `x` is no floating-point tensor, `threat` no threat model, or `generator` no generator.
        ValueError: if `generator` is on another device.

    Source:
        RPAT, Fig. 2 ("Random").

    Examples:
        >>> x = torch.full((1, 4), 0.5)
        >>> noisy = random_noise(None, x, torch.tensor([0]), Linf(0.25))
        >>> bool(((noisy - x).abs() <= 0.25).all())
        True
    """
    _check.floating("random_noise", x=x)
    check_threat("random_noise", threat)
    _random.check("random_noise", generator, x)
    return threat.random_start(x.detach(), generator=generator)


def perturbed_by_group(
    x: Tensor,
    x_adv: Tensor,
    reduced: Tensor,
    partition: Partition,
    *,
    boundary: Strength = "full",
    interior: Strength = "full",
    misclassified: Strength = "clean",
) -> Tensor:
    """Training inputs whose perturbation depends on where the sample stands.

    Args:
        x: clean inputs, shape `(B, ...)`.
        x_adv: inputs with the full perturbation, the same shape.
        reduced: inputs with the perturbation of the threshold, the same shape.
        partition: who is misclassified, at the boundary, inside.
        boundary: perturbation of boundary samples: `"full"`, `"reduced"` or `"clean"`.
        interior: perturbation of the samples inside.
        misclassified: perturbation of misclassified samples; `"clean"` as in the paper's experiment.

    Returns:
        Inputs of the shape of `x`, each row one of the three.

    Raises:
        TypeError: if inputs are no floating-point tensors, or `partition` is not what `boundary_partition` gives.
        ValueError: if shapes differ or a word is unknown.

    Source:
        RAAT, Sec. 2.1 and Fig. 2.

    Examples:
        >>> x, x_adv, reduced = torch.zeros(3, 1), torch.ones(3, 1), torch.full((3, 1), 0.5)
        >>> masks = torch.eye(3, dtype=torch.bool)
        >>> perturbed_by_group(x, x_adv, reduced, Partition(*masks), boundary="reduced").squeeze(1)
        tensor([0.0000, 0.5000, 1.0000])
    """
    name = "perturbed_by_group"
    _check_strengths(name, boundary=boundary, interior=interior, misclassified=misclassified)
    _check.same_shape(name, x=x, x_adv=x_adv, reduced=reduced)
    if not isinstance(partition, Partition):
        raise TypeError(f"{name}: `partition` must be what `boundary_partition` gives, got {type(partition).__name__}.")
    inputs = {"full": x_adv, "reduced": reduced, "clean": x}
    chosen = x_adv
    for group, strength in (("boundary", boundary), ("interior", interior), ("misclassified", misclassified)):
        mask = getattr(partition, group)
        _check.mask(name, f"partition.{group}", mask, x=x)
        chosen = torch.where(per_sample(mask, x), inputs[strength], chosen)
    return chosen


def _check_strengths(function: str, **strengths: str) -> None:
    for group, strength in strengths.items():
        _check.choice(function, group, strength, get_args(Strength))


def attacked_by_group(
    model: Model,
    x: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    eta: float = 0.1,
    reduced_attack: Attack | None = None,
    boundary: Strength = "full",
    interior: Strength = "full",
    misclassified: Strength = "clean",
) -> Tensor:
    """An attack whose strength depends on where the sample stands: at the boundary, inside, or wrong already.

    With its options bound it stands where an attack does: PGD-AT with it is the paper's motivating experiment. Passes:
    the attack, `reduced_attack` if given, and two forwards without gradients.

    Args:
        model: maps inputs to logits; a module is asked in eval mode.
        x: clean inputs, shape `(B, ...)`.
        labels: class indices `(B,)`.
        attack: `(model, x, labels) -> x_adv`, the full perturbation.
        eta: the threshold, as a share of the perturbation.
        reduced_attack: makes the reduced perturbation by an attack of its own, `eta` then has no effect.
        boundary: perturbation of boundary samples: `"full"`, `"reduced"` or `"clean"`.
        interior: perturbation of the samples inside.
        misclassified: perturbation of misclassified samples; `"clean"` as in the paper's experiment.

    Returns:
        Inputs of the shape of `x`.

    Raises:
        TypeError: if an attack is no function, it or the model gives no tensor, or `labels` are no integers.
        ValueError: if a word is unknown, a number or a label is out of range, or shapes do not fit.

    Source:
        RAAT, Sec. 2.1 and Fig. 2.

    Examples:
        >>> model, x, labels = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> attack = functools.partial(pgd, threat=Linf(0.1))
        >>> x_adv = attacked_by_group(model, x, labels, attack, boundary="clean", interior="clean")
        >>> torch.equal(x_adv, x)  # nobody is perturbed
        True
    """
    name = "attacked_by_group"
    _check_strengths(name, boundary=boundary, interior=interior, misclassified=misclassified)
    _check.number(name, "eta", eta, at_least=0.0, at_most=1.0)
    _check.model(name, model)
    _check.floating(name, x=x)
    _check.labels(name, labels, x=x)
    _check.attack(name, "`attack`", attack)
    if reduced_attack is not None:
        _check.attack(name, "`reduced_attack`", reduced_attack)
    x_adv = _perturbed(name, "attack", attack, model, x, labels)
    if reduced_attack is None:
        reduced = interpolate(x, x_adv, eta)
    else:
        reduced = _perturbed(name, "reduced_attack", reduced_attack, model, x, labels)
    with torch.no_grad(), lent(name, model) as f:
        clean_logits, reduced_logits = asked(name, f, x), asked(name, f, reduced)
    _check.logits(name, **{"model(x)": clean_logits, "model(reduced)": reduced_logits})
    labels = _check.indices(name, labels, **{"model(x)": clean_logits})
    parts = boundary_partition(clean_logits, reduced_logits, labels)
    return perturbed_by_group(
        x, x_adv, reduced, parts, boundary=boundary, interior=interior, misclassified=misclassified
    )


def catastrophic_overfitting(
    single_step: Sequence[float], multi_step: Sequence[float], *, drop: float = 0.2
) -> int | None:
    r"""The first epoch at which single-step training has overfitted catastrophically; None if it has not.

    Such a model resists the one step it is trained with and nothing else: accuracy under PGD breaks down while that
    under FGSM stays or rises. An epoch counts if, compared with the best epoch for PGD before it, PGD accuracy fell by
    more than `drop` and the gap between the two accuracies grew by more than `drop`. A training that falls apart
    altogether loses both and is not meant.

    Args:
        single_step: accuracy after each epoch under the attack of training, for example FGSM, as fractions.
        multi_step: accuracy after the same epochs under PGD; a few training images and 10 steps will do.
        drop: what counts as a break-down.

    Returns:
        Index of the epoch, from 0. Weights to go back to are those of the epoch before it or earlier.

    Raises:
        ValueError: if the two differ in length, an accuracy is outside [0, 1] or no number, or `drop` outside (0, 1).

    Source:
        Wong et al. 2020, released code (`--early-stop`: a fall of PGD accuracy by more than 0.2 from one epoch to the
        next); the condition on the gap is our own.

    Examples:
        >>> catastrophic_overfitting([0.40, 0.50, 0.95], [0.35, 0.45, 0.02])
        2
        >>> catastrophic_overfitting([0.40, 0.50, 0.10], [0.35, 0.45, 0.10]) is None  # diverged
        True
    """
    name = "catastrophic_overfitting"
    _check.number(name, "drop", drop, above=0, below=1)
    single_step = _check.numbers_of(name, "single_step", single_step, at_least=0, at_most=1)
    multi_step = _check.numbers_of(name, "multi_step", multi_step, at_least=0, at_most=1)
    if len(single_step) != len(multi_step):
        raise ValueError(
            f"{name}: `single_step` has {len(single_step)} epochs but `multi_step` has {len(multi_step)}; they must be "
            "of the same epochs."
        )
    best = 0
    for epoch, (easy, hard) in enumerate(zip(single_step, multi_step, strict=True)):
        fell = multi_step[best] - hard
        if fell > drop and (easy - hard) - (single_step[best] - multi_step[best]) > drop:
            return epoch
        if fell < 0:
            best = epoch
    return None


def _check_perception(function: str, value: Any, x: Tensor) -> None:
    """Require a floating tensor with a row per sample."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}: `model` must return a torch.Tensor, got {type(value).__name__}; `models.logits_of(model, "
            "name)` takes one tensor out of what a network returns."
        )
    if not value.is_floating_point() or value.shape[:1] != x.shape[:1]:
        raise (ValueError if value.is_floating_point() else TypeError)(
            f"{function}: `model` must return a floating-point tensor with {x.shape[0]} rows, got {value.dtype} of "
            f"shape {tuple(value.shape)}."
        )


def _perturbed(function: str, name: str, attack: Attack, model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """What an attack makes of copies, which it may write to."""
    x_adv = attack(model, x.clone(), labels.clone())
    _check.same_shape(function, x=x, **{f"{name}(model, x, labels)": x_adv})
    return x_adv


def _two(seen: Any) -> tuple[Any, Any]:
    """What `perceive` gave."""
    if not isinstance(seen, tuple | list) or len(seen) != 2:
        raise TypeError(f"perception_gap: `perceive` must give (logits, perception), got {_check.came(seen)}.")
    return seen[0], seen[1]


def _pair(function: str, batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a batch of a loader."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} things" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"{function}: `loader` must give pairs (x, labels), got {got}.")
    x, labels = batch
    _check.floating(function, x=x)
    _check.tensor(function, "labels", labels)
    return x, labels


def _mean(values: Tensor, weights: Tensor) -> float | None:
    """Weighted mean; what has no weight does not count, whatever its value."""
    total = weights.sum().item()
    return (torch.where(weights > 0, values.double() * weights, 0.0).sum() / total).item() if total else None
