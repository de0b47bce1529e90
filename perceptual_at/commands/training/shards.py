"""Weights shared out over the processes (FSDP2), and what needs them whole again.

Accelerate shards on accelerators only, so the network is sharded here, the same on CPUs: its forward passes gather the
weights of one unit at a time, gradients and the optimiser's states stay in parts.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from perceptual_at.averaging import Weights
from perceptual_at.commands.options.method import TWO_VIEWS, asked, parts
from perceptual_at.commands.options.settings import Settings
from perceptual_at.commands.options.words import option
from perceptual_at.commands.training import companions

UNITS = 8
"""Least share of a unit in all weights: an eighth."""


def check(settings: Settings, accelerator: Accelerator) -> None:
    """Refuse what cannot be had with `--shard`.

    Every process has to run the network equally often, since it takes part in the others' passes.

    Raises:
        ValueError: if something cannot.
    """
    method, running = settings.method, settings.running
    if accelerator.num_processes == 1:
        raise ValueError("--shard shares weights out over processes, and there is one; start several by torchrun.")
    if running.precision == "fp16":
        raise ValueError("--shard cannot be had with --precision fp16; take bf16.")
    if "average" in asked(method):
        raise ValueError(f"--shard cannot be had with --objective {method.objective}, whose term runs other weights.")
    if companions.companion_of(settings) != companions.Companion():
        raise ValueError(f"--shard cannot be had with --objective {method.objective}, which keeps more than a network.")
    if {*parts(method)} & set(TWO_VIEWS) - {"consistency_at"}:
        raise ValueError(
            f"--shard cannot be had with --objective {method.objective}: a process without pairs would leave out "
            "passes that the others wait for."
        )
    others = {"awp": settings.optimisation.awp, "compile": running.compile, "lane": settings.threat.lane != "none",
              "averaging": settings.optimisation.averaging == "swa"}  # fmt: skip
    for name, taken in others.items():
        if taken:
            raise ValueError(f"--shard cannot be had with {option(name)}.")


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Share the weights of a network out, in units that each hold a fair part of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    least = sum(parameter.numel() for parameter in model.parameters()) / UNITS
    done: set[nn.Parameter] = set()
    for part in reversed(list(model.modules())[1:]):
        own = [parameter for parameter in part.parameters() if parameter not in done]
        if sum(parameter.numel() for parameter in own) >= least:
            fully_shard(part, mesh=mesh)
            done |= set(part.parameters())
    fully_shard(model, mesh=mesh)


def part_of(value: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, where it is not shared out."""
    shared: Any = value
    return shared.to_local() if hasattr(shared, "to_local") else value


def whole(weights: Weights) -> Weights:
    """Weights with what is shared out gathered; all processes call it together."""
    gathered: dict[str, Any] = dict(weights)
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in gathered.items()}


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Weights:
    """This process's part of weights and momenta, by name, and the state of torch's global random numbers."""
    held = {"random": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        held[f"weight/{name}"] = part_of(parameter.detach())
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            held[f"momentum/{name}"] = part_of(momentum)
    return held


def put_back(model: nn.Module, optimizer: torch.optim.Optimizer, held: Weights) -> None:
    """What `states_of` gave, where it came from."""
    torch.set_rng_state(held["random"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part_of(parameter).copy_(held[f"weight/{name}"])
            if f"momentum/{name}" in held:
                momentum = optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                part_of(momentum).copy_(held[f"momentum/{name}"])
