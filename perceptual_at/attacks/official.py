"""AutoAttack as its authors released it, called so that it leaves no traces."""

import contextlib
import functools
import importlib
import inspect
import logging
import sys
import warnings as python_warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from perceptual_at._extras import extra
from perceptual_at._random import SampleGenerator
from perceptual_at.attacks.protocol import Composition
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.threats import L1, L2, Linf, is_published, norm_name
from perceptual_at.victims import Victim, misclassified, undefined

NOTE = "steps and passes are not known: the official code does not count them"


def attacks(
    victim: Victim, composition: Composition, threat: Linf | L2 | L1, numbers: SampleGenerator, classes: int
) -> tuple[list[Callable[[Tensor, Tensor, Tensor], Verdict]], list[str]]:
    """The attacks of a composition, each run by the official code, and the list that its warnings go to.

    Raises:
        ImportError: if neither `pyautoattack` nor `autoattack` is installed.
        ValueError: if the official code cannot do what is asked.
    """
    dlr = {"apgd-dlr": 3, "apgd-t": 4}
    for name, _ in composition:
        if len(victim.x) and classes < dlr.get(name, 2):  # without samples nobody knows how many there are
            raise ValueError(
                f"auto_attack: the official {name} needs at least {dlr[name]} classes, got {classes}; use "
                'backend="native".'
            )
    heard: list[str] = []
    package = _package()
    run = functools.partial(_run_official, package, victim, threat, numbers.seed, heard)
    return [functools.partial(run, name, options) for name, options in composition], heard


def check(composition: Composition, threat: Linf | L2 | L1, x: Tensor) -> None:
    """Require what the official code can do, as far as can be said before the first pass.

    Raises:
        ImportError: if neither `pyautoattack` nor `autoattack` is installed.
        ValueError: if it cannot.
    """
    if not is_published(threat):
        raise ValueError(f"auto_attack: the official code knows one eps and the box [0, 1] only, got {threat!r}.")
    if x.dtype != torch.float32:
        raise ValueError(f"auto_attack: the official code computes in float32, got inputs of {x.dtype}.")
    for name, options in composition:
        if options.get("reach_edge"):
            raise ValueError(
                "auto_attack: the official Square never touches the last row and column, got reach_edge=True."
            )
        if name == "fab-t" and options["restarts"] != 1:
            raise ValueError("auto_attack: the official fab-t always runs once, got restarts != 1.")
        for option in options:
            if option not in _TAKEN[name]:
                raise ValueError(f"auto_attack: {name!r} of the official code takes no `{option}`; drop it.")
    _package()


_APGD, _FAB = {"steps", "restarts", "rho", "eot", "from_larger_eps"}, {"steps", "restarts"}
_TAKEN = {
    "apgd-ce": _APGD, "apgd-dlr": _APGD, "apgd-t": _APGD | {"target_classes"}, "fab": _FAB,
    "fab-t": _FAB | {"target_classes"}, "square": {"queries", "restarts", "p_init", "reach_edge"},
}  # fmt: skip


def _package() -> str:
    """The name under which the official code is installed: another one where it came from its repository."""
    with contextlib.suppress(ImportError):
        importlib.import_module("autoattack")
        return "autoattack"
    extra("auto_attack", "pyautoattack", why="for backend='pyautoattack'")
    return "pyautoattack"


def _run_official(
    package: str,
    victim: Victim,
    threat: Linf | L2 | L1,
    seed: int,
    heard: list[str],
    name: str,
    options: dict[str, Any],
    x: Tensor,
    labels: Tensor,
    at: Tensor,  # noqa: ARG001  # the official code has no numbers per sample
) -> Verdict:
    suite: Any = importlib.import_module(package).AutoAttack
    with _no_traces(x, heard):
        common = {"norm": norm_name(threat), "eps": threat.eps, "device": x.device, "seed": seed}
        listed = "attacks" if "attacks" in inspect.signature(suite).parameters else "attacks_to_run"
        runner = suite(victim.model, version="custom", **{listed: [name]}, **common)
        _set_up(package, runner, victim.model, name, options, common)
        given = runner.run_standard_evaluation(x, labels, **{_batch_size(runner): len(x)})
    x_adv = given[0] if isinstance(given, tuple) else given
    x_adv = threat.project(x_adv.detach(), x)
    logits = victim.logits(x_adv)
    success = misclassified(logits, labels)
    unknown = torch.zeros_like(labels)
    step = torch.where(success, unknown, -1)
    return Verdict(x_adv, success, step, unknown, unknown, undefined=undefined(logits))


def _set_up(package: str, runner: Any, model: Any, name: str, options: dict[str, Any], common: dict[str, Any]) -> None:
    """Give the runner the attack it needs, with the budgets of the composition."""
    shared = {**common, "verbose": False, "n_restarts": options["restarts"]}
    if name == "square":
        module = importlib.import_module(f"{package}.square")
        runner.square = module.SquareAttack(
            model, p_init=options.get("p_init", 0.8), n_queries=options["queries"], resc_schedule=False, **shared
        )
    elif name.startswith("fab"):
        module = importlib.import_module(f"{package}.fab_pt")
        targets = {"n_target_classes": options["target_classes"]} if name == "fab-t" else {}
        runner.fab = module.FABAttack_PT(model, n_iter=options["steps"], **targets, **shared)
    else:
        module = importlib.import_module(f"{package}.autopgd_base")
        ascent = {
            "n_iter": options["steps"], "eot_iter": options.get("eot", 1), "rho": options.get("rho", 0.75),
            "use_largereps": options.get("from_larger_eps", False), "logger": logging.getLogger(_LOGGER),
        }  # fmt: skip
        if name == "apgd-t":
            targets = {"n_target_classes": options["target_classes"]}
            runner.apgd_targeted = module.APGDAttack_targeted(model, **targets, **ascent, **shared)
        else:
            runner.apgd = module.APGDAttack(model, **ascent, **shared)


def _batch_size(runner: Any) -> str:
    return "batch_size" if "batch_size" in inspect.signature(runner.run_standard_evaluation).parameters else "bs"


_LOGGER = "auto-attack"


class _Listener(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "zero gradient" not in text:  # of a single sample at a single step; `suspicions` goes by significance
            self.heard.append(text)


@contextlib.contextmanager
def _no_traces(x: Tensor, heard: list[str]) -> Iterator[None]:
    """Keep random states and tracing as they are, and collect the warnings."""
    logger, listener = logging.getLogger(_LOGGER), _Listener(heard)
    propagates, trace = logger.propagate, sys.gettrace()
    devices = [x.device] if x.is_cuda else []
    logger.addHandler(listener)
    logger.propagate = False
    try:
        with torch.random.fork_rng(devices=devices), python_warnings.catch_warnings(record=True) as caught:
            python_warnings.simplefilter("always")
            yield
        heard.extend(str(warning.message) for warning in caught)
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagates
        sys.settrace(trace)
