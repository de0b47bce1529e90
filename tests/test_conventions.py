"""House rules that can be read off the code: names, order, keyword-only options, nothing that waits for a device."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import perceptual_at
from perceptual_at import L1, L2, Linf, Threat, attacks, losses, objectives

PACKAGE = Path(perceptual_at.__file__).parent

# One word per thing. Left: what the field also calls it; right: what it is called here.
BANNED = {
    "epsilon": "eps",
    "radius": "eps",
    "num_steps": "steps",
    "n_steps": "steps",
    "n_iter": "steps",
    "nb_iter": "steps",
    "iters": "steps",
    "iterations": "steps",
    "max_iter": "steps",
    "eps_iter": "step_size",
    "stepsize": "step_size",
    "n_restarts": "restarts",
    "num_restarts": "restarts",
    "random_start": "start",
    "rand_init": "start",
    "image": "x",
    "images": "x",
    "inputs": "x",
    "input": "x",
    "x_clean": "x",
    "x_nat": "x",
    "x_natural": "x",
    "x_orig": "x",
    "adv": "x_adv",
    "x_adversarial": "x_adv",
    "y": "labels",
    "label": "labels",
    "target": "labels",
    "outputs": "logits",
    "logits_clean": "clean_logits",
    "natural_logits": "clean_logits",
    "logits_mid": "mid_logits",
    "logits_adv": "adv_logits",
    "t": "alpha",
    "ratio": "alpha",
    "lam": "mix",
    "lmbda": "mix",
    "lambda_": "weight",
    "keep_mask": "mask",
    "tau": "temperature",
    "temp": "temperature",
    "ema_decay": "decay",
    "norm_type": "threat",
    "clip_min": "bounds",
    "clip_max": "bounds",
    "seed": "generator",
    "rng": "generator",
    "net": "model",
    "loss_fn": "loss",
    "criterion_fn": "criterion",
}
# Verdicts are a function of a seed and the sample's index: a generator, which has a state, would not do.
SEEDED = {"perceptual_at.evaluate", "perceptual_at.sanity_checks"}
ORDER = ("model", "x", "x_adv", "clean_logits", "reduced_logits", "mid_logits", "adv_logits", "labels", "threat")


def functions(*modules):
    found = {}
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                found[f"{module.__name__.removeprefix('perceptual_at.')}.{name}"] = value
    return found


METHODS = {
    f"{kind.__name__}.{name}": getattr(kind, name)
    for kind in (Linf, L2, L1, Threat)
    for name, value in vars(kind).items()
    if inspect.isfunction(value) and not name.startswith("_")
}
PUBLIC = functions(perceptual_at, attacks, losses, objectives)
every_signature = pytest.mark.parametrize("name", [*PUBLIC, *METHODS])


def parameters(name):
    return inspect.signature((PUBLIC | METHODS)[name]).parameters.values()


@every_signature
def test_whatever_has_a_default_is_keyword_only(name):
    for parameter in parameters(name):
        if parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, f"`{parameter.name}` has a default, so it is keyword-only"


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_a_threats_options_are_keyword_only(kind):
    eps, *options = inspect.signature(kind).parameters.values()
    assert eps.name == "eps"
    assert all(option.kind is option.KEYWORD_ONLY for option in options)


@every_signature
def test_names_are_those_of_the_vocabulary(name):
    for parameter in parameters(name):
        if parameter.name == "seed" and name in SEEDED:
            continue
        assert parameter.name not in BANNED, f"call `{parameter.name}` `{BANNED[parameter.name]}`"


@every_signature
def test_arguments_stand_in_the_order_of_the_path(name):
    positional = [p.name for p in parameters(name) if p.kind is p.POSITIONAL_OR_KEYWORD]
    places = [ORDER.index(parameter) for parameter in positional if parameter in ORDER]
    if "project" in name or name.endswith((".step", ".quantize")):
        places.sort()  # `project(x_adv, x)`: the point to move, then the centre
    assert places == sorted(places)


@every_signature
def test_a_generator_stands_last_and_defaults_to_none(name):
    names = [p.name for p in parameters(name) if p.kind is not p.VAR_KEYWORD]
    if "generator" in names:
        assert names[-1] == "generator"
        assert next(p for p in parameters(name) if p.name == "generator").default is None


@every_signature
def test_every_argument_and_result_is_annotated_and_no_function_takes_a_device(name):
    function = (PUBLIC | METHODS)[name]
    for parameter in parameters(name):
        assert parameter.name == "self" or parameter.annotation is not parameter.empty, parameter.name
        assert parameter.name != "device" or name.endswith("evaluate"), "the device is that of the tensors"
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.startswith("losses.")])
def test_losses_take_tensors_and_end_in_a_reduction(name):
    taken = [p.name for p in parameters(name)]
    assert "model" not in taken
    assert taken[-1] == "reduction"
    assert inspect.signature(PUBLIC[name]).parameters["reduction"].default == "mean"


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.startswith("objectives.") and n != "objectives.preset"])
def test_objectives_are_all_called_alike(name):
    taken = [p.name for p in parameters(name)]
    assert taken[:4] == ["model", "views", "labels", "attack"]


# Words of errors and docstrings -----------------------------------------------------------------------------------


def docstring(name):
    return inspect.getdoc((PUBLIC | METHODS)[name]) or ""


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_name_every_argument_and_no_other(name):
    section = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", docstring(name), re.DOTALL | re.MULTILINE)
    described = re.findall(r"^    \**(\w+):", section[1], re.MULTILINE) if section else []
    assert described == [p.name for p in parameters(name)]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_what_comes_back_and_show_it(name):
    text = docstring(name)
    assert re.search(r"^(Returns|Yields):$", text, re.MULTILINE)
    assert re.search(r"^Examples:$", text, re.MULTILINE)
    assert text.count(">>> ") >= 2


@pytest.mark.parametrize("name", PUBLIC)
def test_the_first_line_says_what_it_is_in_one_sentence(name):
    first = docstring(name).splitlines()[0]
    assert first.endswith(".")
    assert len(first) <= 116
    assert not first.startswith(("Compute", "Computes", "This function", "Return", "Returns", "Calculate"))


# Nothing that waits for a device ----------------------------------------------------------------------------------

# Attributes that bring values to the host, or tie the code to one device.
WAITING = ("cuda", "cpu", "item", "tolist", "numpy", "nonzero")
ROOMS = (
    "losses",
    "attacks",
    "victims",
    "objectives",
    "divergences.py",
    "partitions.py",
    "_reduce.py",
    "threats",
    "_rounding.py",
)
ALLOWED = {
    ("victims/door.py", "tolist"): "the one read of an attack's validation; `validate=False` turns it off",
    ("victims/door.py", "cuda"): "asks whether a graph is being captured, in which case nothing is read",
    ("victims/in_step.py", "tolist"): "processes agree before each pass of a model that is sharded over several",
    ("attacks/training.py", "nonzero"): "only samples that are right have a margin to look for, so it must count them",
    ("threats/entries.py", "tolist"): "what a threat model is called and whether two are equal depends on its numbers",
    ("threats/kinds.py", "tolist"): "records are written when everything has been computed",
    ("threats/simplex.py", "nonzero"): "long rows on the CPU alone, where nothing is waited for and sorting costs more",
    ("threats/threat.py", "tolist"): "a threat of the user's own gets one generator of torch per sample",
    ("victims/twins.py", "cuda"): "captures a graph of the pass instead of running it",
    ("objectives/alignment.py", "nonzero"): "the mixed pass runs on the selected pairs only, so it must count them",
}


def files(*rooms):
    found = [PACKAGE / room for room in rooms]
    return [file for path in found for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def attributes(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno


@pytest.mark.parametrize("path", files(*ROOMS), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_waits_for_the_device(path):
    name = path.relative_to(PACKAGE).as_posix()
    for attribute, line in attributes(path):
        if attribute in WAITING and (name, attribute) not in ALLOWED:
            raise AssertionError(
                f"{name}:{line} uses `.{attribute}`: keep values on the device (masks, torch.where), "
                "so that a training step never waits for it"
            )


def test_every_exception_to_that_is_still_needed():
    used = {
        (path.relative_to(PACKAGE).as_posix(), attribute) for path in files(*ROOMS) for attribute, _ in attributes(path)
    }
    assert set(ALLOWED) <= used


@pytest.mark.parametrize("path", files(*ROOMS), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_imports_numpy_or_names_a_device(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        modules = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom)
            else []
        )  # fmt: skip
        assert not any(module.split(".")[0] == "numpy" for module in modules), "results would leave the device"
        if isinstance(node, ast.keyword) and node.arg == "device":
            assert not isinstance(node.value, ast.Constant), "the device is that of the tensors"


@pytest.mark.parametrize("path", files("losses", "divergences.py", "partitions.py"), ids=lambda path: path.stem)
def test_losses_neither_draw_nor_change_modes_nor_run_backward(path):
    forbidden = {
        "rand",
        "randn",
        "randint",
        "rand_like",
        "randn_like",
        "manual_seed",
        "train",
        "eval",
        "backward",
        "zero_grad",
    }
    found = {attribute for attribute, _ in attributes(path)} & forbidden
    assert not found


@pytest.mark.parametrize("path", files("."), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_stay_short_enough_to_read(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 600, "past about 400 lines a module becomes a package with the same import path"
