"""The books of an attack that looks for one adversarial point per sample."""

import torch
from torch import Tensor

from perceptual_at._shapes import per_sample
from perceptual_at.attacks.queries import Queries, misclassified
from perceptual_at.attacks.verdict import Verdict


class Search:
    """What has been found for each sample of a batch, and what it cost.

    Samples are addressed by their rows in the batch, so that an attack can go on with those still in play
    (`remaining`) and leave out decided ones.

    Args:
        x: clean inputs, shape `(B, ...)`.
        labels: class indices `(B,)`.
    """

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self.x_adv = x.clone()
        self.success = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        self.step = torch.full((x.shape[0],), -1, device=x.device)
        self.gradients = torch.zeros_like(self.step)
        self.forwards = torch.zeros_like(self.step)

    def spend(self, rows: Tensor, *, gradients: int = 0, forwards: int = 0) -> None:
        """Note passes; those of a gradient are `gradients=1`, which is a forward pass too."""
        self.gradients[rows] += gradients
        self.forwards[rows] += gradients + forwards

    def judge(self, rows: Tensor, points: Tensor, logits: Tensor, step: int) -> Tensor:
        """Keep the points that are misclassified where none was known; gives the mask of misclassified rows."""
        wrong = misclassified(logits, self.labels[rows])
        self.record(rows, points, wrong & ~self.success[rows], step)
        return wrong

    def confirmed(self, queries: Queries, rows: Tensor, points: Tensor, claimed: Tensor) -> Tensor:
        """Those of the points claimed to be misclassified that are so by the model itself; a lane may be wrong."""
        if not queries.confirms:
            return claimed
        places = claimed.nonzero().squeeze(1)
        if not len(places):
            return claimed
        labels = self.labels[rows[places]]
        self.spend(rows[places], forwards=queries.eot)
        return claimed.index_copy(0, places, misclassified(queries.logits(points[places], labels), labels))

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
        return (~self.success).nonzero().squeeze(1)

    def result(self, verdict: bool) -> Tensor | Verdict:
        """What the attack returns."""
        if not verdict:
            return self.x_adv
        return Verdict(self.x_adv, self.success, self.step, self.gradients, self.forwards)
