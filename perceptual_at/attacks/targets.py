"""What an attack ascends: per-sample functions `(logits, labels) -> (B,)`.

Any function of that shape can be given to an attack as `loss`. It should return one value per sample: the
attack sums them, so that a sample's perturbation does not depend on who shares its batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from perceptual_at import _check
from perceptual_at._places import known, labelled, margins, over_places, right
from perceptual_at._values import Value
from perceptual_at.divergences import PerSampleLoss, kl_divergence
from perceptual_at.victims import plain


@_check.names_labels
def margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Largest wrong logit minus the right one: positive when the sample is misclassified, 0 when both are equal.

    $$ \max_{k \ne y} z_k - z_y $$

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)`, or `(B, *S)`, where -100 is no label.

    Returns:
        Shape `(B,)`; of dense logits the mean over the labelled places.

    Raises:
        TypeError: if `labels` are no class indices.
        ValueError: if shapes do not fit or devices differ.

    Source:
        Carlini and Wagner 2017, the objective $f_6$ without its cap. RAAT's column C&W is PGD on it in our reading.

    Examples:
        >>> margin(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([0]))
        tensor([2.])
        >>> margin(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1]))
        tensor([-2.])
    """
    _check.logits("margin", logits=logits)
    labels = _check.indices("margin", labels, read=False, logits=logits)
    return over_places(margins(logits, labels), labelled(labels))


@_check.names_labels
def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Difference-of-logits ratio: the margin in units of the spread of the three largest logits.

    $$ -\frac{z_y - \max_{k \ne y} z_k}{z_{\pi_1} - z_{\pi_3} + 10^{-12}} $$

    Unchanged when all logits are shifted or scaled, so saturated models do not stop it. Two classes have
    no third logit: there the margin itself is returned.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)`, or `(B, *S)`, where -100 is no label.

    Returns:
        Shape `(B,)`; of dense logits the mean over the labelled places.

    Raises:
        TypeError: if `labels` are no class indices.
        ValueError: if shapes do not fit or devices differ.

    Source:
        Croce and Hein 2020 (AutoAttack), Eq. 6; the constant is that of their code.

    Examples:
        >>> dlr(torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([0]))  # -(4 - 2) / (4 - 0)
        tensor([-0.5000])
        >>> dlr(torch.tensor([[40.0, 20.0, 0.0]]), torch.tensor([0]))
        tensor([-0.5000])
    """
    _check.logits("dlr", logits=logits)
    labels = _check.indices("dlr", labels, read=False, logits=logits)
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1).values
    ratios = margins(logits, labels) / _spread(top[:, 0], top[:, 2])
    return over_places(ratios, labelled(labels))


@_check.names_labels
def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    r"""Difference-of-logits ratio towards one wrong class.

    $$ -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2 + 10^{-12}} $$

    It needs four classes. With fewer it is the difference $z_t - z_y$ alone.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)`, or `(B, *S)`, where -100 is no label.
        targets: the wrong classes to move to, of the shape of `labels`.

    Returns:
        Shape `(B,)`; positive where the target is ahead of the label. Of dense logits the mean over labelled places.

    Raises:
        TypeError: if `labels` or `targets` are no class indices.
        ValueError: if shapes do not fit or devices differ.

    Source:
        Croce and Hein 2020 (AutoAttack), Eq. 7; the constant is that of their code.

    Examples:
        >>> logits = torch.tensor([[6.0, 2.0, 1.0, 1.0]])
        >>> targeted_dlr(logits, torch.tensor([0]), torch.tensor([1]))  # -(6 - 2) / (6 - 1)
        tensor([-0.8000])
        >>> targeted_dlr(logits[:, :3], torch.tensor([0]), torch.tensor([1]))
        tensor([-4.])
    """
    _check.logits("targeted_dlr", logits=logits)
    labels = _check.indices("targeted_dlr", labels, read=False, logits=logits)
    targets = _check.indices("targeted_dlr", targets, name="targets", read=False, logits=logits)
    ahead = (_at(logits, targets) - _at(logits, labels)).squeeze(1)
    if logits.shape[1] >= 4:
        top = logits.topk(4, dim=1).values
        ahead = ahead / _spread(top[:, 0], (top[:, 2] + top[:, 3]) / 2)
    return over_places(ahead, labelled(labels))


def kl_to(reference_logits: Tensor) -> PerSampleLoss:
    r"""Distance of the prediction from a fixed one: the function TRADES attacks with.

    $$ z \mapsto \mathrm{KL}\big( \mathrm{softmax}(z_{\mathrm{ref}}) \,\|\, \mathrm{softmax}(z) \big) $$

    Its gradient vanishes where the prediction equals the reference, so an attack on it must not start at the
    clean input. Labels are ignored, except that dense ones `(B, *S)` say which places count; attacks refuse it with
    `targets`.

    Args:
        reference_logits: shape `(B, K)`, or dense `(B, K, *S)`; held fixed.

    Returns:
        A function `(logits, labels) -> (B,)` for batches in the same order. Attacks that go on with some of the samples
        ask its method `select(rows)` for theirs; a loss of your own that belongs to a batch can have one too.

    Raises:
        TypeError: if `reference_logits` are no floating-point tensor.
        ValueError: if they are no logits.

    Source:
        Zhang et al. 2019 (TRADES), Algorithm 1.

    Examples:
        >>> loss = kl_to(torch.zeros(1, 2))
        >>> loss(torch.ones(1, 2), torch.tensor([0]))
        tensor([0.])
        >>> loss(torch.tensor([[0.0, 100.0]]), torch.tensor([0])) > 40
        tensor([True])
    """
    _check.logits("kl_to", reference_logits=reference_logits)
    with torch.inference_mode(False):
        reference = reference_logits.clone() if reference_logits.is_inference() else reference_logits.detach()
    return _KLTo(reference)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _KLTo(Value):
    """What `kl_to` gives; a value, so that it can be compared, copied and pickled."""

    reference: Tensor

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        dense = logits.ndim > 2 and labels.shape == logits[:, 0].shape
        return kl_divergence(self.reference, logits, mask=labelled(labels) if dense else None)

    def select(self, rows: Tensor) -> "_KLTo":
        """The function for some samples of its batch, by index or mask."""
        return _KLTo(self.reference[rows.to(self.reference.device)])


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each label, `(B, 1, *S)`; that of class 0 where there is no label."""
    return logits.gather(1, known(labels).unsqueeze(1))


