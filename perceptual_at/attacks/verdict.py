"""What an attack found: the verdict that it returns, and the search that keeps the books for it."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from perceptual_at import _check
from perceptual_at._shapes import per_sample, places
from perceptual_at._values import Value
from perceptual_at.victims import Victim, misclassified, undefined


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict(Value):
    """Adversarial inputs, and per sample whether the attack succeeded and what it cost.

    Attacks return it when called with `verdict=True`. Success was seen, not inferred: the model was run on
    exactly the `x_adv` that is returned, in the precision of the call, and took it for another class (for the
    target class in an attack with `targets`). A sample that the model gets wrong without any attack is a success at
    step 0. Logits with NaN are neither right nor wrong: such a sample is no success
    and not `robust`.

    Examples:
        >>> model = lambda x: torch.cat([x, 0.5 - x], dim=1)  # class 0 above 1/4
        >>> x, labels = torch.tensor([[0.75], [0.375]]), torch.tensor([0, 0])
        >>> verdict = pgd(model, x, labels, Linf(0.25), steps=4, start="clean", keep="best", verdict=True)
        >>> verdict.success, verdict.robust
        (tensor([False,  True]), tensor([ True, False]))
        >>> verdict.x_adv
        tensor([[0.5000],
                [0.1250]])
        >>> verdict.gradients, verdict.forwards  # one more forward pass to judge the last point
        (tensor([4, 4]), tensor([5, 5]))
    """

    x_adv: Tensor
    """Shape and dtype of the inputs, inside ball and box."""
    success: Tensor
    """Misclassified at `x_adv`, boolean `(B,)`."""
    step: Tensor
    """Step that reached `x_adv`, 0 for the starting point; -1 without success. Integers `(B,)`."""
    gradients: Tensor
    """Input gradients of the model that were spent on the sample, integers `(B,)`."""
    forwards: Tensor
    """Forward passes that were spent on the sample, those of the gradients included, integers `(B,)`."""

    undefined: Tensor | None = dataclasses.field(default=None, kw_only=True)
    """The model gave NaN for a point of the sample, and nothing was a success: neither broken nor robust; `(B,)`."""

    def __post_init__(self) -> None:
        batch = self.x_adv.shape[:1]
        for name in ("success", "step", "gradients", "forwards"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.shape != batch:
                got = _check.came(value)
                raise ValueError(f"{type(self).__name__}: `{name}` must be of shape {tuple(batch)}, got {got}.")
        if self.success.dtype != torch.bool:
            raise TypeError(f"{type(self).__name__}: `success` must be boolean, got {self.success.dtype}.")

    def __len__(self) -> int:
        return self.success.shape[0]

    @property
    def robust(self) -> Tensor:
        """Samples that withstood the attack, boolean `(B,)`; NaN is no right prediction."""
        return ~self.success if self.undefined is None else ~(self.success | self.undefined)


class Search:
    """What has been found for each sample of a batch, and what it cost.

    Samples are addressed by their rows in the batch, so that an attack can go on with those still in play
    (`remaining`) and leave out decided ones.

    Args:
        x: clean inputs, shape `(B, ...)`.
        labels: what the points are judged by, usually class indices `(B,)`.
        judge: `(logits, labels, unknown) -> (B,)`, which points are a success; `unknown` are those with NaN.
    """

    def __init__(
        self, x: Tensor, labels: Tensor, judge: Callable[[Tensor, Tensor, Tensor], Tensor] = misclassified
    ) -> None:
        self.labels, self.judged = labels, judge
        self.x_adv = x.clone()
        self.success = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        self.step = torch.full((x.shape[0],), -1, device=x.device)
        self.gradients = torch.zeros_like(self.step)
        self.forwards = torch.zeros_like(self.step)
        self.undefined = torch.zeros_like(self.success)  # the model has given NaN for a point of the sample
        self.values: Tensor | None = None  # losses of the points kept by `offer`

    def begin(self, victim: Victim) -> Tensor:
        """Judge the points to begin with; gives their logits."""
        everyone = torch.arange(len(self.x_adv), device=self.x_adv.device)
        logits = victim.logits(self.x_adv)
        self.spend(everyone, forwards=victim.eot)
        self.judge(everyone, self.x_adv, logits, 0)
        return logits

    def spend(self, rows: Tensor, *, gradients: int = 0, forwards: int = 0) -> None:
        """Note passes; those of a gradient are `gradients=1`, which is a forward pass too."""
        self.gradients[rows] += gradients
        self.forwards[rows] += gradients + forwards

    def wrong(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Which of the points with these logits are a success; those with NaN are noted."""
        unknown = undefined(logits)
        self.undefined[rows] |= unknown
        return self.judged(logits, self.labels[rows], unknown)

    def judge(self, rows: Tensor, points: Tensor, logits: Tensor, step: int) -> Tensor:
        """Keep the points that are misclassified where none was known; gives the mask of misclassified rows."""
        wrong = self.wrong(rows, logits)
        self.record(rows, points, wrong & ~self.success[rows], step)
        return wrong

    def offer(self, rows: Tensor, points: Tensor, values: Tensor, wrong: Tensor | None, step: int) -> None:
        """Keep points: misclassified ones first; among them, and among the others, those of larger loss."""
        if self.values is None:
            self.values = values.new_full(self.step.shape, math.nan)
        held, values = self.values[rows], values.nan_to_num(nan=-math.inf)  # an undefined loss never wins
        better = ~(values <= held)  # also where nothing is held yet
        if wrong is not None:
            had = self.success[rows]
            better = (wrong & ~had) | (better & (wrong == had))
            self.record(rows, points, better & wrong, step)
        self.settle(rows, points, better)
        self.values[rows] = torch.where(better, values, held)

    def confirmed(self, victim: Victim, rows: Tensor, points: Tensor, claimed: Tensor) -> Tensor:
        """Those of the points claimed to be a success that are one for the model itself; a lane may be wrong."""
        if not victim.confirms:
            return claimed
        some = places(claimed)
        if not len(some):
            return claimed
        self.spend(rows[some], forwards=victim.eot)
        return claimed.index_copy(0, some, self.wrong(rows[some], victim.logits(points[some])))

    def rejudge(self, victim: Victim, step: int) -> None:
        """Ask the model itself about all points kept so far."""
        logits = victim.logits(self.x_adv)
        unknown = undefined(logits)
        self.undefined |= unknown
        self.success = self.judged(logits, self.labels, unknown)
        self.forwards += victim.eot
        self.step = torch.where(self.success, torch.where(self.step < 0, step, self.step), -1)

    def record(self, rows: Tensor, points: Tensor, found: Tensor, step: int) -> None:
        """Keep the points that `found` names as the successes of their samples."""
        self.x_adv[rows] = torch.where(per_sample(found, points), points, self.x_adv[rows])
        self.step[rows] = torch.where(found, step, self.step[rows])
        self.success[rows] |= found

    def settle(self, rows: Tensor, points: Tensor, chosen: Tensor) -> None:
        """For samples without success that `chosen` names, the points to return."""
        chosen = chosen & ~self.success[rows]
        self.x_adv[rows] = torch.where(per_sample(chosen, points), points, self.x_adv[rows])

    def remaining(self) -> Tensor:
        """Rows of the samples without success; waits for the device."""
        return places(~self.success)

    def result(self, verdict: bool) -> Tensor | Verdict:
        """What the attack returns."""
        if not verdict:
            return self.x_adv
        return Verdict(
            self.x_adv, self.success, self.step, self.gradients, self.forwards, undefined=self.undefined & ~self.success
        )
