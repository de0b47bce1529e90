"""The two-dimensional problems of the pictures, and networks trained on them with the library's own objectives."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptual_at import Linf, draw_beta, frozen, objectives, pgd

torch.set_num_threads(1)

EPS = 0.08
THREAT = Linf(EPS)


class Network(nn.Module):
    """Two hidden layers; it normalises its inputs itself."""

    def __init__(self, classes: int, *, seed: int, width: int = 64):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of points in the unit square."""
        return self.layers((x - 0.5) / 0.2)


def moons(count: int, *, seed: int, noise: float = 0.15) -> tuple[Tensor, Tensor]:
    """Two interleaved half moons in the unit square, noisy enough to touch."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    angle = torch.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    points = torch.where(labels[:, None] == 0, upper, lower) + noise * torch.randn(count, 2, generator=generator)
    return ((points - torch.tensor([0.5, 0.25])) / 3.6 + 0.5).clamp(0, 1), labels


def three_clouds(count: int, *, seed: int, spread: float = 0.09) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds in the unit square."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centers = torch.tensor([[0.28, 0.32], [0.72, 0.34], [0.48, 0.72]])
    return (centers[labels] + spread * torch.randn(count, 2, generator=generator)).clamp(0, 1), labels


def unperturbed(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
    """The attack that does nothing: with it, adversarial training is standard training."""
    return x


METHODS = ("standard", "PGD-AT", "PGD-AT+RPAT", "RAAT")


def train(
    method: str, x: Tensor, labels: Tensor, *, seed: int, steps: int = 300, rate: float = 0.1, jitter: float = 0.01
) -> nn.Module:
    """Train on two jittered views per step, the same ones for every method."""
    model = Network(int(labels.max()) + 1, seed=seed)
    views_from, starts_from = (torch.Generator().manual_seed(1000 * k + seed) for k in (1, 2))
    attack = functools.partial(pgd, threat=THREAT, steps=5, step_size=EPS / 2, generator=starts_from)
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(steps):
        views = [(x + jitter * torch.randn(x.shape, generator=views_from)).clamp(0, 1) for _ in range(2)]
        mix = draw_beta(fold="max", generator=views_from)
        loss, _ = _objective(method, model, views, labels, attack, mix)
        with torch.no_grad():
            pace = rate * (1 - step / steps)
            for parameter, speed, slope in zip(
                parameters, velocity, torch.autograd.grad(loss, parameters), strict=True
            ):
                speed.mul_(0.9).add_(slope)
                parameter.sub_(pace * speed)
    return model.eval()


def _objective(
    method: str, model: nn.Module, views: Sequence[Tensor], labels: Tensor, attack: objectives.passes.Attack, mix: float
) -> tuple[Tensor, dict[str, Tensor]]:
    if method == "standard":
        return objectives.pgd_at(model, views, labels, unperturbed)
    if method == "PGD-AT":
        return objectives.pgd_at(model, views, labels, attack)
    if method == "PGD-AT+RPAT":
        return objectives.rpat(model, views, labels, attack, base="pgd_at")
    return objectives.raat(model, views, labels, attack, mix=mix)


@functools.cache
def trained(method: str, *, problem: str = "moons", seed: int = 0, count: int = 160) -> nn.Module:
    """A network trained once per process."""
    return train(method, *{"moons": moons, "clouds": three_clouds}[problem](count, seed=seed), seed=seed)


def accuracies(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Clean and PGD-20 accuracy in percent."""
    generator = torch.Generator().manual_seed(7)
    x_adv = pgd(model, x, labels, THREAT, steps=20, step_size=EPS / 8, generator=generator)
    with torch.no_grad(), frozen(model) as f:
        return {name: 100 * _share(f(z), labels) for name, z in (("clean", x), ("pgd20", x_adv))}


def _share(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def holds_everywhere(model: nn.Module, x: Tensor, labels: Tensor, *, points: int = 17) -> Tensor:
    """Whether a sample is right on a fine grid over its whole ball: a search, not an attack."""
    ticks = torch.linspace(-EPS, EPS, points)
    ball = torch.cartesian_prod(ticks, ticks)
    places = (x[:, None] + ball).clamp(0, 1)
    with torch.no_grad():
        predicted = model(places.flatten(0, 1)).argmax(dim=1).view(len(x), -1)
    return (predicted == labels[:, None]).all(dim=1)
