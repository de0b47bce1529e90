"""PGD as a pure function of tensors, for `torch.compile` as one graph and for `torch.vmap`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from perceptual_at import _check
from perceptual_at._differentiation import out_of_reach
from perceptual_at._rounding import leveled, wide
from perceptual_at._shapes import per_sample
from perceptual_at.attacks.pgd import REACH, check_step_size, visible
from perceptual_at.attacks.targets import ascended
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Threat, budget
from perceptual_at.victims import Model, Terms, check_arguments, check_logits, check_values, is_own


def stepped(threat: Threat, x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
    """The allowed point one step up from `x_adv`: by the threat's own step, or along its steepest direction."""
    own = getattr(threat, "step", None)
    if own is not None:
        point: Tensor = own(x_adv, x, grad, step_size)
        return point
    length = per_sample(step_size.to(x), x) if isinstance(step_size, Tensor) else step_size
    return threat.project(x_adv + length * threat.steepest(grad), x)


def pure_pgd(
    f: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    start: Tensor,
    *,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    loss: PerSampleLoss = cross_entropy,
) -> Tensor:
    r"""`pgd` from a given start, written with `torch.func`: the same numbers, for graphs and for `torch.vmap`.

    $$ x_{t+1} = \Pi\big( x_t + s \cdot \mathrm{steepest}(\nabla_x \textstyle\sum_i \ell(f(x_t)_i, y_i)) \big) $$

    It holds nothing, draws nothing and reads no values, so `torch.compile(..., fullgraph=True)` takes all its steps
    as one graph and `torch.vmap` runs it over many starts at once. Not compiled it returns the very bits of
    `pgd(..., start=start)`. Use that one unless you compile or map: it borrows the model, checks values and has more
    options. With torch older than 2.15 less of it compiles, and inference mode is not supported.

    Args:
        f: maps inputs `(B, ...)` to logits, or to what `loss` takes, and changes nothing; a module must be in eval
            mode, for example that of `frozen(model)`. A module in a lane must have been called once before.
        x: clean inputs, shape `(B, ...)`, inside the bounds of the threat model (not checked).
        labels: class indices `(B,)`, or `(B, *S)` for dense logits, where -100 is no label; or what else `loss` takes.
        threat: `Linf`, `L2`, `L1`, or anything with the methods of `Threat` that computes with torch alone.
        start: where to begin, the shape of `x`; the first gradient is taken there as it is, also outside the ball.
        steps: number of gradient steps, each of which becomes part of the graph.
        step_size: length of a step, one number or one per sample `(B,)`; None means `2.5 * eps / steps`.
        loss: per-sample function `(logits, labels) -> (B,)`.

    Returns:
        Adversarial inputs, shape and dtype of `x`, without history.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes or devices differ, a number is out of range, a part of `f` is in train mode, or `f`
            returns no logits or some that do not depend on `x`.

    Source:
        Madry et al. 2018, Sec. 2.1.

    Examples:
        >>> f = lambda x: torch.cat([x, -x], dim=1)  # class 0 for positive x
        >>> x, labels = torch.tensor([[0.5]]), torch.tensor([0])
        >>> pure_pgd(f, x, labels, Linf(0.25), x)
        tensor([[0.2500]])
        >>> starts = torch.tensor([[[0.5]], [[0.625]]])
        >>> torch.vmap(lambda start: pure_pgd(f, x, labels, L2(0.125), start, steps=1, step_size=0.0625))(starts)
        tensor([[[0.4375]],
        <BLANKLINE>
                [[0.5625]]])
    """
    _check.tensor("pure_pgd", "start", start)
    check_arguments("pure_pgd", f, x, labels, threat, Terms(loss, None, start, judged=False), called="f")
    ascended("pure_pgd", loss, labels, None)
    _check.count("pure_pgd", "steps", steps)
    _check_eval("pure_pgd", f)
    if step_size is None:
        step_size = REACH * budget("pure_pgd", threat) / steps
    elif isinstance(step_size, Tensor) and not step_size.ndim:
        _check.number("pure_pgd", "step_size", step_size, above=0.0)
    elif isinstance(step_size, Tensor) or not torch.compiler.is_compiling():  # in a graph a number may be an input
        check_step_size("pure_pgd", step_size, x, threat, read=False)

    center = x.to(wide(x))
    point = start.to(center.dtype)
    with torch.no_grad():
        for _ in range(steps):
            try:
                grad = _gradient("pure_pgd", f, visible(point, x, threat), labels, loss)
            except RuntimeError as error:
                if (why := out_of_reach(error)) is None:
                    raise
                raise ValueError(f"pure_pgd: `f` {why}. Take `pgd`, which differentiates it otherwise.") from error
            point = stepped(threat, point, center, grad.to(center.dtype), step_size)
        return visible(point, x, threat).detach()  # forward mode too would follow it, without regard to `no_grad`


def _gradient(function: str, f: Model, x: Tensor, labels: Tensor, loss: PerSampleLoss) -> Tensor:
    """Gradient of the summed losses with respect to the inputs; 0 where it is undefined."""

    def outputs_at(x: Tensor) -> Any:
        outputs = f(x)
        if is_own(loss):
            check_logits(function, outputs, x.shape[0], labels)
        if not any(part.requires_grad for part in tree_leaves(outputs) if isinstance(part, Tensor)):
            raise ValueError(
                f"{function}: what `f` returns does not depend on its input; it must be computed from `x` by "
                "differentiable operations, outside torch.no_grad()."
            )
        return outputs

    def total(outputs: Any) -> Tensor:
        values = loss(outputs, labels)
        check_values(function, values, x.shape[0])
        return values.sum()

    raw, pull_back, *_ = torch.func.vjp(outputs_at, x)
    slope: Any = torch.func.grad(total)(raw.to(wide(raw)) if isinstance(raw, Tensor) else raw)
    if isinstance(raw, Tensor):
        slope = (leveled(slope) if raw.dtype == torch.float16 else slope).to(raw.dtype)
    grad: Tensor = pull_back(slope)[0]
    return grad.nan_to_num(nan=0.0)


def _check_eval(function: str, f: Model) -> None:
    """Refuse modules in train mode: batch norm would move its statistics, dropout would draw numbers."""
    for name, part in f.named_modules() if isinstance(f, nn.Module) else ():
        if part.training:
            what = f"its part {name!r}" if name else f"the {type(part).__name__}"
            raise ValueError(
                f"{function}: `f` must be in eval mode, but {what} is in train mode; pass the callable that "
                "`with frozen(model) as f` gives."
            )
