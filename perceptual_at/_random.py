"""Where random numbers come from: one generator for a batch, or numbers of each sample's own."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from perceptual_at import _check

_streams: dict[torch.device, tuple[int, torch.Generator]] = {}
_QUANTILES = 65536


class SampleGenerator:
    """Random numbers that belong to a sample, not to its place in a batch.

    Given to an attack as `generator`, every random number is a function of the seed, the sample's index and the
    restart alone. Results then do not depend on how the data were cut into batches, in which order they came or
    how many processes shared them, up to the rounding of the model's own kernels. It has no state: two calls
    with one generator draw the same numbers.

    Args:
        seed: any integer; counts modulo 2^64.
        index: what identifies each sample, for example its place in the data set; integers, shape `(B,)`.
        stream: which of the many sequences of a sample; see `fork`.

    Raises:
        TypeError: if `seed` is no integer or `index` no integer tensor.
        ValueError: if `index` has more than one dimension.

    Source:
        Steele et al. 2014 (SplitMix64) for the mixing function.

    Examples:
        >>> both = SampleGenerator(0, torch.tensor([5, 9])).uniform((2, 3))
        >>> alone = SampleGenerator(0, torch.tensor([9])).uniform((1, 3))
        >>> torch.equal(both[1:], alone)
        True
    """

    def __init__(self, seed: int, index: Tensor | Sequence[int], *, stream: int = 0) -> None:
        for name, value in (("seed", seed), ("stream", stream)):
            _check.integer("SampleGenerator", name, value)
        index = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"SampleGenerator: `index` must be integers of shape (B,), got {index.dtype}.")
        if index.ndim != 1:
            raise ValueError(f"SampleGenerator: `index` must be of shape (B,), got shape {tuple(index.shape)}.")
        self.seed, self.index, self.stream = int(seed), index.long(), int(stream)

    def __len__(self) -> int:
        return self.index.shape[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleGenerator):
            return NotImplemented
        return (self.seed, self.stream) == (other.seed, other.stream) and torch.equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash((self.seed, self.stream, len(self)))

    def __repr__(self) -> str:
        return f"SampleGenerator(seed={self.seed}, {len(self)} samples, stream={self.stream})"

    def take(self, rows: Tensor) -> "SampleGenerator":
        """The same numbers for some of the samples, by index or mask."""
        return SampleGenerator(self.seed, self.index[rows], stream=self.stream)

    def fork(self, stream: int) -> "SampleGenerator":
        """Other numbers for the same samples: one stream per restart, per attack, per step."""
        return SampleGenerator(self.seed, self.index, stream=_mixed(self.stream, int(stream)))

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        """64 random bits per entry, as integers; the first dimension of `shape` runs over the samples."""
        if not shape or shape[0] != len(self):
            raise ValueError(f"SampleGenerator: numbers for {len(self)} samples cannot fill the shape {shape}.")
        start = _mix(self.index * _signed(_GAMMA) + _signed(_mixed(self.seed, self.stream)))
        places = torch.arange(1, 1 + math.prod(shape[1:]), device=self.index.device) * _signed(_GAMMA)
        return _mix(start[:, None] + places).reshape(shape)

    def uniform(self, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [0, 1)."""
        digits = round(1 - math.log2(torch.finfo(dtype).eps))  # as many as the dtype holds: none rounds up to 1
        return _shifted(self.bits(shape), 64 - digits).to(dtype) * 2.0**-digits

    def integers(self, shape: tuple[int, ...], *, below: int) -> Tensor:
        """Integers from 0 to `below - 1`."""
        return _shifted(self.bits(shape), 33) % below

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal, as one of 65536 quantiles."""
        return self._quantile("normal", 1, shape, dtype)

    def exponential(self, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Exponential of mean one, as one of 65536 quantiles."""
        return self._quantile("exponential", 1, shape, dtype)

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """1 or -1, as integers."""
        return self.integers(shape, below=2) * 2 - 1

    def radius(self, entries: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Radius of a uniform point in the unit ball of `entries` dimensions, shape `(B,)`."""
        return self._quantile("radius", entries, (len(self),), dtype)

    def _quantile(self, kind: str, entries: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Looked up, not computed: how a logarithm rounds depends on where in a tensor it stands.
        drawn: Tensor = _quantiles(kind, entries).to(self.index.device, dtype)[_shifted(self.bits(shape), 48)]
        return drawn


Generator = torch.Generator | SampleGenerator


class Draws(Protocol):
    """What a random start needs, from either kind of generator."""

    def uniform(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """Uniform in [0, 1)."""

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """Standard normal."""

    def exponential(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """Exponential of mean one."""

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """1 or -1."""

    def radius(self, entries: int, *, dtype: torch.dtype) -> Tensor:
        """Radius of a uniform point in the unit ball."""


class _BatchDraws(NamedTuple):
    """Numbers for a whole batch from one generator of torch, drawn where it lives: on the CPU if a device has none."""

    generator: torch.Generator
    samples: int
    device: torch.device

    def uniform(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        drawn = torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=dtype)
        return drawn.to(self.device)

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=dtype)
        return drawn.to(self.device)

    def exponential(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        drawn = torch.empty(shape, device=self.generator.device, dtype=dtype).exponential_(generator=self.generator)
        return drawn.to(self.device)

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randint(0, 2, shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device) * 2 - 1

    def radius(self, entries: int, *, dtype: torch.dtype) -> Tensor:
        u: Tensor = self.uniform((self.samples,), dtype=dtype) ** (1 / entries)
        return u


def draws(function: str, generator: Generator | None, x: Tensor) -> Draws:
    """Random numbers for the samples of `x`."""
    if isinstance(generator, SampleGenerator):
        return checked(function, generator, x)
    return _BatchDraws(source(function, generator, x.device), x.shape[0], x.device)


def per_sample_generator(function: str, generator: Generator | None, x: Tensor) -> SampleGenerator:
    """The generator if it is one per sample; else one for the samples in their order, seeded from it."""
    if isinstance(generator, SampleGenerator):
        return checked(function, generator, x)
    drawn = source(function, generator, x.device)
    seed = int(torch.randint(2**62, (), generator=drawn, device=drawn.device))
    return SampleGenerator(seed, torch.arange(x.shape[0], device=x.device))


def check(function: str, generator: Generator | None, x: Tensor) -> None:
    """Require a source of random numbers for these inputs, or none, before it is known whether any are drawn."""
    if isinstance(generator, SampleGenerator):
        checked(function, generator, x)
    elif generator is not None:
        source(function, generator, x.device)


def checked(function: str, generator: SampleGenerator, x: Tensor) -> SampleGenerator:
    """The generator, with as many samples as `x` and on its device."""
    if len(generator) != x.shape[0]:
        raise ValueError(f"{function}: `generator` is for {len(generator)} samples but `x` has {x.shape[0]}.")
    return SampleGenerator(generator.seed, generator.index.to(x.device), stream=generator.stream)


@functools.cache
def has_generator(kind: str) -> bool:
    """Whether torch can make generators for devices of this type."""
    try:
        torch.Generator(kind)
    except (RuntimeError, NotImplementedError):  # which of them depends on the device
        return False
    return True


def source(function: str, generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The caller's generator, checked to live where numbers for `device` are drawn: there, or on the CPU without one.

    None stands for the library's own stream there. It starts from `torch.initial_seed()`, anew when that seed changes;
    the global random state is neither advanced nor copied.
    """
    if device.type != "cpu" and not has_generator(device.type):
        device = torch.device("cpu")
    if generator is None:
        seed = torch.initial_seed()
        if device not in _streams or _streams[device][0] != seed:
            _streams[device] = seed, torch.Generator(device).manual_seed(seed)
        return _streams[device][1]
    of_torch(function, generator)
    home = generator.device
    same_index = None in (home.index, device.index) or home.index == device.index
    if home.type != device.type or not same_index:
        raise ValueError(
            f"{function}: `generator` is on {home} but `x` is on {device}; make it with "
            f"torch.Generator({str(device)!r})."
        )
    return generator


def of_torch(function: str, generator: torch.Generator | None) -> None:
    """Require a generator of torch, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{function}: `generator` must be a torch.Generator, got {type(generator).__name__}.")


def on_cpu(function: str, generator: torch.Generator | None) -> None:
    """Require a generator on the CPU, or None."""
    of_torch(function, generator)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"{function}: `generator` must be on the CPU, got {generator.device}.")


def of_seed(function: str, seed: int) -> torch.Generator:
    """A generator on the CPU that begins with a seed."""
    _check.count(function, "seed", seed, at_least=-(2**63))
    return torch.Generator().manual_seed(int(seed))


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the global random state as it was, whatever is drawn inside: who looks must not change what follows."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


# SplitMix64 -------------------------------------------------------------------------------------------------------

_GAMMA = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, which is what torch has."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shifted(value: Tensor, places: int) -> Tensor:
    """Right shift that fills with zeros."""
    shifted: Tensor = (value >> places) & (2 ** (64 - places) - 1)
    return shifted


def _mix(value: Tensor) -> Tensor:
    for places, factor in _STEPS:
        value = (value ^ _shifted(value, places)) * _signed(factor)
    return value ^ _shifted(value, 31)


def _mixed(*parts: int) -> int:
    """One integer out of several, each of which matters."""
    state = 0
    for part in parts:
        state = (state + part + 1) * _GAMMA & (2**64 - 1)
        for places, factor in _STEPS:
            state = ((state ^ (state >> places)) * factor) & (2**64 - 1)
        state ^= state >> 31
    return state


@functools.lru_cache(maxsize=16)
def _quantiles(kind: str, entries: int) -> Tensor:
    """The middle quantile of each of equally likely cells."""
    u = (torch.arange(_QUANTILES, dtype=torch.float64, device="cpu") + 0.5) / _QUANTILES
    table: Tensor = u ** (1 / entries)
    if kind == "normal":
        table = torch.special.ndtri(u)
    if kind == "exponential":
        table = -torch.log1p(-u)
    return table
