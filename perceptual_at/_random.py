"""Random numbers for calls that were given no generator."""

import torch

_streams: dict[torch.device, tuple[int, torch.Generator]] = {}


def stream(device: torch.device) -> torch.Generator:
    """The library's own generator on a device, started from `torch.initial_seed()`.

    It starts anew when that seed changes. The global random state is neither advanced nor copied.
    """
    seed = torch.initial_seed()
    if device not in _streams or _streams[device][0] != seed:
        _streams[device] = seed, torch.Generator(device).manual_seed(seed)
    return _streams[device][1]


def source(function: str, generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The caller's generator, checked to live on `device`, or the library's stream there."""
    if generator is None:
        return stream(device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{function}: `generator` must be a torch.Generator, got {type(generator).__name__}.")
    home = generator.device
    same_index = None in (home.index, device.index) or home.index == device.index
    if home.type != device.type or not same_index:
        raise ValueError(
            f"{function}: `generator` is on {home} but `x` is on {device}; make it with "
            f"torch.Generator({str(device)!r})."
        )
    return generator
