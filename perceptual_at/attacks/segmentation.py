"""What the attacks on segmentation ascend: cross entropies that weigh places by what has been reached there.

Plain cross entropy goes on pushing places that are wrong already, for which nothing more can be won.
"""

import torch
from torch import Tensor
from torch.nn import functional

from perceptual_at import _check
from perceptual_at._places import known, labelled, over_places, right


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
        >>> cospgd_loss(torch.tensor([[0.0, 100.0]]), torch.tensor([0]))  # surely wrong: nothing to be won
        tensor([0.])
    """
    _check.logits("cospgd_loss", logits=logits)
    labels = _check.indices("cospgd_loss", labels, read=False, logits=logits)
    places = functional.cross_entropy(logits, labels, reduction="none")
    shares = functional.normalize(logits.detach().softmax(dim=1), dim=1)
    cosines = shares.gather(1, known(labels).unsqueeze(1)).squeeze(1)
    places = torch.where(cosines > 0, places, torch.zeros_like(places))  # also where the label itself is masked
    return over_places(cosines * places, labelled(labels))
