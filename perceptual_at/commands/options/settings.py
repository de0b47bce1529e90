"""Every setting of a run, in groups, as frozen values that tyro turns into a command line."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any, Literal

from perceptual_at.commands.options.words import Amount, Number, Place, literals, meant, option

Strength = Literal["full", "reduced", "clean"]


@dataclasses.dataclass(frozen=True)
class Method:
    """What is minimised."""

    objective: str = "pgd_at"
    """A function of `perceptual_at.objectives`."""
    base: str | None = None
    """What the objective builds on (PGD-AT if left out): any that rpat and dicar can be added to, `dicar+NAME` for both
    on one base, or one of its own (te, hat, adr, score and others)."""
    source: Literal["release", "paper"] = "release"
    """Where released code and paper differ, which to follow: see `objectives.preset`."""
    form: Literal["interpolation", "quotient"] | None = None
    """Form of the robust-perception term (rpat only)."""
    criterion: Literal["mse", "kl", "js", "cosine"] | None = None
    """What compares two movements of perception (rpat only)."""
    perceive: Literal["logits", "second_to_last", "third_to_last"] | None = None
    """The layer whose output counts as perception (rpat only)."""
    weight: float | None = None
    """Weight of the regulariser lambda, where the objective has one."""
    alpha: Place = None
    """Place of the middle on the path, or drawn once a batch: Beta, its smaller (beta-) or larger side (beta+)."""
    beta: float | None = None
    """Weight of the KL, where the objective has one."""
    eta: float | None = None
    """Size of the reduced perturbation (RAAT family, and perturbations by group)."""
    misclassified: Literal["standard", "clean", "mart"] | None = None
    """What misclassified samples are trained on (raat only)."""
    concentration: float = 0.75
    """Parameter of the Beta distributions that are drawn from."""
    temperature: float | None = None
    """Temperature of the regulariser, where it has one."""
    consistency_weight: float | None = None
    """Weight of the consistency term (consistency_at, also as a base)."""
    average_over: Literal["selected", "selected_everywhere", "all"] | None = None
    """What DICAR's mean runs over: the pairs in use of each process, of all processes, or all pairs."""
    boundary_perturbation: Strength | None = None
    """Perturbation of boundary samples, for RAAT's Fig. 2 (pgd_at only); misclassified ones are then clean."""
    interior_perturbation: Strength | None = None
    """Perturbation of the samples inside, for RAAT's Fig. 2 (pgd_at only)."""
    cutmix: bool = False
    """Mix images and labels by CutMix, as ReBAT* and RPAT++* do."""
    smoothing: float = 0.0
    """Smooth the labels of the loss, not those of the attack."""
    smoothing_over: Literal["others", "all"] = "others"
    """Spread what is taken from a label over the other classes, or over all."""
    options: tuple[str, ...] = ()
    """Further keywords of the objective, and numbers of its memory or schedule, as name=value."""
    later: tuple[str, ...] = ()
    """Keywords that are others from an epoch on, as epoch:name=value."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The images."""

    data: Literal["cifar10", "cifar100", "tiny_imagenet", "folder", "tars", "npz", "digits", "random"] = "cifar10"
    """What to train on; `random` is noise with random labels, to try a machine out."""
    root: Path = Path("data")
    """Where the images are: the data set's folder, a folder of `train` and `test`, or an .npz file."""
    stream: bool = False
    """Leave the images on the disk and decode them as they are needed (folder; tars always do)."""
    size: tuple[int, ...] = ()
    """Side of the images, or height and width (folder, tars); 224 for streams if left out."""
    grey: bool = False
    """One channel instead of three (folder, tars)."""
    skip_damaged: bool = False
    """Leave out images that cannot be read, with a count and their names, instead of stopping (folder, tars)."""
    layout: Literal["channels_first", "channels_last"] | None = None
    """Where the channels of an archive are, if its shape does not tell (npz)."""
    workers: int = 2
    """Processes that decode streamed images."""
    augment: Literal["shift", "resized_crop", "none"] | None = None
    """`shift` moves and mirrors batches; `resized_crop` crops each image at random and scales it, as for ImageNet
    (streams, where it is the default); `none` shows images as they are."""
    extra: Path | None = None
    """More images to train on, generated or unlabelled: an .npz file with x_train, and y_train unless --init labels."""
    extra_share: float = 0.5
    """Share of a batch that comes from --extra."""
    download: bool = False
    """Fetch CIFAR if it is not there."""
    padding: int = 4
    """Pixels by which an image is shifted at most (shift)."""
    padding_mode: Literal["constant", "reflect"] = "constant"
    """What is seen beyond the edge (shift)."""
    flip: bool = True
    """Mirror every second image."""

    @property
    def streams(self) -> bool:
        """Whether images stay on the disk until they are needed."""
        return self.data == "tars" or self.stream

    @property
    def on_disk(self) -> bool:
        """Whether there are files to read."""
        return self.data not in ("digits", "random")


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained."""

    model: str = "resnet18"
    """A network of `perceptual_at.models` (the papers' code trained `resnet26_bottleneck` as "ResNet-18"),
    `torchvision:NAME`, `timm:NAME`, or `module:function(...)` with literals, which imports code, also from the
    working folder."""
    width: int | None = None
    """Channels of the first layer; the published network's if left out (networks of this package)."""
    stem_stride: int = 1
    """2 halves images at once, as the papers' code does for Tiny-ImageNet (residual networks of this package)."""
    normalize: Literal["none", "cifar10", "imagenet", "own"] = "none"
    """Shift and scale in the first layer, by these images' statistics or by the training images' own (of 256 spread
    over all of them)."""
    init: Path | None = None
    """Weights to start from; what fits by name and shape is taken, the rest listed."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by name patterns such as "conv1.*"."""
    dummies: bool = False
    """Two outputs per class, of which the second is a dummy (ducat); measured with the two folded into one."""
    cosines: float | None = None
    """Make the last layer give cosines times this scale (hypersphere)."""
    teacher: tuple[Path, ...] = ()
    """Weights of the networks that the method learns from (hat, kd, cure), in the order of its page; what is left out
    is trained first, below `out`, with these settings."""
    second: str | None = None
    """The network that is trained along (lbgat), as --model and as wide; the same as it if left out."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The threat, and the attack in training."""

    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the perturbation."""
    eps: Number = 8 / 255
    """Budget in input units; fractions are understood."""
    attack: Literal["pgd", "n_fgsm", "friendly", "least_likely", "free"] = "pgd"
    """The attack in training: PGD; N-FGSM; PGD that stops at the boundary (FAT); PGD towards the least likely class
    (ALP); or Free-AT's, which takes its steps with the optimiser."""
    steps: int = 10
    """Steps of the attack in training."""
    step_size: Number = 2 / 255
    """Length of a step in training; evaluation has its own."""
    start: Literal["random", "clean"] = "random"
    """Where the attack begins, unless the objective says so (TRADES, MART)."""
    model_mode: Literal["eval", "as_is"] = "eval"
    """Mode of the model under attack in training; ReBAT's code attacks in train mode (`as_is`)."""
    patience: tuple[int, ...] = ()
    """Epochs at which samples take one step more after they are wrong (friendly)."""
    attack_noise: float = 0.0
    """Standard deviation of noise after each step (friendly)."""
    eps_ramp: int = 0
    """Epochs over which budget and step grow to their size."""
    strong_attack_from: int | None = None
    """Epoch from which the attack is a stronger one, as in ReBAT$ and RPAT++$."""
    strong_eps: Number = 10 / 255
    """Budget of the stronger attack."""
    strong_steps: int = 12
    """Steps of the stronger attack."""
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
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    weight_decay_of: tuple[str, ...] = ()
    """Other weight decays by name pattern, as "*.bn*=0"; the first that fits a parameter counts."""
    schedule: Literal["steps", "rebat", "one_cycle", "cosine", "triangular", "warm_cosine"] = "steps"
    """`steps` divides by `factor` at each milestone; `rebat` the same, looked up at the end of a step; `one_cycle`
    rises to `lr` over three tenths of the run and falls to zero; `cosine` falls to zero from the start;
    `triangular` rises from 0 to `lr` and falls to 0 in straight lines; `warm_cosine` rises over a fortieth of the
    epochs, falls along a cosine, and changes once an epoch. None of them touches the momentum."""
    peak_at: float = 0.5
    """Where the rate is highest, as a share of the run (triangular)."""
    milestones: tuple[int, ...] = (100, 105)
    """Epochs at which the learning rate drops (`steps`, `rebat`)."""
    factor: float = 10.0
    """What a drop divides by (`steps`, `rebat`)."""
    average_decay: float | None = None
    """Keep averaged weights with this decay and evaluate those; the objectives with a teacher need it."""
    averaging: Literal["ema", "ramp", "swa"] = "ema"
    """`ema` has one decay; `ramp` begins with small ones and copies batch norm's statistics; `swa` is the mean over
    epochs, needs no --average-decay, and estimates the statistics again."""
    average_start: int = 0
    """Epoch from which weights are averaged; before, the average is the model, and no term uses it."""
    awp: float | None = None
    """Size of an adversarial perturbation of the weights (AWP): 0.01 on PGD-AT, 0.005 on TRADES."""
    awp_start: int = 0
    """Epoch from which weights are perturbed."""
    awp_form: Literal["awp", "sam"] = "awp"
    """`awp` takes the step at the perturbed point; `sam` moves biases and batch norm too and goes back before it."""
    replays: int = 1
    """Steps of the optimiser on one batch (free)."""

    @property
    def averages(self) -> bool:
        """Whether there are averaged weights."""
        return self.average_decay is not None or self.averaging == "swa"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What chooses the best weights, and what they are tested with."""

    select_on: Literal["validation", "test"] = "validation"
    """What chooses `best`: images held out of training, or the test set, as the released codes do."""
    held_out: Amount = None
    """Training images to hold out for validation, as a count or a share; 1,000 if left out, but a tenth at most."""
    select_steps: int = 10
    """Steps of the PGD that chooses."""
    test_steps: int = 20
    """Steps of the PGD in the report on the test set."""
    eval_step_size: Number | None = None
    """Length of a step of these two; 2.5 eps / steps if left out, which is what `pgd20` means everywhere here."""
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
    shard: bool = False
    """Share weights, gradients and momenta out over the processes (FSDP2), for networks that do not fit on one
    device; it is measured as a whole."""
    out: Path = Path("outputs/train")
    """Folder for states, weights, log and result."""
    resume: bool = False
    """Go on from the newest whole state in `out`; from the start where there is none."""
    extend: bool = False
    """With --resume: more --epochs than the run had."""
    change: tuple[str, ...] = ()
    """With --resume: options that may differ from the run's, by name; what changed is recorded."""
    save_every: int = 500
    """Steps between two saved states; one is saved after every epoch anyway."""
    track: tuple[str, ...] = ()
    """Further trackers of Accelerate to log to, such as wandb."""

    @property
    def may_change(self) -> set[str]:
        """The options that --change and --extend name, as the settings are called."""
        named = {name.lstrip("-").replace("-", "_") for name in self.change}
        return named | ({"epochs"} if self.extend else set())


GROUPS = {
    "method": Method, "data": Data, "network": Network, "threat": Budget, "optimisation": Optimisation,
    "evaluation": Selection, "running": Running,
}  # fmt: skip
GROUP_OF = {field.name: group for group, kind in GROUPS.items() for field in dataclasses.fields(kind)}
"""The group that each option belongs to."""
FREE = (
    "out",
    "resume",
    "extend",
    "change",
    "save_every",
    "root",
    "download",
    "cpu",
    "track",
    "init",
    "workers",
    "extra",
    "teacher",
)
"""What may differ when a run goes on."""
LASTING = ("seed", "batch", "shard", "weight_decay_of")
"""What no --change can change, beside images and network: states count steps, and hold the optimiser's groups."""

# Option: least value, whether that value itself is allowed, greatest value.
RANGES: dict[str, tuple[float, bool, float]] = {
    **dict.fromkeys(
        ("epochs", "batch", "steps", "select_steps", "test_steps", "eval_batch", "save_every", "stem_stride",
         "strong_steps", "width", "replays"), (1, True, math.inf),
    ),
    **dict.fromkeys(
        ("eps", "step_size", "strong_eps", "eval_step_size", "lr", "concentration", "temperature", "held_out",
         "cosines"),
        (0, False, math.inf),
    ),
    **dict.fromkeys(
        ("padding", "average_start", "awp_start", "strong_attack_from", "weight", "beta", "consistency_weight",
         "weight_decay", "awp", "workers", "attack_noise", "eps_ramp"), (0, True, math.inf),
    ),
    **dict.fromkeys(("momentum", "average_decay", "alpha", "smoothing"), (0, True, 1)),
    **dict.fromkeys(("extra_share", "eta", "peak_at"), (0, False, 1)),
    "factor": (1, True, math.inf),
    "seed": (0, True, 2**63 - 1),
}  # fmt: skip


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
        for name, (least, itself, greatest) in RANGES.items():
            value = getattr(getattr(self, GROUP_OF[name]), name)
            if isinstance(value, (int, float)) and not (
                math.isfinite(value) and (value >= least if itself else value > least) and value <= greatest
            ):
                wanted = f"{'at least' if itself else 'more than'} {least:g}"
                wanted += f" and at most {greatest:g}" if math.isfinite(greatest) else ""
                raise ValueError(f"{option(name)} must be {wanted}, got {value}.")
        threat, optimisation, running = self.threat, self.optimisation, self.running
        for name in ("step_size", "eval_step_size"):
            refuse_long_step(name, getattr(getattr(self, GROUP_OF[name]), name), threat.norm)
        if threat.lane != "none" and threat.model_mode == "as_is":
            raise ValueError("--lane runs in eval mode; it cannot be had with --model-mode as_is.")
        for name in ("milestones", "patience"):
            epochs = getattr(getattr(self, GROUP_OF[name]), name)
            if list(epochs) != sorted(epochs) or any(epoch < 0 for epoch in epochs):
                raise ValueError(f"{option(name)} must be epochs in order, got {' '.join(map(str, epochs))}.")
        milestones = optimisation.milestones
        if optimisation.schedule == "rebat" and len(milestones) != 2:
            raise ValueError(f"--milestones must be two with --schedule rebat, got {milestones}.")
        if optimisation.nesterov and not optimisation.momentum:
            raise ValueError("--nesterov needs a --momentum above 0.")
        if len(self.data.size) > 2 or any(side < 1 for side in self.data.size):
            raise ValueError(f"--size must be one side or height and width, got {' '.join(map(str, self.data.size))}.")
        if (running.extend or running.change) and not running.resume:
            raise ValueError("--extend and --change go with --resume.")
        for name in sorted(running.may_change):
            _check_change(name)

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
        return {name: value for name, value in self.flat().items() if name not in FREE}


def refuse_long_step(name: str, step: float | None, norm: str) -> None:
    """Refuse a length of a step that is meant in 255ths."""
    if norm == "linf" and step is not None and step > 1:
        raise ValueError(f"{option(name)} {step:g} is more than images in [0, 1] are wide; did you mean {step:g}/255?")


def _check_change(name: str) -> None:
    """Require an option that a run can go on with another value of."""
    if name not in GROUP_OF:
        raise ValueError(f"--change {name}: there is no such option{meant(name, GROUP_OF)}.")
    if name in FREE:
        raise ValueError(f"--change {name} has no effect: {option(name)} may differ anyway.")
    if GROUP_OF[name] in ("data", "network") or name in LASTING:
        raise ValueError(f"--change {name}: the run cannot go on with another {option(name)}; take another --out.")


def settings_from(flat: dict[str, Any]) -> Settings:
    """The settings that `flat` wrote down; options that are not among them keep their defaults.

    Raises:
        ValueError: if there is an option that is none here, or a value of another kind.
    """
    unknown = sorted(flat.keys() - GROUP_OF.keys())
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(unknown)}.")
    defaults = Settings().flat()
    kinds = {name: kind for group in GROUPS.values() for name, kind in typing.get_type_hints(group).items()}
    for name, value in flat.items():
        wanted: Any = type(defaults[name])
        wanted = (int, float) if wanted in (int, float) else wanted
        words = literals(kinds[name])
        mistaken = words and isinstance(value, str) and value not in words
        if mistaken or (defaults[name] is not None and not isinstance(value, wanted)):
            raise ValueError(f"the setting {name!r} cannot be {value!r}.")
    return Settings().changed(**{
        name: Path(value) if name in ("root", "out", "init", "extra") and value
        else tuple(map(Path, value)) if name == "teacher" else tuple(value) if isinstance(value, list) else value
        for name, value in (defaults | flat).items()
    })  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
