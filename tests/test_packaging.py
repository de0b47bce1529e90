"""One version, one sentence on how to install, workflows and templates that name what exists."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import perceptual_at

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs/includes/install.md").read_text(encoding="utf-8")
EXTRAS = set(
    re.findall(r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
)


def test_the_version_is_written_once_and_the_citation_agrees():
    assert 'dynamic = ["version"]' in PYPROJECT
    assert not re.search(r"^version =", PYPROJECT, re.MULTILINE)
    assert f"\nversion: {perceptual_at.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version = {{{perceptual_at.__version__}}}" in README


def test_how_to_install_is_said_once_and_shown_where_it_is_looked_for():
    assert INSTALL in README
    for page in ("docs/install.md", "docs/index.md"):
        assert '--8<-- "includes/install.md"' in (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", INSTALL, re.MULTILINE)) == EXTRAS


def test_nobody_is_told_to_install_from_an_index_that_does_not_have_it():
    files = [
        *(ROOT / "perceptual_at").rglob("*.py"),
        *(ROOT / "examples").glob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
    ]
    told = re.compile(r"""pip install\s+(-U\s+)?['"]?perceptual[-_]at\b""")
    assert [file.name for file in files if told.search(file.read_text(encoding="utf-8"))] == []


def test_the_wheel_is_tried_with_every_extra():
    calls = runpy.run_path(str(ROOT / "tools/try_wheel"))["CALLS"]
    assert set(calls) == EXTRAS | {"", "train,digits,plot"}
    for extra, call in calls.items():
        compile(call, extra, "exec")


def test_the_sdist_has_all_that_the_repository_has():
    included = re.findall(r'"/([^"]+)"', PYPROJECT.partition("[tool.hatch.build.targets.sdist]")[2].partition("\n[")[0])
    left_out = {".git", ".gitignore", ".ci", "pyproject.toml"}  # the last one is always in
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    for name in {line.partition("/")[0] for line in listed if line} - left_out:
        assert name in included or (name.endswith(".md") and "*.md" in included), name


def yaml(path):
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_call_what_exists(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [step["run"] for job in yaml(path)["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        for target in re.findall(r"\bmake ([\w-]+)", command):
            assert target in targets
        for file in re.findall(r"\b(?:tools|tests)/[\w.]+", command):
            assert (ROOT / file).exists(), file


def test_workflows_try_the_oldest_and_the_newest_that_are_supported():
    jobs = yaml(ROOT / ".github/workflows/ci.yml")["jobs"]
    assert {"lint", "tests", "docs", "wheel"} <= jobs.keys()
    tried = jobs["tests"]["strategy"]["matrix"]["include"]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]
    torch = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
    assert any(row["python"] == lowest and f"torch=={torch}." in row["torch"] for row in tried)
    newest = max(re.findall(r"Python :: (3\.\d+)", PYPROJECT), key=lambda version: int(version[2:]))
    assert any(row["python"] == newest and "torch torchvision" in row["torch"] for row in tried)


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem
)
def test_issue_templates_ask_for_what_a_report_needs(path):
    form = yaml(path)
    assert {"name", "description", "body"} <= form.keys()
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_a_commit_is_checked_by_what_lint_runs():
    hooks = [hook["entry"] for repo in yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    for tool in re.findall(r"^\t(\.venv/bin/(?:ruff \w+|mypy))", recipe, re.MULTILINE):
        assert any(hook.startswith(tool) for hook in hooks), tool


def test_release_notes_stop_where_versions_differ():
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools/release_notes"), "99.0.0"], capture_output=True, text=True, check=False
    )
    assert run.returncode
    assert perceptual_at.__version__ in run.stderr
