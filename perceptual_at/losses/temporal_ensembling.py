"""TE: predictions should stay with the average of a sample's earlier ones."""

from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide


def temporal_ensembling_loss(logits: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Mean squared difference of a prediction from a sample's ensembled earlier predictions.

    $$ \ell = \tfrac1K \sum_k (p_k - t_k)^2 $$

    The mean runs over classes, as in the released code: with 100 classes a sample's term is a tenth of that with 10.

    Args:
        logits: $f(x_{\mathrm{adv}})$ on PGD-AT, $f(x)$ on TRADES; shape `(B, K)`, or dense `(B, K, *S)`.
        targets: probabilities $t$, the same shape, as from `memories.ensemble_targets`; held fixed by the caller.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, in [0, 2 / K], a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ.

    Source:
        Dong et al. 2022 (memorization in adversarial training), Eq. 7, and its released code.

    Examples:
        >>> temporal_ensembling_loss(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
        tensor(0.)
        >>> temporal_ensembling_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor(0.2500)
    """
    name = "temporal_ensembling_loss"
    _check.logits(name, logits=logits, targets=targets)
    dtype = wide(logits, targets)
    error = (logits.to(dtype).softmax(dim=1) - targets.to(dtype)).square().mean(dim=1)
    return reduce(name, error.to(common(logits, targets)), reduction)
