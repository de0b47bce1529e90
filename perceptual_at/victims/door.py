"""The door: one place that borrows what is attacked, checks what came with it, calls it, counts and gives it back."""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from perceptual_at import _check
from perceptual_at._differentiation import needs_backward, only_backward, only_once, uncompiled
from perceptual_at._rounding import leveled, wide
from perceptual_at._shapes import rows
from perceptual_at.divergences import PerSampleLoss
from perceptual_at.threats import Ball, Threat, box, check_excess
from perceptual_at.threats.entries import clamped
from perceptual_at.victims import switching
from perceptual_at.victims.finding import callable_of, is_sharded, modules_of, settled, watched
from perceptual_at.victims.in_step import InStep, together
from perceptual_at.victims.lanes import Lane
from perceptual_at.victims.switching import UNUSUAL, KeptBuffer
from perceptual_at.victims.terms import (
    FAILURES,
    OWN,
    Model,
    ModelMode,
    Terms,
    check_each,
    check_lane,
    check_logits,
    check_values,
    explain_pass,
    explain_rows,
    refuse_transforms,
)
from perceptual_at.victims.twins import FastModel

_USUAL = Terms()


class Answer(NamedTuple):
    """Loss of each sample, the gradient of their sum, and the logits they came from."""

    values: Tensor
    grad: Tensor
    logits: Tensor


# What is changed while a model is on loan --------------------------------------------------------------------------

_LOCK = threading.RLock()
_HELD: dict[tuple[int, str], "_Held"] = {}


class _Held(NamedTuple):
    """An attribute that is on loan: whose it is, its value before, and to whom it is lent."""

    owner: Any
    name: str
    before: Any
    holders: set["Loan"]
    look: Any
    """Of a mode whose owner switches in a way of its own, what the owner looked like; else None."""


