"""Public functions around evaluation with one argument wrong at a time: an error names the function, or none comes."""

import contextlib
import functools
import inspect
import io
import warnings

import pytest
import torch
from torch import nn

from perceptual_at import Check, Evaluation, Linf, compare, diagnostics, evaluation, metrics, plotting
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
    "logits": lambda: torch.randn(6, 3), "std": lambda: 0.1,
}  # fmt: skip
OWN = {
    ("trade_off", "results"): lambda: {"a": [(80.0, 50.0)]},
    ("accuracy_bars", "results"): lambda: RESULT,
    ("quantize", "x"): lambda: (X * 255).round() / 255,
}
BAD = (
    None, True, -1, 0, 2.5, float("nan"), "text", b"bytes", [], {}, (), object(), len,
    torch.tensor([]), torch.zeros(2, 2, 2),
    torch.tensor(float("nan")), [None], {"a": None}, {1: 2}, Linf, iter([1]),
)  # fmt: skip
ROOMS = {
    "evaluation": (evaluation, [name for name in evaluation.__all__ if inspect.isfunction(getattr(evaluation, name))]),
    "metrics": (metrics, ["accuracy", "mean_score", "nrr"]),
    "plotting": (
        plotting,
        ["trade_off", "published_trade_offs", "accuracy_bars", "perception_bars", "perception_paths"],
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
            given = {one: good(name, one)() for one in needed} | {changed: value}
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                try:
                    function(**given)
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
