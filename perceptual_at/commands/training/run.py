"""One training run: what it is made of, and everything before its first step."""

import copy
import dataclasses
import warnings
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

import perceptual_at as pat
from perceptual_at.averaging import Weights
from perceptual_at.commands.endings import Stopped
from perceptual_at.commands.ingredients import networks
from perceptual_at.commands.ingredients.images import batches
from perceptual_at.commands.ingredients.protocol import threat_of
from perceptual_at.commands.options import method
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.options.trial import refuse_values
from perceptual_at.commands.training import companions, shards, steps
from perceptual_at.commands.training.rates import stream
from perceptual_at.commands.training.splits import Splits, splits, task_of
from perceptual_at.data import TensorImages


@dataclasses.dataclass
class Run:
    """One run: what it is made of, and where it is."""

    settings: Settings
    accelerator: Accelerator
    parts: Splits
    model: nn.Module
    optimizer: Any
    sources: steps.Sources
    average: Weights | None
    kept: companions.Kept
    """What the method keeps from step to step."""
    epoch: int = 0
    batch: int = 0
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: Weights | None = None
    seconds: float = 0.0
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Settings that were changed when the run went on, each with the step."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Warnings, for the record."""
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    unshared: nn.Module | None = None
    """Where the weights are shared out over the processes, a network that takes them whole, to be measured."""

    @property
    def measured(self) -> nn.Module:
        """The network that weights are measured in."""
        return self.bare if self.unshared is None else self.unshared

    @property
    def bare(self) -> nn.Module:
        """The network itself, without wrappers: its names carry no prefix."""
        module: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return module

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return len(self.parts.train) // self.settings.optimisation.batch

    @property
    def step(self) -> int:
        """Optimiser steps done so far."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def perturbs(self) -> bool:
        """Whether weights are perturbed in this epoch."""
        chosen = self.settings.optimisation
        return chosen.awp is not None and self.epoch >= chosen.awp_start

    @property
    def leader(self) -> bool:
        """Whether this process writes files and lines."""
        return bool(self.accelerator.is_main_process)

    def agreed(self, well: Tensor | bool) -> bool:
        """Whether all is well in every process; all of them ask together."""
        ones = torch.as_tensor(well, device=self.accelerator.device).float().reshape(1)
        return bool(self.accelerator.reduce(ones, "mean").item() == 1.0)

    def evaluated(self) -> Weights:
        """The weights that are measured and saved, whole: averaged ones where there are. All processes ask together."""
        return shards.whole(pat.snapshot(self.model) if self.average is None else self.average)


def prepare(settings: Settings) -> Run:
    """Everything before the first step, with every part compared with the others.

    Raises:
        Stopped: if something does not fit.
    """
    running, optimisation = settings.running, settings.optimisation
    try:
        _refuse_settings(settings)
        accelerator = _accelerator(settings)
        with accelerator.main_process_first():  # only one of them downloads
            parts = splits(settings)
        if len(parts.train) < optimisation.batch:
            raise Stopped(f"--batch {optimisation.batch} is more than the {len(parts.train)} images to train on.")
        model = _network(settings, accelerator, parts)
        _try_other_parts(parts)
        unshared = None
        if running.shard:
            shards.check(settings, accelerator)
            unshared = copy.deepcopy(model).to(accelerator.device)
            shards.shard(model, accelerator)
        kept = companions.begun(companions.Start(settings, parts, model, accelerator))
        groups = networks.parameter_groups(model, optimisation)
        groups += [{"params": along} for along in [companions.trained_along(kept)] if along]
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise Stopped(str(error)) from error
    if running.channels_last:
        model.to(memory_format=torch.channels_last)
    if parts.extra is not None and int(parts.extra.labels.min()) < 0:
        _label(parts.extra, model, settings)
    optimizer = torch.optim.SGD(
        groups, lr=optimisation.lr, momentum=optimisation.momentum, nesterov=optimisation.nesterov,
        weight_decay=optimisation.weight_decay,
    )  # fmt: skip
    if running.compile:
        model.compile()
    with warnings.catch_warnings():  # Accelerate does not know torch's new name of the option yet
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        model, optimizer = (
            accelerator.prepare_model(model, evaluation_mode=running.shard),  # what is shared out needs no wrapper
            accelerator.prepare_optimizer(optimizer),
        )
    noise = stream(running.seed, "noise", accelerator.process_index, device=accelerator.device)
    sources = steps.Sources(noise, stream(running.seed, "mix"), parts.classes)
    average = in_full(pat.snapshot(model)) if optimisation.averages else None
    run = Run(settings, accelerator, parts, model, optimizer, sources, average, kept, unshared=unshared)
    run.fingerprints = parts.fingerprints()
    _warn_of_slow_averages(run)
    return run


def _refuse_settings(settings: Settings) -> None:
    """Refuse what can be seen to be wrong before anything is read or built."""
    method.check(settings)
    refuse_values(settings)
    threat_of(settings.threat)
    if settings.threat.strong_attack_from is not None:
        threat_of(dataclasses.replace(settings.threat, eps=settings.threat.strong_eps), name="strong_eps")


def _network(settings: Settings, accelerator: Accelerator, parts: Splits) -> nn.Module:
    """The network with its first weights, tried on some of the images."""
    chosen, task = settings.network, task_of(parts, settings.network)
    model = networks.network(chosen, task, seed=settings.running.seed)
    if chosen.init is not None:
        line = networks.initialise(model, chosen.init)
        if accelerator.is_main_process:
            print(line)
    networks.tried(model, task, chosen.model)
    networks.freeze(model, chosen.freeze)
    return model


def _accelerator(settings: Settings) -> Accelerator:
    """The devices and processes; what cannot be had there is refused."""
    running = settings.running
    # Objectives run the model several times per step. Buffers copied at each forward would tie the processes
    # together there, and RAAT leaves forwards out where it finds no pairs: the others would wait for ever.
    # Every objective uses all parameters in its first forward, so none has to be searched for.
    try:
        accelerator = Accelerator(
            cpu=running.cpu or not torch.accelerator.is_available(),
            mixed_precision=running.precision,
            log_with=list(running.track) or None,
            project_dir=str(running.out),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
        )
    except (ValueError, ImportError) as error:
        if not running.track:
            raise
        raise Stopped(f"--track {' '.join(running.track)}: {error}") from error
    if running.precision == "fp16" and accelerator.device.type == "cpu":
        raise Stopped("--precision fp16 needs an accelerator; take bf16 on a CPU.")
    if settings.optimisation.batch % accelerator.num_processes:
        raise Stopped(
            f"--batch {settings.optimisation.batch} cannot be shared evenly by {accelerator.num_processes} processes."
        )
    return accelerator


def _try_other_parts(parts: Splits) -> None:
    """Read one image of each other part, so that what cannot be read is found before the first step."""
    for part in (parts.select, parts.test):
        next(batches(part, [torch.tensor([0])], workers=0))


def _label(extra: TensorImages, model: nn.Module, settings: Settings) -> None:
    """Give unlabelled images the classes that the first network sees in them."""
    if settings.network.init is None:
        raise Stopped("--extra holds no labels (y_train); give --init, weights that label them.")
    rows = torch.split(torch.arange(len(extra)), settings.evaluation.eval_batch)
    with pat.frozen(model) as f, torch.no_grad():
        extra.labels = torch.cat([f(extra[some][0]).argmax(dim=1) for some in rows])


def in_full(weights: Weights) -> Weights:
    """Averages are kept in float32 at least: in bfloat16 small steps of theirs would be lost."""
    return {
        name: value.float() if value.is_floating_point() and value.element_size() < 4 else value
        for name, value in weights.items()
    }


def _warn_of_slow_averages(run: Run) -> None:
    """Say how much of averaged weights will be the first ones."""
    chosen = run.settings.optimisation
    if chosen.average_decay is None or chosen.averaging == "ramp":
        return
    count = max(0, chosen.epochs - chosen.average_start) * run.steps_per_epoch
    share = chosen.average_decay**count
    if share > 0.05:
        warnings.warn(
            f"averaged weights will be {100 * share:.0f} % those that averaging starts with: {count} steps at "
            f"--average-decay {chosen.average_decay:g}. A smaller decay follows sooner.",
            stacklevel=1,
        )
