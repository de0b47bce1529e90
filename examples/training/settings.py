"""Every setting of a run, as one frozen value that tyro turns into a command line."""

import dataclasses
import inspect
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from perceptual_at import objectives


def number(text: str) -> float:
    """A number, also as a fraction: `8/255`."""
    return float(Fraction(text))


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

Objective = Literal[
    "pgd_at", "trades", "mart", "consistency_at", "rpat", "rebat", "rpat_plus_plus",
    "raat", "raat_plus_plus", "raat_sharp", "dicar",
]  # fmt: skip
AVERAGED = ("rebat", "rpat_plus_plus", "raat_sharp")
ALIGNED = ("raat", "raat_plus_plus", "raat_sharp")
MIXING = (*ALIGNED, "dicar")
TWO_VIEWS = ("consistency_at", *MIXING)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run. A recipe is a set of defaults; every option changes one of them."""

    # What is minimised
    objective: Objective = "pgd_at"
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

    # The images
    data: Literal["cifar10", "cifar100", "tiny_imagenet", "folder", "npz", "digits", "random"] = "cifar10"
    """What to train on; `random` is noise with random labels, to try the script out."""
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

    # The network
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

    # The threat, and the attack in training
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
    """Mode of the model under attack in training; ReBAT's code attacks in train mode (`keep`)."""

    # Optimisation
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

    # Selection and evaluation
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

    # The machine
    seed: int = 0
    """Of the first weights, the split, the order, the augmentation and the attack."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, of training and attack; `no` is float32."""
    lane: Literal["none", "fp32", "bf16"] = "none"
    """Run the attacks on a copy of the network with batch norm folded, in float32 or bfloat16: see `Lane`."""
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

    def __post_init__(self) -> None:
        for name in (
            "epochs", "batch", "steps", "select_steps", "test_steps", "eval_batch",
            "held_out", "save_every", "stem_stride",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.objective in AVERAGED and self.average_decay is None:
            raise ValueError(f"--average-decay is needed by {self.objective}, whose term takes averaged weights.")
        if self.lane != "none" and self.model_mode == "as_is":
            raise ValueError("--lane runs in eval mode; it cannot be had with --model-mode keep.")
        if self.schedule == "rebat" and len(self.milestones) != 2:
            raise ValueError(f"--milestones must be two with --schedule rebat, got {self.milestones}.")
        self.options()

    def options(self) -> dict[str, Any]:
        """The keywords of the objective: the preset's, then those given. One that it does not take is refused."""
        known = inspect.signature(getattr(objectives, self.objective)).parameters
        if self.objective == "dicar":  # a combination of our own: the presets know its bases only
            chosen = {} if self.base is None else {"base": self.base, **objectives.preset(self.base, self.source)}
        else:
            chosen = objectives.preset(self.objective, self.source, base=self.base)
        for name in ("form", "weight", "alpha", "beta", "eta"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in known and not (name == "beta" and self.base in ("trades", "mart")):
                raise ValueError(f"--{name} has no effect with --objective {self.objective}.")
            chosen[name] = value
        return chosen

    def fixed(self) -> dict[str, Any]:
        """What a run may not change when it goes on: all but where it writes and how often, ready for JSON."""
        free = ("out", "resume", "save_every", "root", "download", "cpu")
        kept = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
