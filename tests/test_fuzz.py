"""Public functions around evaluation with one argument wrong at a time: an error names the function, or none comes."""

import contextlib
import functools
import inspect
import io
import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perceptual_at import (
    Check,
    Evaluation,
    Linf,
    attacks,
    compare,
    diagnostics,
    divergences,
    evaluation,
    losses,
    metrics,
    partitions,
    paths,
    plotting,
    sample_weights,
    soft_labels,
)  # fmt: skip
from perceptual_at.attacks import pgd
from perceptual_at.evaluation import aggregate
from perceptual_at.published import published

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
RESULT = Evaluation(torch.tensor([True, False]), {"pgd20": torch.tensor([True, False])}, labels=torch.tensor([0, 1]))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


GAP = diagnostics.PerceptionGap(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor([True, True]))
PGD = functools.partial(pgd, threat=Linf(0.1), steps=1)
# What each parameter may be, by its name; functions that mean something else by it have their own.
GOOD = {
    "model": network, "x": lambda: X.clone(), "labels": lambda: LABELS.clone(), "threat": lambda: Linf(0.1),
    "loader": lambda: [(X.clone(), LABELS.clone())], "attacks": lambda: {"pgd": PGD}, "x_adv": lambda: X.clone(),
    "perturb": lambda: PGD, "attack": lambda: PGD, "alphas": lambda: [0.0, 1.0], "evaluation": lambda: RESULT,
    "a": lambda: RESULT, "b": lambda: RESULT, "evaluations": lambda: [RESULT], "successes": lambda: 3, "n": lambda: 9,
    "only_a": lambda: 2, "only_b": lambda: 3, "rows": lambda: published(paper="RPAT", table=1),
    "gaps": lambda: {"a": GAP}, "paths": lambda: {"a": torch.rand(2, 3)}, "ax": lambda: plotting.accuracy_bars(RESULT),
    "values": lambda: torch.rand(4), "clean": lambda: 0.8, "robust": lambda: 0.5, "mean": lambda: 0.5,
    "logits": lambda: torch.randn(6, 3), "std": lambda: 0.1, "points": lambda: {"a": (80.0, 50.0)},
}  # fmt: skip
OWN = {
    ("trade_off", "results"): lambda: {"a": [(80.0, 50.0)]},
    ("accuracy_bars", "results"): lambda: RESULT,
    ("quantize", "x"): lambda: (X * 255).round() / 255,
}
BAD = (
    None, True, -1, 0, 2.5, Fraction(1, 2), float("nan"), "text", b"bytes", [], {}, (), object(), len,
    torch.tensor([]), torch.zeros(2, 2, 2),
    torch.tensor(float("nan")), [None], {"a": None}, {1: 2}, Linf, iter([1]),
)  # fmt: skip
ROOMS = {
    "evaluation": (evaluation, [name for name in evaluation.__all__ if inspect.isfunction(getattr(evaluation, name))]),
    "metrics": (metrics, ["accuracy", "mean_score", "nrr"]),
    "plotting": (
        plotting,
        ["trade_off", "published_trade_offs", "name_points", "accuracy_bars", "perception_bars", "perception_paths"],
    ),
}
SLOW = ("evaluate", "sanity_checks")  # tried by tests of their own
FUNCTIONS = [(room, name) for room, (_, names) in ROOMS.items() for name in names if name not in SLOW]
# What goes wrong inside of a model, an attack or a score is theirs to say.
RUNS = {"model", "x_adv", "statistic", "attack", "attacks", "loader", "black_box", "transfer_from", "score"}


def good(name, parameter):
    return OWN.get((name, parameter), GOOD.get(parameter))


def shown(value):
    return repr(value)[:40]


