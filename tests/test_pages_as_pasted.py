"""What pages show runs as it is pasted: the first block on its own, the others below what is visible above them.

`test_docs` runs whole pages with their hidden set-up; here the hidden lines, which make a page smaller, are left out.
"""

import builtins
import functools
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
VISIBLE = re.compile(r'^```python(?: title="(?P<title>[^"\n]*)")?\n(?P<code>.*?)^```', re.MULTILINE | re.DOTALL)
LIBRARY = re.compile(r"needs (\w+)")


def visible(page):
    """The blocks of a page that a reader sees, as `(title, code)`."""
    return [(match["title"] or "", match["code"]) for match in VISIBLE.finditer(page.read_text(encoding="utf-8"))]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def first_blocks():
    """The first block of every page; what only two processes can run is left out."""
    firsts = [(page, *visible(page)[0]) for page in PAGES if visible(page)]
    return [
        pytest.param(title, code, id=name_of(page)) for page, title, code in firsts if not title.startswith("not run")
    ]


def missing_library(title):
    library = LIBRARY.match(title)
    if library:
        pytest.importorskip(library[1], reason=f"{library[1]} is no dependency; the page was run by hand with it")


@pytest.mark.slow
@pytest.mark.parametrize(("title", "code"), first_blocks())
def test_the_first_block_of_a_page_needs_nothing_else(title, code, tmp_path, monkeypatch):
    missing_library(title)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "<first block>", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize(("title", "code"), first_blocks())
def test_the_first_block_of_a_page_runs_in_a_fresh_interpreter(title, code, tmp_path):
    missing_library(title)
    run = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning:__main__", "-"],
        input=code, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def names(table):
    """The global names that a piece of code binds, and those it reads, also inside its functions."""
    bound, read = set(), set()
    for symbol in table.get_symbols():
        at_top = table.get_type() == "module"
        if (symbol.is_assigned() or symbol.is_imported()) and (at_top or symbol.is_declared_global()):
            bound.add(symbol.get_name())
        if symbol.is_referenced() and (at_top or symbol.is_global()):
            read.add(symbol.get_name())
    for child in table.get_children():
        inner_bound, inner_read = names(child)
        bound |= inner_bound
        read |= inner_read
    return bound, read


def unbound(blocks):
    """Names that blocks read and that no block up to there binds."""
    bound, missing = {*dir(builtins), "__name__", "__file__"}, []
    for code in blocks:
        here, read = names(symtable.symtable(code, "<block>", "exec"))
        bound |= here
        missing += sorted(read - bound)
    return missing


def test_names_that_nothing_binds_are_found():
    assert unbound(["import torch", "def f(a):\n    return torch.add(a, b)"]) == ["b"]
    assert unbound(["x = [i for i in range(3)]\nclass A:\n    size = len(x)"]) == []
    assert unbound(["for x in loader: pass", "loader = []"]) == ["loader"]


@pytest.mark.parametrize("page", [page for page in PAGES if visible(page)], ids=name_of)
def test_blocks_use_only_names_that_a_reader_has_seen(page):
    kinds = {LIBRARY.match(title)[1] for title, _ in visible(page) if LIBRARY.match(title)}
    for kind in kinds or {None}:
        keep = functools.partial(belongs, kind=kind)
        assert unbound([code for title, code in visible(page) if keep(title)]) == []


def belongs(title, kind):
    library = LIBRARY.match(title)
    return library is None or library[1] == kind
