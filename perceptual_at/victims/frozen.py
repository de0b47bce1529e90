"""The public face of the door: borrow a model and give it back as it was."""

import contextlib
from collections.abc import Iterator

from perceptual_at import _check
from perceptual_at.victims.door import Loan
from perceptual_at.victims.lanes import Lane
from perceptual_at.victims.terms import Model, ModelMode, check_lane


@contextlib.contextmanager
def frozen(model: Model, *, model_mode: ModelMode = "eval", lane: Lane | None = None) -> Iterator[Model]:
    """The callable to attack: eval mode, parameters that need no gradient, both undone afterwards.

    Every module's `training` flag and every parameter's `requires_grad` is restored, also after an exception or an
    interrupt; modules whose own `train` does more than to set flags are switched back by it. A module with tensors that
    were made in inference mode, which autograd cannot save, is lent as a copy.

    Modules are found in what is given: in partials, bound methods, closures, objects, and the dictionaries and lists in
    them. Wrappers for distributed training are looked through, because an attack has no gradients to exchange. Several
    borrowers at once, in threads or inside each other, leave the model as the first one found it.

    Args:
        model: a module (also compiled, exported, scripted or wrapped for distributed training) or any callable.
        model_mode: `"eval"`, or `"as_is"` to leave the modes of the modules alone. A batch norm that is in train
            mode then uses and updates its statistics in every attack step, as ReBAT's released code does.
        lane: run a copy of the module that costs less instead, with the module's present weights; see `Lane`. The
            module itself is `exact` of what is given, and `notes` says what of the lane could not be had.

    Yields:
        The callable.

    Raises:
        TypeError: if `model` is not callable, or no module and `lane` is given.
        ValueError: if `model_mode` is unknown, or a lane is asked for with `model_mode="as_is"`, on top of another
            lane, or for a module that cannot be copied.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with frozen(model) as f:
        ...     f.training, any(p.requires_grad for p in f.parameters())
        (False, False)
        >>> model.training, all(p.requires_grad for p in model.parameters())
        (True, True)
        >>> with frozen(functools.partial(lambda net, x: net(x).softmax(dim=1), model)):  # the module is found
        ...     model.training
        False
    """
    _check.called("frozen", model=model)
    _check.choice("frozen", "model_mode", model_mode, ("eval", "as_is"))
    check_lane("frozen", model, model_mode, lane)
    with lent("frozen", model, model_mode=model_mode, lane=lane, buffers=False) as f:
        yield f


@contextlib.contextmanager
def lent(
    function: str, model: Model, *, model_mode: ModelMode = "eval", lane: Lane | None = None, buffers: bool = True
) -> Iterator[Model]:
    """The same for passes of the library's own, which leave buffers as found too; errors speak of `function`."""
    loan = Loan(model, model_mode, lane, function=function, buffers=buffers)
    try:
        try:
            yield loan.take()
        finally:
            loan.give_back()
    finally:  # an interrupt may have cut the first one short
        loan.give_back()