@dataclasses.dataclass(eq=False, repr=False)
class Loan:
    """A model whose modules are in eval mode, with parameters that need no gradient, until `give_back`.

    Every attribute that is changed knows its borrowers, so attacks inside attacks and in several threads leave all of
    them as the first one found them. An interrupt may cut either method short anywhere: `give_back` can be called
    again, and then does the rest.

    Args:
        model: what is lent.
        model_mode: `"eval"` or `"as_is"`.
        lane: how to run it.
        even: whether all processes make the same passes; if not, a model sharded over several is asked in step.
        function: the name that errors speak of.
        buffers: whether buffers that passes in eval mode have moved are put back, as after passes of the library's own.
    """

    model: Model
    model_mode: ModelMode
    lane: Lane | None
    even: bool = True
    _: dataclasses.KW_ONLY
    function: str = "frozen"
    buffers: bool = False
    modules: list[nn.Module] = dataclasses.field(init=False, default_factory=list)
    freezes: bool | None = dataclasses.field(init=False, default=None)
    """Whether all parameters are known and frozen, so that a backward pass writes no gradient."""
    joined: InStep | None = dataclasses.field(init=False, default=None)
    fast: FastModel | None = dataclasses.field(init=False, default=None)
    switches: bool = dataclasses.field(init=False, default=False)
    """Whether a part may do more than to set flags when it is switched to another mode."""
    settled: list[Callable[[], None]] = dataclasses.field(init=False, default_factory=list)
    keys: list[tuple[int, str]] = dataclasses.field(init=False, default_factory=list)
    cache: dict[Any, Any] | None = dataclasses.field(init=False, default=None)

    def take(self) -> Model:
        """Change what has to be changed; gives what to call."""
        model = self.model
        if isinstance(model, FastModel):
            return model
        if isinstance(model, nn.Module):
            inner: Any = getattr(model, "_orig_mod", model)
            # Wrappers for distributed training exchange gradients, of which an attack has none.
            model = inner.module if isinstance(inner, DistributedDataParallel) else model
            held = itertools.filterfalse(is_lazy, itertools.chain(model.parameters(), model.buffers()))
            if any(map(Tensor.is_inference, held)):
                model = switching.ordinary(model)
            self.modules = [model]
        else:
            model = callable_of(model)
            self.modules = modules_of(model)
        with _LOCK:
            for module in self.modules:
                self._lend(module)
        if parametrize._cache_enabled:
            self.cache = switching.take_cache()
        if self.lane is not None:
            self.fast = FastModel(self.modules[0], self.lane, self.function)
        if not self.even and (joined := together(model)) is not model:
            model = self.joined = joined  # type: ignore[assignment]  # called like the model
        return self.fast or model

    def _lend(self, module: nn.Module) -> None:
        """Note what a module and its parts are like, then change it."""
        parts, evaluating, trains = list(module.modules()), self.model_mode == "eval", False
        changes: list[tuple[Any, str, Any]] = []
        for part in parts:
            if type(part).train is not nn.Module.train or "train" in vars(part):
                self.switches = True
            if evaluating and (getattr(part, "training", False) or (id(part), "training") in _HELD):
                changes.append((part, "training", None))
                trains = True
            if isinstance(part, UNUSUAL):
                changes += switching.unusual(part, evaluating)
        # FSDP swaps parameters while it runs, and those it puts in take over the flag. An input gradient writes none of
        # theirs in any case.
        freezes = not (torch.distributed.is_available() and torch.distributed.is_initialized() and is_sharded(parts))
        if not freezes:
            self.settled += settled(parts)
        self.freezes = freezes and self.freezes is not False
        for part in parts if freezes else ():
            for one in part._parameters.values():  # what `parameters()` gives, without making up names
                if one is None or (not is_lazy(one) and one.is_inference()):  # whose flag cannot be given back
                    continue
                if one.requires_grad or (id(one), "requires_grad") in _HELD:
                    changes.append((one, "requires_grad", False))
        if trains and self.switches:  # parts may switch others, also those that are in eval mode already
            changes[:0] = [(part, "training", None) for part in parts if hasattr(part, "training")]
        for part in parts:
            if part._forward_pre_hooks and freezes:
                changes += [(part, name, None) for name in switching.computed(part)]
            if (
                self.buffers
                and evaluating
                and part._buffers
                and (type(part) is nn.Module or not type(part).__module__.startswith("torch.nn."))
            ):  # plain modules are parts of an export, whose mode is fixed
                changes += [(part, name, KeptBuffer) for name in switching.movable(part)]
        for owner, name, value in changes:  # first all is noted, then the first thing is changed
            key = (id(owner), name)
            self.keys.append(key)
            if key in _HELD:
                _HELD[key].holders.add(self)
            else:
                before = KeptBuffer(owner, name) if value is KeptBuffer else getattr(owner, name)
                own = self.switches and name == "training" and switching.trains_itself(owner)
                look = switching.look(owner) if own else None
                _HELD[key] = _Held(owner, name, before, {self}, look)
        if trains:
            try:
                module.eval()
            except NotImplementedError:  # an exported part cannot be switched
                switching.in_eval_mode(parts)
        for owner, name, value in changes:
            if value is not None and value is not KeptBuffer:
                setattr(owner, name, value)

    def give_back(self) -> None:
        """Undo it, unless others still borrow."""
        with _LOCK:
            for key in self.keys:
                held = _HELD.get(key)
                if held is None or self not in held.holders:
                    continue
                if len(held.holders) == 1:
                    try:
                        if held.look is not None and switching.look(held.owner) != held.look:
                            switching.switch_back(held.owner, held.before)
                    finally:
                        if isinstance(held.before, KeptBuffer):
                            held.before.put_back()
                        else:
                            setattr(held.owner, held.name, held.before)
                        _HELD.pop(key, None)
                else:
                    held.holders.discard(self)
        if self.cache is not None:
            switching.put_back_cache(self.cache)
        for release in self.settled:
            release()
        if self.fast is not None:
            self.fast.release()