@pytest.mark.slow
@pytest.mark.parametrize(("room", "name"), FUNCTIONS, ids=lambda value: value)
def test_one_wrong_argument_is_named_or_does_no_harm(room, name):
    if room == "plotting":
        pytest.importorskip("matplotlib")
    function = getattr(ROOMS[room][0], name)
    parameters = inspect.signature(function).parameters
    needed = [one for one, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = [one for one in needed if good(name, one) is None]
    assert not missing, f"the fuzz knows no right value of {missing}"
    wrong = []
    for changed in parameters:
        for value in BAD:
            arguments = {one: good(name, one)() for one in needed} | {changed: value}
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                try:
                    function(**arguments)
                except (TypeError, ValueError, OSError) as error:
                    named = f"{name}:" in str(error) or "Evaluation" in str(error)
                    if not named and changed not in RUNS:
                        wrong.append(f"{changed}={shown(value)}: {type(error).__name__}: {str(error)[:90]}")
                except Exception as error:
                    if changed not in RUNS:
                        wrong.append(f"{changed}={shown(value)}: {type(error).__name__}: {str(error)[:90]}")
    assert not wrong, "\n".join(wrong)


def test_the_values_that_the_fuzz_takes_for_right_are_right():
    assert compare(RESULT, RESULT)["clean"].p == 1.0
    assert aggregate([RESULT]).seeds == 1
    assert Check("a", True, 0.0, "found").passed


# Functions of tensors -----------------------------------------------------------------------------------------------


def logits(seed, *, classes=5):
    return torch.randn(4, classes, generator=torch.Generator().manual_seed(seed))


def anything(z):
    """A model that takes every shape and dtype, so that what goes wrong is not its own."""
    return z.reshape(len(z), -1).float().sum(dim=1, keepdim=True) * torch.arange(5.0)


FOUR = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
TENSORS = {
    "model": lambda: anything, "x": FOUR.clone, "x_adv": FOUR.clone, "labels": lambda: torch.arange(4),
    "targets": lambda: torch.arange(4).flip(0), "threat": lambda: Linf(0.1), "mix": lambda: 0.3, "alpha": lambda: 0.5,
    "gradient_1": lambda: FOUR + 0.1, "gradient_2": lambda: FOUR / 2 + 0.2, "margins": lambda: torch.rand(4),
    "largest": lambda: 0.5, "share": lambda: 0.5, "etas": lambda: [0.5, 1.0], "classes": lambda: 5,
    "a": lambda: logits(1), "b": lambda: logits(2), "wrong_weight": lambda: 0.5,
    "path_logits": lambda: torch.stack([logits(1), logits(2)]), "kappa": lambda: torch.arange(4),
}  # fmt: skip
OF_ONE = {
    ("temporal_ensembling_loss", "targets"): lambda: logits(1).softmax(dim=1),
    ("dummy_class_loss", "logits"): lambda: logits(0, classes=10),
}
ROOMS_OF_TENSORS = (losses, divergences, partitions, sample_weights, soft_labels, paths, attacks)
ATTACKS = ("margin", "dlr", "targeted_dlr", "kl_to", "segpgd_loss", "cospgd_loss")
"""Of the room of attacks what they ascend; test_malformed_attacks.py and test_bad_input.py have the rest."""
SKIPPED = ("geometric_weights", "score_slack")


def functions_of_tensors():
    for room in ROOMS_OF_TENSORS:
        for name in getattr(room, "__all__", vars(room)):
            function = getattr(room, name)
            own = inspect.isfunction(function) and function.__module__.startswith("perceptual_at.")
            if own and "Args:" in (function.__doc__ or "") and name not in SKIPPED and not name.startswith("_"):
                if room is attacks and name not in ATTACKS:
                    continue
                yield name, function


OF_TENSORS = dict(functions_of_tensors())


def right_value(name, parameter):
    """A right value of a parameter; what has none keeps its default."""
    if found := OF_ONE.get((name, parameter), TENSORS.get(parameter)):
        return found()
    return logits(sum(map(ord, parameter))) if "logits" in parameter else None


# A tensor, a number or something else; what is done to a tensor that is right.
HOSTILE = {
    "None": lambda v: None, "True": lambda v: True, "-1": lambda v: -1, "NaN": lambda v: math.nan,
    "infinite": lambda v: math.inf, "2.5": lambda v: 2.5, "beyond tensors": lambda v: 10**30, "text": lambda v: "text",
    "fraction": lambda v: Fraction(1, 2), "list": lambda v: [], "object": lambda v: object(),
    "a half": lambda v: torch.tensor(0.5),
    "NaN tensor": lambda v: torch.tensor(math.nan), "(B,)": lambda v: torch.full((4,), 0.5),
    "(3,)": lambda v: torch.full((3,), 0.5), "empty": lambda v: torch.tensor([]),
    "complex": lambda v: torch.ones(4, 5, dtype=torch.complex64),
}  # fmt: skip
CHANGED = {
    "one more dimension": lambda v: v[None], "one less": lambda v: v[0], "one row less": lambda v: v[:-1],
    "double": lambda v: v.double(), "half": lambda v: v.half(), "bfloat16": lambda v: v.bfloat16(),
    "integers": lambda v: v.long(), "truth values": lambda v: v > 0, "array": lambda v: v.detach().numpy(),
    "lists": lambda v: v.tolist(), "far below": lambda v: v - 100, "transposed": lambda v: v.transpose(0, -1),
    "sparse": lambda v: v.to_sparse(),
}  # fmt: skip
HARMLESS = {
    "requires a gradient": lambda v: v.clone().requires_grad_(v.is_floating_point()),
    "not contiguous": lambda v: v.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda v: v[:1].expand(v.shape),
}
INDICES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]
THEIRS = ("model", "loss", "criterion", "threat")  # what is called: its own words may come through
FLAGS = ("lane", "validate", "verdict", "generator")


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def right_call(name):
    parameters = inspect.signature(OF_TENSORS[name]).parameters.values()
    return {
        one.name: right_value(name, one.name)
        for one in parameters
        if one.default is one.empty or (name, one.name) in OF_ONE
    }


