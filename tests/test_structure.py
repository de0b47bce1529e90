"""The shape of the package: imports without circles, geometry in one room, functions and rooms of a size to read."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from perceptual_at import Linf, pgd

PACKAGE = Path(__file__).parents[1] / "perceptual_at"
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_of(path): path for path in SOURCES}


def imported(tree):
    """The package's modules that a module imports when it is itself imported."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("perceptual_at"):
            for alias in statement.names:
                whole = f"{statement.module}.{alias.name}"
                yield whole if whole in NAMES else statement.module
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names if alias.name in NAMES)


def test_imports_have_no_circle():
    # A package's own `__init__` gathers what is below it; that is no arrow of its own.
    arrows = {
        name: {other for other in imported(SOURCES[path]) if other != name and other != "perceptual_at"}
        for name, path in NAMES.items()
        if name != "perceptual_at"
    }
    left = dict(arrows)
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


BELOW = {
    "options": set(),
    "ingredients": {"options"},
    "training": {"options", "ingredients", "endings"},
    "evaluating": {"options", "ingredients", "endings"},
}


@pytest.mark.parametrize("room", sorted(path.name for path in (PACKAGE / "commands").iterdir() if path.is_dir()
                                        and path.name != "__pycache__"))  # fmt: skip
def test_rooms_of_the_command_line_know_only_what_is_below_them(room):
    for path in (PACKAGE / "commands" / room).rglob("*.py"):
        known = {name.split(".")[2] for name in imported(SOURCES[path]) if name.startswith("perceptual_at.commands.")}
        assert known <= BELOW[room] | {room}, path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_geometry_is_asked_of_the_threat(path):
    if path.is_relative_to(PACKAGE / "threats"):
        return
    asked = [
        ast.unparse(node)
        for node in ast.walk(SOURCES[path])
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("isinstance", "type")
        and "threat" in ast.unparse(node)
        and any(kind in ast.unparse(node) for kind in ("Linf", "L2", "L1"))
    ]
    assert asked == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_is_private_takes_ten_arguments_at_most(path):
    for node in ast.walk(SOURCES[path]):
        if not isinstance(node, ast.FunctionDef):
            continue
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        documented = not node.name.startswith("_") and "Args:" in (ast.get_docstring(node) or "")
        overloaded = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
        assert documented or overloaded or len([a for a in given if a.arg != "self"]) <= 10, (node.name, node.lineno)


MADE = {
    f"torch.{name}"
    for name in (
        "arange",
        "as_tensor",
        "empty",
        "eye",
        "full",
        "linspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
    )
} | {"torch.tensor", "torch.zeros"}
ELSEWHERE = ("commands", "models")  # a process of its own, and weights, which belong on the caller's default device


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_tensors_are_made_on_a_device_that_is_said(path):
    if path.relative_to(PACKAGE).parts[0] in ELSEWHERE:
        return
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in MADE:
            assert "device" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}: {ast.unparse(node)}"


def test_the_attacks_are_few_files():
    assert len(list((PACKAGE / "attacks").glob("*.py"))) <= 13


def test_a_default_attack_is_read_in_one_sitting():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))
    x, labels, threat = torch.rand(4, 3, 8, 8), torch.arange(4), Linf(8 / 255)
    entered = set()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            entered.add((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        pgd(model, x, labels, threat)
    finally:
        sys.setprofile(before)
    assert len(entered) <= 30, sorted(entered)
    assert len({file for file, *_ in entered}) <= 7


def test_names_of_tests_hold_no_addresses(request):  # processes that share the tests have to find the same ones
    assert [item.nodeid for item in request.session.items if " at 0x" in item.nodeid] == []