def _spread(largest: Tensor, low: Tensor) -> Tensor:
    """What the difference of logits is divided by; 1 where masked classes leave no third logit."""
    spread = largest - low + 1e-12
    return torch.where(low.isneginf(), torch.ones_like(spread), spread)


Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def loss_of(loss: Loss, rows: Tensor) -> Loss:
    """The loss for some samples of a batch; one that holds nothing for each sample has no `select`."""
    own: Callable[[Tensor], Loss] | None = getattr(loss, "select", None)
    return loss if own is None else own(rows)


class Towards:
    """What to ascend to be taken for targets: the loss towards them, turned round; of DLR the targeted form.

    DLR leads away from a class and, turned round, towards none, so it needs the class to leave beside the target.
    """

    labels: Tensor | None = None
    """The classes to leave, once they have been looked at."""

    def __init__(self, function: str, loss: Any, labels: Tensor) -> None:
        self.function, self.loss, self.given = function, loss, plain(labels)
        self.leaves = _function(loss) in (dlr, targeted_dlr)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """One value per sample."""
        if not self.leaves:
            away: Tensor = self.loss(logits, targets)
            return -away
        if self.labels is None:
            self.labels = _check.indices(self.function, self.given, logits=logits)
        return targeted_dlr(logits, self.labels, targets)

    def select(self, rows: Tensor) -> "Towards":
        """The same for some samples of the batch."""
        labels = self.given if self.labels is None else self.labels
        if not labels.is_floating_point():
            labels = labels.long()  # torch has no rows of some integer dtypes
        return Towards(self.function, loss_of(self.loss, rows), labels[rows])


def ascended(function: str, loss: Any, labels: Tensor, targets: Tensor | None) -> PerSampleLoss:
    """What an attack ascends: the loss as it is, or with `targets` what leads towards them."""
    if loss is None:
        raise TypeError(f"{function}: `loss` must be a function (outputs, labels) -> (B,), got None.")
    if targets is not None:
        if isinstance(loss, _KLTo) or _function(loss) in (segpgd_loss, cospgd_loss):
            named = "kl_to(...)" if isinstance(loss, _KLTo) else _function(loss).__name__
            raise ValueError(
                f"{function}: `loss`={named} leads away from what a model says, and turned round not towards "
                "`targets`; take cross_entropy or margin, or drop `targets`."
            )
        return Towards(function, loss, labels)
    if loss is targeted_dlr:
        raise ValueError(f"{function}: `loss`=targeted_dlr leads from a label to a target, so it needs `targets`.")
    check_batch(function, loss, labels)
    own: PerSampleLoss = loss
    return own


