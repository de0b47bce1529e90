"""What an attack found out about each sample."""

import dataclasses

import torch
from torch import Tensor

from perceptual_at._values import Value


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
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{type(self).__name__}: `{name}` must be of shape {tuple(batch)}, got {got}.")
        if self.success.dtype != torch.bool:
            raise TypeError(f"{type(self).__name__}: `success` must be boolean, got {self.success.dtype}.")

    def __len__(self) -> int:
        return self.success.shape[0]

    @property
    def robust(self) -> Tensor:
        """Samples that withstood the attack, boolean `(B,)`; NaN is no right prediction."""
        return ~self.success if self.undefined is None else ~(self.success | self.undefined)