# Through the door --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    function: str, model: Model, x: Tensor, labels: Tensor, threat: Threat, terms: Terms = _USUAL
) -> Iterator["Victim"]:
    """Check what an attack was given, and lend it the model; see the top of `perceptual_at.victims`.

    Args:
        function: the name that errors speak of.
        model: what is attacked.
        x: clean inputs.
        labels: what they should be taken for.
        threat: the threat model; its bounds are those of the inputs.
        terms: what else the attack was given.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes or devices differ, or values cannot be attacked.
    """
    check_arguments(function, model, x, labels, threat, terms)
    if terms.lane is not None or isinstance(model, FastModel):
        check_lane(function, model, terms.model_mode, terms.lane)
    if torch._C._are_functorch_transforms_active():
        refuse_transforms(function)
    loan = Loan(model, terms.model_mode, terms.lane, terms.even, function=function, buffers=True)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            try:
                lent = loan.take()
                with loan.joined or _ALONE:
                    yield Victim(function, lent, loan, x, labels, threat, terms)
            finally:
                loan.give_back()
        finally:  # an interrupt may have cut the first one short
            loan.give_back()


_ALONE = contextlib.nullcontext()
_SIZES: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("sizes of first gradients", default=None)


@contextlib.contextmanager
def first_gradients() -> Iterator[list[Tensor]]:
    """A list of how large the gradients are that attacks in this block start from, without a pass for it.

    It grows by one tensor `(b,)`, the largest entry for each sample, per attack that asks for a gradient.
    """
    sizes: list[Tensor] = []
    token = _SIZES.set(sizes)
    try:
        yield sizes
    finally:
        _SIZES.reset(token)