def check_batch(function: str, loss: Any, labels: Any) -> None:
    """Require a `kl_to` that was made for this batch: rows of a larger one would be those of other samples."""
    if isinstance(loss, _KLTo) and isinstance(labels, Tensor) and len(loss.reference) != len(labels):
        raise ValueError(
            f"{function}: `loss`=kl_to(...) holds {len(loss.reference)} predictions and `labels` are {len(labels)}; "
            "make it of the logits of the same batch."
        )


def _function(loss: Any) -> Any:
    """The function whose options may have been bound."""
    return _function(loss.func) if isinstance(loss, functools.partial) else loss


def likely_targets(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Wrong classes in the order of their logits, shape `(B, min(count, K - 1))`."""
    others = logits.scatter(1, labels.long()[:, None], -math.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


@_check.names_labels
def segpgd_loss(logits: Tensor, labels: Tensor, *, wrong_weight: float) -> Tensor:
    r"""Cross entropy in which places count by whether they are still right.

    $$ \frac1{|S|} \sum_{s \in S} w_s\,\mathrm{CE}_s, \qquad
       w_s = \begin{cases} 1 - \lambda & \text{where the prediction is right} \\ \lambda & \text{else} \end{cases} $$

    SegPGD lets $\lambda = t / (2 T)$ grow over its steps t = 0, ..., T - 1, from right places alone to all alike: one
    `pgd(..., steps=1, start=x_adv, loss=partial(segpgd_loss, wrong_weight=t / (2 * T)))` per step.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)`, or `(B, *S)`, where -100 is no label.
        wrong_weight: $\lambda$ in [0, 1].

    Returns:
        Shape `(B,)`, the mean over the labelled places.

    Raises:
        TypeError: if `labels` are no class indices.
        ValueError: if shapes do not fit, devices differ, or `wrong_weight` is outside [0, 1].

    Source:
        Gu et al. 2022 (SegPGD), Eq. 4 and Algorithm 1.

    Examples:
        >>> logits = torch.zeros(1, 2, 2) + torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # place 0 is of class 0, 1 of 1
        >>> segpgd_loss(logits, torch.tensor([[0, 0]]), wrong_weight=0.0)  # 0.3133 where it is right, over 2 places
        tensor([0.1566])
        >>> segpgd_loss(logits, torch.tensor([[0, 0]]), wrong_weight=1.0)  # 1.3133 where it is wrong
        tensor([0.6566])
    """
    _check.logits("segpgd_loss", logits=logits)
    labels = _check.indices("segpgd_loss", labels, read=False, logits=logits)
    _check.number("segpgd_loss", "wrong_weight", wrong_weight, at_least=0.0, at_most=1.0)
    places = functional.cross_entropy(logits, labels, reduction="none")
    weighted = torch.where(right(logits, labels), (1.0 - wrong_weight) * places, wrong_weight * places)
    return over_places(weighted, labelled(labels))


@_check.names_labels
def cospgd_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross entropy in which places count by how close the prediction still is to the label.

    $$ \frac1{|S|} \sum_{s \in S} \cos(p_s, e_{y_s})\,\mathrm{CE}_s, \qquad
       \cos(p, e_y) = \frac{p_y}{\|p\|_2}, \quad p = \mathrm{softmax}(z) $$

    The cosine is held fixed, as in the released code: it weighs a place's gradient and has none itself.

    Args:
        logits: shape `(B, K)`, or dense `(B, K, *S)`.
        labels: class indices `(B,)`, or `(B, *S)`, where -100 is no label.

    Returns:
        Shape `(B,)`, the mean over the labelled places.

    Raises:
        TypeError: if `labels` are no class indices.
        ValueError: if shapes do not fit or devices differ.

    Source:
        Agnihotri et al. 2024 (CosPGD), and its released code.

    Examples:
        >>> cospgd_loss(torch.zeros(1, 2), torch.tensor([0]))  # cos 45 degrees times log 2
        tensor([0.4901])
        >>> cospgd_loss(torch.tensor([[0.0, 200.0]]), torch.tensor([0]))  # surely wrong: nothing to be won
        tensor([0.])
    """
    _check.logits("cospgd_loss", logits=logits)
    labels = _check.indices("cospgd_loss", labels, read=False, logits=logits)
    places = functional.cross_entropy(logits, labels, reduction="none")
    shares = functional.normalize(logits.detach().softmax(dim=1), dim=1)
    cosines = shares.gather(1, known(labels).unsqueeze(1)).squeeze(1)
    places = torch.where(cosines > 0, places, torch.zeros_like(places))  # also where the label itself is masked
    return over_places(cosines * places, labelled(labels))
