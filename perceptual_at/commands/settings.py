"""Every setting of a run, in groups, as frozen values that tyro turns into a command line."""

import dataclasses
import inspect
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from perceptual_at import objectives


def number(text: str) -> float:
    """A number, also as a fraction: `8/255`."""
    try:
        return float(Fraction(text))
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{text!r} is no number") from error


Number = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: isinstance(value, float),
        str_from_instance=lambda value: [str(Fraction(value).limit_denominator(10_000))],
    ),
]


@dataclasses.dataclass(frozen=True)
class Method:
    """What is minimised."""

    objective: str = "pgd_at"
    """A function of `perceptual_at.objectives`."""
    base: Literal["pgd_at", "trades", "mart", "consistency_at"] | None = None
    """What RPAT or DICAR is added to (rpat, dicar; PGD-AT if left out)."""
    source: Literal["release", "paper"] = "release"
    """Where released code and paper differ, which to follow: see `objectives.preset`."""
    form: Literal["interpolation", "quotient"] | None = None
    """Form of the robust-perception term (rpat only)."""
    weight: float | None = None
    """Weight of the regulariser lambda, where the objective has one."""
    alpha: float | None = None
    """Place of the middle on the path, where the objective has one."""
    beta: float | None = None
    """Weight of the KL, where the objective has one."""
    eta: float | None = None
    """Size of the reduced perturbation (RAAT family)."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The images."""

    data: Literal["cifar10", "cifar100", "tiny_imagenet", "folder", "npz", "digits", "random"] = "cifar10"
    """What to train on; `random` is noise with random labels, to try a machine out."""
    root: Path = Path("data")
    """Where the images are: the data set's folder, a folder of `train` and `test`, or an .npz file."""
    download: bool = False
    """Fetch CIFAR if it is not there."""
    padding: int = 4
    """Pixels by which an image is shifted at most."""
    padding_mode: Literal["constant", "reflect"] = "constant"
    """What is seen beyond the edge."""
    flip: bool = True
    """Mirror every second image."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained."""

    model: Literal[
        "resnet18", "resnet26_bottleneck", "preact_resnet18", "wide_resnet28_10", "wide_resnet34_10", "digits_cnn"
    ] = "resnet18"
    """A network of `perceptual_at.models`; the papers' code trained `resnet26_bottleneck` as "ResNet-18"."""
    width: int | None = None
    """Channels of the first layer; the published network's if left out."""
    stem_stride: int = 1
    """2 halves images at once, as the papers' code does for Tiny-ImageNet (residual networks only)."""
    normalize: bool = False
    """Shift and scale by CIFAR-10's statistics in the first layer, as ReBAT does."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The threat, and the attack in training."""

    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the perturbation."""
    eps: Number = 8 / 255
    """Budget in input units; fractions are understood."""
    steps: int = 10
    """Steps of the attack in training."""
    step_size: Number = 2 / 255
    """Length of a step, in training and in evaluation."""
    start: Literal["random", "clean"] = "random"
    """Where the attack begins, unless the objective says so (TRADES, MART)."""
    model_mode: Literal["eval", "as_is"] = "eval"
    """Mode of the model under attack in training; ReBAT's code attacks in train mode (`as_is`)."""
    lane: Literal["none", "fp32", "bf16"] = "none"
    """Run the attacks on a copy of the network with batch norm folded, in float32 or bfloat16: see `Lane`."""


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How the weights move."""

    epochs: int = 110
    """Passes over the training images."""
    batch: int = 128
    """Images per step, over all processes together."""
    lr: float = 0.1
    """Learning rate of SGD, at its highest."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    schedule: Literal["steps", "rebat", "one_cycle"] = "steps"
    """`steps` divides by `factor` at each milestone; `rebat` the same, looked up at the end of a step; `one_cycle`
    rises to `lr` over three tenths of the run and falls to zero."""
    milestones: tuple[int, ...] = (100, 105)
    """Epochs at which the learning rate drops (`steps`, `rebat`)."""
    factor: float = 10.0
    """What a drop divides by (`steps`, `rebat`)."""
    average_decay: float | None = None
    """Keep averaged weights with this decay and evaluate those; the objectives with a teacher need it."""
    average_start: int = 0
    """Epoch from which weights are averaged; before, the average is the model, and no term uses it."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What chooses the best weights, and what they are tested with."""

    select_on: Literal["validation", "test"] = "validation"
    """What chooses `best`: images held out of training, or the test set, as the released codes do."""
    held_out: int = 1000
    """How many training images to hold out for validation."""
    select_steps: int = 10
    """Steps of the PGD that chooses."""
    test_steps: int = 20
    """Steps of the PGD in the report on the test set."""
    eval_batch: int = 128
    """Images per batch in evaluation; verdicts do not depend on it."""


