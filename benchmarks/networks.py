"""Networks of others from their published weights: a small table of definitions by name, and how they are built.

A definition says what the layers are, on which images the network is tried and how far they may move:

    {"layers": ["flatten", "linear 784 100", "relu", "linear 100 10"], "images": "mnist_test_1000.npz", "eps": 0.3}

`layers` mirrors the names of the weights: a list is numbered, a dictionary has names, both may be nested. `images`
names an .npz file beside the weights or one folder above, with `x` and `y` (or `x_test` and `y_test`), bytes or numbers
in [0, 1]; `count` says how many of them to take, `seconds` how long programming may take for one. `eps` is a number or
a text such as "8/255". The weights are `<name>.safetensors`, or what `weights` says. `like` takes over what another
definition says, and `"proven": "broken"` says that every image is known to have an adversarial input. Further
definitions, in a JSON file, go by the same rules; `networks.json` beside the weights is read by itself.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perceptual_at.checkpoints import read_weights
from perceptual_at.models import Normalize

Definition = Mapping[str, Any]


def convolutional(channels: int, entries: int) -> list[str]:
    """Two convolutions and two linear layers, a form that several groups use."""
    return [
        f"conv {channels} 16 4 2 1", "relu", "conv 16 32 4 2 1", "relu", "flatten", f"linear {entries} 100", "relu",
        "linear 100 10",
    ]  # fmt: skip


MNIST, CIFAR = "mnist_test_1000.npz", "cifar10_exact_subset.npz"
DEFINITIONS: dict[str, Definition] = {
    "lpd_mlp_0_3": {
        "layers": ["flatten", "linear 784 100", "relu", "linear 100 100", "relu", "linear 100 10"],
        "images": MNIST, "eps": 0.3, "count": 1000,
    },
    "madry_tiny": {
        "layers": [
            "conv 1 4 5 2 2", "relu", "conv 4 8 5 2 2", "relu", "flatten", "linear 392 128", "relu", "linear 128 10",
        ],
        "images": MNIST, "eps": 0.3, "count": 40, "seconds": 4,
    },
    "madry_tiny, breakable": {
        "like": "madry_tiny", "weights": "madry_tiny.safetensors", "images": "madry_tiny_breakable.npz", "seconds": 4,
        "proven": "broken",
    },
    "wk_cifar_8px": {
        "layers": ["normalize 3", convolutional(3, 2048)], "images": CIFAR, "eps": "8/255", "count": 300,
    },
    "resnet2b": {
        "layers": [
            "normalize 3",
            {
                "conv1": "conv 3 8 3 2 1", "relu1": "relu", "layer1": ["block 8 16 2", "block 16 16 1"],
                "flatten": "flatten", "linear1": "linear 1024 100", "relu2": "relu", "linear2": "linear 100 10",
            },
        ],
        "images": CIFAR, "eps": "2/255", "count": 30,
    },
    "fast_fgsm": {"layers": convolutional(1, 1568), "images": MNIST, "eps": 0.3, "count": 30},
}  # fmt: skip


class Network(NamedTuple):
    """A network, and what it is tried on."""

    name: str
    model: nn.Module
    x: Tensor
    labels: Tensor
    eps: float
    proven: str | None
    """`"broken"` where every image is known to have an adversarial input."""


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, *, norm: bool = False) -> None:
        super().__init__()
        bias = not norm
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut.append(nn.Conv2d(channels, width, 1, stride, bias=bias))
            if norm:
                self.shortcut.append(nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inside)) + self.shortcut(x))


LAYERS = {
    "linear": nn.Linear,
    "conv": nn.Conv2d,
    "batchnorm1d": nn.BatchNorm1d,
    "batchnorm2d": nn.BatchNorm2d,
    "avgpool": nn.AvgPool2d,
    "relu": nn.ReLU,
    "flatten": nn.Flatten,
    "block": Block,
    "block_bn": lambda *numbers: Block(*numbers, norm=True),
    "normalize": lambda channels: Normalize([0.0] * channels, [1.0] * channels),
}


def built(layers: str | list[Any] | dict[str, Any]) -> nn.Module:
    """The layers that a definition writes down."""
    if isinstance(layers, list):
        return nn.Sequential(*map(built, layers))
    if isinstance(layers, dict):
        return nn.Sequential(OrderedDict((name, built(part)) for name, part in layers.items()))
    word, *numbers = layers.split()
    if word not in LAYERS:
        raise ValueError(f"built: a layer must be one of {', '.join(LAYERS)}, got {layers!r}.")
    return LAYERS[word](*map(int, numbers))


def definitions(folder: Path, file: Path | None = None) -> dict[str, Definition]:
    """Those known here, those of `networks.json` in the folder and those of a file, with `like` filled in."""
    found = dict(DEFINITIONS)
    for path in (folder / "networks.json", *([file] if file else [])):
        if path.exists() or path == file:
            found.update(json.loads(path.read_text(encoding="utf-8")))
    return {name: filled(name, found) for name in found}


FIELDS = ("layers", "images", "eps", "count", "seconds", "weights", "proven", "like")


def filled(name: str, known: Mapping[str, Definition]) -> Definition:
    """A definition with what `like` takes over, checked."""
    if name not in known:
        raise ValueError(f"definitions: `like` must be one of {', '.join(known)}, got {name!r}.")
    one = known[name]
    if "like" in one:
        others = {key: known[key] for key in known if key != name}  # a circle of definitions ends in the message above
        one = {**filled(one["like"], others), **one}
    wrong = sorted(set(one) - set(FIELDS)) + [f"no {field}" for field in FIELDS[:3] if field not in one]
    if wrong or one.get("proven", "broken") != "broken":
        raise ValueError(
            f"definitions: {name!r} must hold {', '.join(FIELDS[:3])}, and may hold {', '.join(FIELDS[3:])} "
            f'("proven" is "broken"); got {", ".join(wrong) or one["proven"]}.'
        )
    return one


def loaded(name: str, definition: Definition, folder: Path, most: int | None = None) -> Network:
    """The network with its weights, and the first of its images.

    Args:
        name: of the network.
        definition: of it.
        folder: where the weights lie.
        most: images at most.
    """
    model = built(definition["layers"])
    model.load_state_dict(fitted(read_weights(weights_of(name, definition, folder)), model))
    x, labels = images(images_of(definition, folder))
    count = min(definition.get("count", len(x)), most or len(x))
    eps = float(Fraction(definition["eps"])) if isinstance(definition["eps"], str) else float(definition["eps"])
    return Network(
        name, model.eval().requires_grad_(False), x[:count], labels[:count], eps, definition.get("proven")
    )  # fmt: skip


def weights_of(name: str, definition: Definition, folder: Path) -> Path:
    """The file of weights."""
    return folder / definition.get("weights", f"{name}.safetensors")


def fitted(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names and in the shapes that the model has: `m` and `s` are mean and deviation of pixels."""
    wanted, names = model.state_dict(), {"m": "mean", "s": "std"}
    found = {}
    for name, value in weights.items():
        before, dot, last = name.rpartition(".")
        name = f"{before}{dot}{names[last]}" if last in names and name not in wanted else name
        same = name in wanted and value.numel() == wanted[name].numel()
        found[name] = value.reshape(wanted[name].shape) if same else value
    return found


def images_of(definition: Definition, folder: Path) -> Path:
    """The file of images: beside the weights, or one folder above."""
    beside, above = folder / definition["images"], folder.parent / definition["images"]
    return above if above.exists() and not beside.exists() else beside


def images(path: Path) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and their classes."""
    with np.load(path) as held:
        x, labels = ((held[key] if key in held else held[f"{key}_test"]) for key in ("x", "y"))
    pixels = torch.from_numpy(x)
    return pixels.float() / (1 if pixels.is_floating_point() else 255), torch.from_numpy(labels).long()
