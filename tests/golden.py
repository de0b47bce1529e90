"""The values of the methods' released codes: cases for tests, their inputs as tensors, and how close is close."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import Tiny

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def cases(method, *, only=lambda case: True):
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c["name"]) for c in GOLDEN["methods"][method] if only(c)]
    )


def tensor(value):
    if isinstance(value, list):
        flat = value
        while isinstance(flat, list):
            flat = flat[0]
        if isinstance(flat, bool):
            return torch.tensor(value)
        return torch.tensor(value, dtype=torch.int64 if isinstance(flat, int) else torch.float64)
    return value


def inputs(case):
    """The inputs as tensors; a model's name or weights as the model."""
    given = {name: tensor(v) for name, v in case["inputs"].items() if "model" not in name}
    norm = case["inputs"].get("input_mean"), case["inputs"].get("input_std")
    for name in ("model", "wa_model"):
        if name in case["inputs"] and not isinstance(case["inputs"][name], dict | str):
            raise AssertionError(name)
        if name in case["inputs"]:
            weights = case["inputs"][name]
            weights = GOLDEN["models"][weights] if isinstance(weights, str) else weights
            given[name] = Tiny(weights.get("weights", weights), *norm)
    return given


def close(actual, expected, atol=1e-9):
    assert_close(actual.detach(), torch.as_tensor(tensor(expected), dtype=actual.dtype), rtol=0, atol=atol)


def grads_match(total, expected, atol=1e-8, **variables):
    gradients = torch.autograd.grad(total, list(variables.values()))
    for (name, variable), gradient in zip(variables.items(), gradients, strict=True):
        assert variable.requires_grad
        close(gradient, expected[f"grad_{name}"], atol)