class Victim:
    """A model under attack, with the samples of the call; what model and loss return is checked at the first call.

    In a lane, gradients and losses are those of the lane, and `logits` those of the model itself. Inputs are handed out
    as copies, so a model that writes to its input writes to nobody's tensor.
    """

    x: Tensor
    """The clean inputs, without history, inside the bounds."""
    labels: Tensor
    """Their labels, or the targets of the attack; class indices as int64."""

    def __init__(
        self, function: str, model: Model, loan: Loan, x: Tensor, labels: Tensor, threat: Threat, terms: Terms
    ) -> None:
        self.function, self.loan, self.model, self.eot = function, loan, model, terms.eot
        self.exact: Model = model.exact if isinstance(model, FastModel) else model
        self.aimed = terms.targets is not None
        own = terms.loss is None or getattr(terms.loss, "__module__", "").startswith(OWN)
        self.guarded = not own
        """Whether the loss is the user's own, which may write to what it is given."""
        self.classes = terms.judged or (own and terms.loss is not None)
        self.unknown = terms.model_mode == "eval" and not isinstance(model, nn.Module)
        self.writes = self.reentrant = self.uncompiled = self.output_checked = False
        self.sizes = _SIZES.get()
        self.forwards = self.gradients = 0
        """Passes so far, of whatever batch; those of a gradient count in both."""
        self.width = wide(x)
        self.label_range: tuple[int, int] | None = None
        self.ones: Tensor | None = None
        aims = labels if terms.targets is None else terms.targets
        if self.classes and not aims.is_floating_point():
            aims = aims.long()
        self.x = x.clone() if x.is_inference() else x.detach()  # autograd cannot save what inference made
        self.labels = aims.clone() if aims.is_inference() else aims.detach()
        self.soft = terms.validate and self.classes and aims.is_floating_point() and not torch.compiler.is_compiling()
        """Whether labels have yet to be looked at as probabilities: after the loss, which may not take any."""
        if terms.validate and x.numel():
            self._check_values(threat, terms.start)

    def gradient(self, x: Tensor, labels: Tensor, loss: PerSampleLoss, *, passes: int | None = None) -> Answer:
        """Losses, input gradients and logits: one forward and one input-gradient pass, `eot` times."""
        passes = self.eot if passes is None else passes
        if passes > 1:
            return Answer(*_mean([self.gradient(x, labels, loss, passes=1) for _ in range(passes)]))
        point = x.clone().requires_grad_()  # a copy: what is handed out may be written to
        raw = logits = self._output(self.model, point)
        half = isinstance(raw, Tensor) and raw.dtype.itemsize < 4 and raw.is_floating_point()
        if half:
            logits = raw.float()
            if raw.dtype == torch.float16:
                logits = logits.detach().requires_grad_()
        try:
            values = loss(*(self._copies(logits, labels) if self.guarded else (logits, labels)))
        except FAILURES as error:
            self._explain("loss", error, x)
            raise
        if not isinstance(values, Tensor) or values.ndim != 1 or values.shape[0] != x.shape[0]:
            check_values(self.function, values, len(x))
        if self.soft:
            self._check_soft_labels()
        if self.ones is None or self.ones.shape != values.shape or self.ones.dtype != values.dtype:
            self.ones = torch.ones_like(values, requires_grad=False)
        total, weights = values, self.ones
        if half and raw.dtype == torch.float16 and values.requires_grad:
            # The slope of a confident sample would vanish in float16 on its way to the input.
            (slope,) = torch.autograd.grad(values, logits, weights)
            total, weights = raw, leveled(slope.nan_to_num(nan=0.0)).to(raw.dtype)
        grad = self._pulled_back(total, point, weights)
        if grad is None:  # once more, now that the way is known
            return self.gradient(x, labels, loss, passes=1)
        self.gradients += 1
        return Answer(values.detach(), grad, logits.detach() if isinstance(logits, Tensor) else logits)

    def value(self, x: Tensor, labels: Tensor, loss: PerSampleLoss) -> tuple[Tensor, Tensor]:
        """Loss of each sample and the logits: one forward pass, `eot` times."""
        with torch.no_grad():
            passes = []
            for _ in range(self.eot):
                logits = self._logits(self.model, x)
                given = self._copies(logits, labels) if self.guarded else (logits, labels)
                passes.append((loss(*given), logits))
            check_values(self.function, passes[0][0], len(x))
            if self.soft:
                self._check_soft_labels()
            values, logits = _mean(passes)
            return values, logits

    def guess(self, x: Tensor) -> Tensor:
        """Logits by one forward pass, to search with; at least float32."""
        with torch.no_grad():
            logits: Tensor = self._logits(self.model, x)
            return logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits by one forward pass of the model itself, to judge by, `eot` times; at least float32."""
        with torch.no_grad():
            logits: Tensor = _mean([(self._logits(self.exact, x),) for _ in range(self.eot)])[0]
            return logits

    def without_lane(self) -> "Victim":
        """The same, asked of the model itself."""
        return self.asked(self.exact)

    def asked(self, model: Model) -> "Victim":
        """The same samples, with another way to call the model."""
        other = copy.copy(self)
        other.model = model
        return other

    @property
    def confirms(self) -> bool:
        """Whether what a search finds has yet to be confirmed by the model itself."""
        return self.exact is not self.model

    def linearized(self, x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        """Logits by one forward pass, and the function `(weights, last=True) -> grad` of their weighted sum.

        Each call of it is one input-gradient pass; `last` says that no other follows.
        """
        point = x.clone().requires_grad_()

        def forward() -> Any:
            with uncompiled() if self.uncompiled else _ALONE:
                return _widened(self._output(self.model, point))

        logits = forward()

        def pull_back(weights: Tensor, last: bool = True) -> Tensor:
            nonlocal logits
            self.gradients += 1
            grad = self._pulled_back(logits, point, weights, retain_graph=not last)
            if grad is None:
                logits = forward()
                grad = self._pulled_back(logits, point, weights, retain_graph=not last)
            assert grad is not None
            return grad

        return logits.detach(), pull_back

    def _copies(self, outputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """Outputs and labels that a loss may write to: what is judged by is not handed out."""
        return outputs.clone() if isinstance(outputs, Tensor) else outputs, labels.clone()

    def _logits(self, model: Model, x: Tensor) -> Any:
        return _widened(self._output(model, x.clone()))

    def _output(self, model: Model, x: Tensor) -> Any:
        """What the model gives, as it gives it. It may overwrite `x`, which must be a copy."""
        self.forwards += 1
        if self.writes and x.requires_grad:
            x = x.clone()
        if self.unknown:
            self.unknown = False
            model = functools.partial(watched, self.function, model, known=self.loan.modules)
        try:
            output = model(x)
        except FAILURES as error:
            if self.writes or "leaf Variable that requires grad" not in str(error):
                self._explain("model", error, x)
                raise
            self.writes = True  # which autograd allows on anything but a leaf
            return self._output(model, x)
        if not self.output_checked:
            self._check_output(output, len(x))
        return output

    def _explain(self, name: str, error: Exception, x: Tensor) -> None:
        """Say it where sizes do not meet because samples have left that what was given still holds something for.

        Or where model and inputs are of two dtypes, something was made in inference mode, or a sample is alone.
        """
        if "Inference tensors" in str(error):
            raise ValueError(
                f"{self.function}: `{name}` holds tensors that were made under torch.inference_mode(), through "
                "which no gradient can be taken; make or load them outside of it, or under torch.no_grad()."
            ) from error
        if name == "model":
            explain_pass(self.function, self.loan.modules, x, error)
        if len(x) < len(self.x):
            explain_rows(self.function, name, f"the {len(x)} of {len(self.x)} samples that are still in play", error)

    def _pulled_back(self, total: Tensor, x: Tensor, weights: Any, *, retain_graph: bool = False) -> Tensor | None:
        """Gradient of the weighted sum of `total`, at least float32; None where it takes another forward pass.

        It is 0 where undefined, and where infinite larger than all that is finite: large enough to decide the
        direction, and small enough for norms of it not to overflow in their turn.
        """
        grad = None
        if total.requires_grad and self.reentrant:
            x.grad = None
            torch.autograd.backward(total, weights, retain_graph=retain_graph)
            grad = x.grad
        elif total.requires_grad:
            try:
                (grad,) = torch.autograd.grad(total, x, weights, allow_unused=True, retain_graph=retain_graph)
            except RuntimeError as error:
                if retain_graph and only_once(error):
                    self.uncompiled = True
                    return None
                if not only_backward(error):
                    raise
                if not self.loan.freezes:
                    raise needs_backward(self.function, "inputs") from error
                self.reentrant = True  # whose backward pass writes to the point, and to no parameter: all are frozen
                return None
        if grad is None:
            raise ValueError(
                f"{self.function}: the model's output has no gradient with respect to its input; it must be computed "
                "from `x` by differentiable operations, outside torch.no_grad()."
            )
        most = _MOST[self.width]
        grad = (grad if grad.dtype == self.width else grad.to(self.width)).nan_to_num(0.0, most, -most)
        if self.sizes is not None:
            self.sizes.append(rows(grad).abs().amax(dim=1))
            self.sizes = None
        return grad

    def _check_soft_labels(self) -> None:
        _check.probabilities(self.function, self.labels, name="targets" if self.aimed else "labels")
        self.soft = False

    def _check_output(self, output: Any, batch: int) -> None:
        """Require outputs that fit the labels, which can be judged now."""
        self.output_checked = True
        name = "targets" if self.aimed else "labels"
        if self.classes:
            vectors = isinstance(output, Tensor) and output.ndim == 2 and output.shape[0] == batch
            usual = vectors and output.is_floating_point() and output.layout == torch.strided
            if not (usual and output.shape[1] > 1 and self.labels.ndim == 1 and output.device == self.labels.device):
                check_logits(self.function, output, batch, self.labels[:batch], name=name)
        if self.label_range is not None and isinstance(output, Tensor) and output.ndim >= 2 and output.shape[1] > 1:
            first, last = self.label_range
            if first < 0 or last >= output.shape[1]:
                _check.label_range(self.function, first, last, output.shape[1], name=name)

    def _check_values(self, threat: Threat, start: str | Tensor) -> None:
        """Require finite inputs inside the bounds, and labels that are classes; waits for the device once."""
        x, labels = self.x, self.labels
        if (x.is_cuda and torch.cuda.is_current_stream_capturing()) or torch.compiler.is_compiling():
            return
        indices = self.classes and not labels.is_floating_point()
        if indices and labels.ndim > 1:  # places without a label are of no class
            labels = labels.masked_fill(labels == _check.NO_LABEL, 0)
        lower, upper = box(threat, x)
        low, high = torch.aminmax(x)  # in sixteen bits they would not be in one row with all classes
        read = [low.to(self.width), high.to(self.width), *(torch.aminmax(labels) if indices else ())]
        read += torch.aminmax(start) if isinstance(start, Tensor) else ()
        if isinstance(lower, Tensor):
            read.append(torch.maximum(lower - x, x - upper).amax())
        low, high, *others = torch.stack(read).tolist()
        beyond = others.pop() if isinstance(lower, Tensor) else max(lower - low, high - upper)
        first, last, *starts = others if indices else (0, 0, *others)
        for name, extremes in (("x", (low, high)), ("start", starts)):
            if not all(map(math.isfinite, extremes)):
                raise ValueError(f"{self.function}: `{name}` contains NaN or infinite values.")
        if beyond > 0:
            check_excess(self.function, threat, x, float(beyond))  # a few roundings are let in
            self.x = clamped(x, lower, upper)
        if indices:
            self.label_range = int(first), int(last)


# Squares of it can still be added up.
_MOST = {dtype: torch.finfo(dtype).max ** 0.4 for dtype in (torch.float32, torch.float64)}


def check_arguments(
    function: str, model: Any, x: Tensor, labels: Tensor, threat: Any, terms: Terms, *, called: str = "model"
) -> None:
    """Require arguments of the right kind, shape and device; reads no values."""
    if not isinstance(model, nn.Module) or getattr(type(model), "forward", None) is nn.Module.forward:
        _check.model(function, model, name=called)
    if terms.loss is not None and not callable(terms.loss):
        raise TypeError(
            f"{function}: `loss` must be a function (logits, labels) -> (B,), got {type(terms.loss).__name__}."
        )
    usual = (  # right at a glance; what is not is looked at piece by piece, for its message
        isinstance(x, Tensor)
        and isinstance(labels, Tensor)
        and isinstance(threat, Ball)
        and x.is_floating_point()
        and x.dtype.itemsize > 1
        and not x.is_nested
        and labels.dtype == torch.int64
        and x.ndim > 0
        and labels.shape == x.shape[:1]
        and labels.device == x.device
        and x.layout == labels.layout == torch.strided
        and terms.targets is None
        and isinstance(terms.start, str)
        and terms.start in ("random", "clean")
        and terms.model_mode in ("eval", "as_is")
        and type(terms.eot) is int
        and terms.eot > 0
        and type(terms.validate) is bool
    )
    if not usual:
        check_each(function, x, labels, threat, terms)


def plain(value: Tensor) -> Tensor:
    """The tensor without its history; a copy where autograd could not save it."""
    return value.clone() if value.is_inference() else value.detach()


def _widened(output: Any) -> Any:
    """Logits in float32 at least; what is no tensor as it is."""
    if isinstance(output, Tensor) and output.is_floating_point() and output.dtype.itemsize < 4:
        return output.float()
    return output


def _mean(passes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The mean of equal passes; what is no tensor is that of the first."""
    if len(passes) == 1:
        return passes[0]
    return tuple(
        torch.stack(parts).mean(dim=0) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*passes, strict=True)
    )