def complaint(name, parameter, change):
    """What is wrong with a call in which one argument is changed; nothing if it is right or refused by name."""
    arguments = right_call(name)
    try:
        arguments[parameter] = change(arguments.get(parameter))
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return None  # there is no such change of it
    try:
        found = OF_TENSORS[name](**arguments)
    except (ValueError, TypeError) as error:
        named = str(error).startswith(f"{name}: ") and "`" in str(error)
        return None if named or parameter in THEIRS else f"{type(error).__name__}: {error}"
    except Exception as error:
        return None if parameter in THEIRS else f"{type(error).__name__}: {error}"
    return "NaN" if any(one.is_floating_point() and one.isnan().any() for one in tensors_in(found)) else None


def changes_of(name, parameter):
    right = right_call(name).get(parameter)
    return {**HOSTILE, **(CHANGED if isinstance(right, torch.Tensor) else {})}


PAIRS = [
    (name, parameter)
    for name, function in OF_TENSORS.items()
    for parameter in inspect.signature(function).parameters
    if parameter not in FLAGS
]


@given(st.sampled_from(PAIRS), st.data())
def test_a_hostile_argument_is_refused_by_name_or_does_no_harm(pair, data):
    name, parameter = pair
    changes = changes_of(name, parameter)
    word = data.draw(st.sampled_from(sorted(changes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert complaint(name, parameter, changes[word]) is None, (name, parameter, word)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TENSORS)
def test_every_hostile_argument_is_refused_by_name_or_does_no_harm(name):
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in [parameter for one, parameter in PAIRS if one == name]:
            for word, change in changes_of(name, parameter).items():
                if said := complaint(name, parameter, change):
                    wrong.append(f"{parameter} {word}: {said[:120]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", OF_TENSORS)
def test_what_only_looks_odd_is_taken(name):
    right = right_call(name)
    for parameter, value in right.items():
        if isinstance(value, torch.Tensor):
            for change in HARMLESS.values():
                OF_TENSORS[name](**{**right, parameter: change(value)})
        if parameter in ("labels", "targets") and not value.is_floating_point():
            expected = list(tensors_in(attempt(name, right)))
            for dtype in INDICES:
                found = list(tensors_in(attempt(name, {**right, parameter: value.to(dtype)})))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (parameter, dtype)


def attempt(name, arguments):
    drawn = "generator" in inspect.signature(OF_TENSORS[name]).parameters
    return OF_TENSORS[name](**arguments, **({"generator": torch.Generator().manual_seed(0)} if drawn else {}))