@dataclasses.dataclass(frozen=True)
class Running:
    """Where and how the run runs."""

    seed: int = 0
    """Of the first weights, the split, the order, the augmentation and the attack."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, of training and attack; `no` is float32."""
    channels_last: bool = False
    """Lay images out with channels last: faster convolutions, on CPUs too."""
    compile: bool = False
    """Compile the network with torch.compile."""
    cpu: bool = False
    """Stay on the CPU where there is an accelerator."""
    out: Path = Path("outputs/train")
    """Folder for states, weights, log and result."""
    resume: bool = False
    """Go on from the newest whole state in `out`; from the start where there is none."""
    save_every: int = 500
    """Steps between two saved states; one is saved after every epoch anyway."""


GROUPS = {
    "method": Method, "data": Data, "network": Network, "threat": Budget, "optimisation": Optimisation,
    "evaluation": Selection, "running": Running,
}  # fmt: skip
GROUP_OF = {field.name: group for group, kind in GROUPS.items() for field in dataclasses.fields(kind)}
"""The group that each option belongs to."""

AVERAGED = ("rebat", "rpat_plus_plus", "raat_sharp")
ALIGNED = ("raat", "raat_plus_plus", "raat_sharp")
TWO_VIEWS = ("consistency_at", "dicar", *ALIGNED)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run. A recipe is a set of defaults; every option changes one of them."""

    method: Method = Method()
    data: Data = Data()
    network: Network = Network()
    threat: Budget = Budget()
    optimisation: Optimisation = Optimisation()
    evaluation: Selection = Selection()
    running: Running = Running()

    def __post_init__(self) -> None:
        for name in (
            "epochs", "batch", "steps", "select_steps", "test_steps", "eval_batch", "held_out", "save_every",
            "stem_stride",
        ):  # fmt: skip
            value = getattr(getattr(self, GROUP_OF[name]), name)
            if value < 1:
                raise ValueError(f"{option(name)} must be at least 1, got {value}.")
        if self.method.objective in AVERAGED and self.optimisation.average_decay is None:
            raise ValueError(
                f"--average-decay is needed by {self.method.objective}, whose term takes averaged weights."
            )
        if self.threat.lane != "none" and self.threat.model_mode == "as_is":
            raise ValueError("--lane runs in eval mode; it cannot be had with --model-mode as_is.")
        if self.optimisation.schedule == "rebat" and len(self.optimisation.milestones) != 2:
            raise ValueError(f"--milestones must be two with --schedule rebat, got {self.optimisation.milestones}.")
        keywords(self.method)

    def changed(self, **changes: Any) -> "Settings":
        """The same settings but for the options named, whatever group they are in."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            parts.setdefault(GROUP_OF[name], {})[name] = value
        return dataclasses.replace(
            self,
            **{group: dataclasses.replace(getattr(self, group), **part) for group, part in parts.items()},
        )

    def flat(self) -> dict[str, Any]:
        """Every option by name, ready for JSON."""
        held = {name: getattr(getattr(self, group), name) for name, group in GROUP_OF.items()}
        return {name: _plain(value) for name, value in held.items()}

    def fixed(self) -> dict[str, Any]:
        """What a run may not change when it goes on: all but where it writes and how often."""
        free = ("out", "resume", "save_every", "root", "download", "cpu")
        return {name: value for name, value in self.flat().items() if name not in free}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def option(name: str) -> str:
    """A setting as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def keywords(method: Method) -> dict[str, Any]:
    """The keywords of the objective: the preset's, then those given. One that it does not take is refused."""
    known = inspect.signature(getattr(objectives, method.objective)).parameters
    chosen: dict[str, Any]
    if method.objective == "dicar":  # a combination of our own: the presets know its bases only
        chosen = {} if method.base is None else {"base": method.base, **objectives.preset(method.base, method.source)}
    else:
        chosen = objectives.preset(method.objective, method.source, base=method.base)
    for name in ("form", "weight", "alpha", "beta", "eta"):
        value = getattr(method, name)
        if value is None:
            continue
        if name not in known and not (name == "beta" and method.base in ("trades", "mart")):
            raise ValueError(f"{option(name)} has no effect with --objective {method.objective}.")
        chosen[name] = value
    return chosen
