"""Importing the package in a fresh process: no warning, nothing heavy, no device touched, nothing drawn or printed."""

import subprocess
import sys
from pathlib import Path

import pytest

import perceptual_at

HEAVY = (
    "torchvision",
    "matplotlib",
    "sklearn",
    "pyautoattack",
    "tqdm",
    "scipy",
    "pandas",
    "PIL",
    "safetensors",
    "accelerate",
)


def fresh(code):
    """Run code in a new interpreter where warnings are errors, but for one that torch 2.6 gives when it ends."""
    warnings = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    done = subprocess.run(
        [sys.executable, *warnings, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.slow
def test_importing_loads_nothing_heavy_warns_of_nothing_and_touches_no_device():
    code = f"""
import sys, torch
before, seed, state = set(sys.modules), torch.initial_seed(), torch.get_rng_state()
dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
import perceptual_at
assert not torch.cuda.is_initialized(), "initialised CUDA"
assert torch.initial_seed() == seed and torch.equal(torch.get_rng_state(), state), "drew random numbers"
assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == (dtype, threads, grad)
heavy = [name for name in {HEAVY!r} if name in set(sys.modules) - before]
assert not heavy, heavy
print(*sorted({{name.split('.')[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
"""
    assert set(fresh(code)) <= {"perceptual_at", "einops"}


@pytest.mark.slow
def test_submodules_are_attributes_and_loaded_on_first_use():
    folder = Path(perceptual_at.__file__).parent
    stems = sorted({one.stem for one in folder.iterdir() if one.suffix == ".py" or (one / "__init__.py").exists()})
    names = [name for name in stems if not name.startswith("_")]
    code = f"""
import sys
import perceptual_at
assert "perceptual_at.models" not in sys.modules
assert not hasattr(perceptual_at, "model") and not hasattr(perceptual_at, "_nothing")
assert set({names!r}) <= set(dir(perceptual_at))
print(*(getattr(perceptual_at, name).__name__ for name in {names!r}))
"""
    assert fresh(code) == [f"perceptual_at.{name}" for name in names]
    text = (folder / "__init__.py").read_text(encoding="utf-8")  # type checkers read a list
    assert {name for name in names if f"    from perceptual_at import {name} as {name}\n" not in text} == {
        "objectives",
        "theory",
    }


@pytest.mark.slow
def test_the_readme_line_imports():
    names = "Linf, pgd, robust_perception_loss, dicar_loss, boundary_partition, nrr"
    assert fresh(f"from perceptual_at import {names}; print(nrr(90.0, 45.0))") == ["60.0"]


@pytest.mark.slow
def test_an_attack_a_loss_and_an_evaluation_work_without_any_optional_package():
    code = f"""
import sys

import pytest
for name in {HEAVY!r}:
    sys.modules.setdefault(name, None)  # importing it fails
import torch
from perceptual_at import Linf, evaluate, pgd, robust_perception_loss
model = torch.nn.Linear(4, 3)
x, labels = torch.rand(5, 4), torch.zeros(5, dtype=torch.long)
x_adv = pgd(model, x, labels, Linf(0.1))
robust_perception_loss(model(x), model((x + x_adv) / 2), model(x_adv)).backward()
evaluate(model, [(x, labels)], {{"pgd": lambda *given: pgd(*given, Linf(0.1))}})
print("done")
"""
    assert fresh(code) == ["done"]
