"""The documentation: what it shows runs, every public name has its place, and the site needs no network."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import typing
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import perceptual_at

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r'^```python(?: title="needs (?P<needs>\w+)")?\n(?P<code>.*?)^```'
    r"|^<!-- setup(?: needs (?P<setup_needs>\w+))?\n(?P<setup>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)


def blocks(page, needs=None):
    """The code of a page in order, each on the lines it has there; hidden `<!-- setup -->` comments count.

    Blocks that need a library are given only if it is `needs`.
    """
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if (match["needs"] or match["setup_needs"]) in (None, needs):
            line = text.count("\n", 0, match.start()) + 1
            yield "\n" * line + (match["setup"] if match["code"] is None else match["code"])


def libraries(page):
    """What the titles on a page say that its blocks need."""
    return sorted(set(re.findall(r'^```python title="needs (\w+)"$', page.read_text(encoding="utf-8"), re.MULTILINE)))


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def run(page, folder, monkeypatch, needs=None):
    monkeypatch.chdir(folder)  # what a page writes stays out of the tree
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    namespace = {"__name__": "page"}
    try:
        for code in blocks(page, needs):
            exec(compile(code, name_of(page), "exec"), namespace)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name_of)
def test_code_on_the_page_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


OPTIONAL = [(page, needs) for page in PAGES for needs in libraries(page)]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of code that is not ours
@pytest.mark.parametrize(("page", "needs"), OPTIONAL, ids=[f"{name_of(page)}-{needs}" for page, needs in OPTIONAL])
def test_code_that_needs_a_library_runs(page, needs, tmp_path, monkeypatch):
    pytest.importorskip(needs, reason=f"{needs} is no dependency; the page was run by hand with it")
    run(page, tmp_path, monkeypatch, needs)


def test_every_python_block_is_run_or_says_why_not():
    for page in PAGES:
        for opening in re.findall(r"^```python(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.fullmatch(r'| title="(?:needs \w+|not run by the tests: .+)"', opening), (name_of(page), opening)


@functools.cache
def documented():
    """What the reference has a `:::` entry for, by its dotted path."""
    text = "\n".join(page.read_text() for folder in ("reference", "theory") for page in (DOCS / folder).rglob("*.md"))
    return {entry: resolve(entry) for entry in re.findall(r"^::: (\S+)", text, re.MULTILINE)}


def resolve(path):
    """The object at a dotted path; modules win over what their package calls by the same name."""
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return value
    raise AssertionError(path)


def public_names():
    """Every public name: `__all__` where there is one, else what a module outside the flat interface defines."""
    yield from ((perceptual_at.__name__, name) for name in perceptual_at.__all__)
    flat = {getattr(getattr(perceptual_at, name), "__module__", "") for name in perceptual_at.__all__}
    for info in pkgutil.iter_modules(perceptual_at.__path__, "perceptual_at."):
        inside = info.name == "perceptual_at.victims"  # a room of the library's own; `frozen` is its public face
        if info.name.rpartition(".")[2].startswith("_") or info.name in flat or inside:
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", None)
        if names is None:
            names = [
                name
                for name, value in vars(module).items()
                if not name.startswith("_")
                and (inspect.isfunction(value) or inspect.isclass(value))
                and value.__module__ == info.name
            ]
        yield from ((info.name, name) for name in names)


@pytest.mark.parametrize(("module", "name"), sorted(set(public_names())))
def test_every_public_name_has_a_reference_entry(module, name):
    value = getattr(importlib.import_module(module), name)
    entries = documented()
    if inspect.ismodule(value):
        page = DOCS / "reference" / f"{name}.md"
        assert page.exists()
        return
    found = [path for path, entry in entries.items() if entry is value and path.rpartition(".")[2] == name]
    assert found, f"put `::: {module}.{name}` on a page of docs/reference or docs/theory"


def test_the_index_of_the_reference_lists_every_public_name():
    index = loaded("reference_hook").index()
    for module, name in set(public_names()):
        if not inspect.ismodule(getattr(importlib.import_module(module), name)):
            assert f"[`{name}`]" in index, f"{module}.{name}"


def test_no_two_pages_have_one_title():
    titles = {}
    for page in DOCS.rglob("*.md"):
        heading = re.search(r"^# (.+?)(?: \{.*\})?$", page.read_text(), re.MULTILINE)
        if heading:
            titles.setdefault(heading[1].lower(), []).append(name_of(page))
    assert {title: pages for title, pages in titles.items() if len(pages) > 1} == {}
    labels = re.findall(
        r"^ +- ([^:\n]+): \S+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.MULTILINE
    )
    assert sorted(labels) == sorted(set(labels))


def test_every_reference_entry_exists():
    assert all(entry is not None for entry in documented().values())


def nav_files():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    return set(re.findall(r"[\w/.-]+\.md", re.sub(r"#.*", "", nav)))


@pytest.mark.parametrize("stem", sorted(p.stem for p in (ROOT / "perceptual_at/losses").glob("[!_]*.py")))
def test_every_loss_has_a_page_in_the_navigation(stem):
    page = DOCS / "losses" / f"{stem}.md"
    assert page.exists()
    assert f"losses/{stem}.md" in nav_files()
    headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert headings == [
        "The maths", "In your loop", "What it is not", "Paper and code", "Pitfalls", "API", "See also, cite",
    ]  # fmt: skip


def test_every_page_is_in_the_navigation():
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if p.parent.name != "includes"}
    assert pages - nav_files() == set()


def test_the_navigation_has_at_most_seven_tabs():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert 1 < len(re.findall(r"^  - ", nav, re.MULTILINE)) <= 7


def test_links_of_the_project_papers_lead_to_files():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), (page.name, target)


def test_examples_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"examples/\w+\.py", page.read_text()):
            assert (ROOT / name).exists(), (name_of(page), name)


WORDS = re.compile(r"\b([a-z_]\w*)=\"([^\"]+)\"")


def words_of(hint):
    """The words that an annotation allows, however deep they stand in it."""
    if typing.get_origin(hint) is typing.Literal:
        return {word for word in typing.get_args(hint) if isinstance(word, str)}
    return set().union(*(words_of(part) for part in typing.get_args(hint)))


def test_words_that_pages_give_to_keywords_are_taken_by_some_function():
    taken = {}
    for module, name in public_names():
        value = getattr(importlib.import_module(module), name)
        if inspect.isfunction(value) or inspect.isclass(value):
            for keyword, hint in typing.get_type_hints(value.__init__ if inspect.isclass(value) else value).items():
                taken.setdefault(keyword, set()).update(words_of(hint))
    seen = 0
    for page in PAGES:
        if page.parent.name == "migrate":  # those are words of others
            continue
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", prose):
            for keyword, word in WORDS.findall(code):
                if taken.get(keyword):
                    assert word in taken[keyword] or word == "bf16-mixed", (name_of(page), code)  # that is Lightning's
                    seen += 1
    assert seen > 50


def test_options_that_pages_name_are_those_of_the_command_line():
    package = importlib.import_module("perceptual_at.commands")
    names = [info.name for info in pkgutil.walk_packages(package.__path__, "perceptual_at.commands.")]
    rooms = [importlib.import_module(name) for name in names]
    groups = [value for room in rooms for value in vars(room).values() if dataclasses.is_dataclass(value)]
    known = {f"--{field.name.replace('_', '-')}" for group in groups for field in dataclasses.fields(group)}
    known |= {option.replace("--", "--no-", 1) for option in known} | {"--help", "--row"}
    others = {"--nproc-per-node", "--multi-gpu", "--num-processes", "--num-machines", "--main-process-ip", "--logdir",
              "--archive", "--seeds"}  # fmt: skip
    for name in ("how-to/train.md", "how-to/evaluate.md", "methods.md", "combining.md"):
        text = (DOCS / name).read_text(encoding="utf-8")
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*(?!\w)", text):
            assert option in known | others, (name, option)


# Results ----------------------------------------------------------------------------------------------------------


def loaded(name):
    """One of the build steps beside the pages."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_marks_of_results_are_known():
    known = {"files", *loaded("results_hook").TABLES}
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- results: (.*?) -->", page.read_text())]
    assert marks
    assert set(marks) <= known


def test_under_each_method_of_the_tables_stand_its_printed_rows():
    results, page = loaded("results_hook"), (DOCS / "methods.md").read_text()
    methods = results.PRINTED.findall(page)
    assert {"WA", "AWP", "MMA", "KD+SWA", "PIAT"} <= set(methods)
    for method in methods:
        assert results.printed(method).count("\n") > 1, method
    assert "| RAAT 2 | CIFAR-100 | Linf | ResNet-18 | 59.19 | 23.75 | 33.90 |" in results.printed("HAT")


def test_numbers_quoted_from_results_are_in_the_table():
    results, seen = loaded("results_hook"), 0
    for page in PAGES:
        for name, paragraph in re.findall(
            r"<!-- quoted from: (\w+) -->\n(.*?)\n\n", page.read_text() + "\n\n", re.DOTALL
        ):
            numbers = re.findall(r"\d+\.\d+", paragraph)
            assert numbers
            assert [number for number in numbers if number not in results.filled(name)] == [], name_of(page)
            seen += 1
    assert seen


def test_a_table_of_results_holds_what_the_file_holds(tmp_path):
    results = loaded("results_hook")
    assert results.filled("perception", folder=tmp_path) == results.filled("files", folder=tmp_path) == results.MISSING
    gap = {"n": 4, "success_mse": 0.25, "failure_mse": 0.5, "clean": 0.75, "robust": 0.5}
    run = {
        "data": "digits", "threat": "Linf(eps=0.15)", "seeds": 2, "epochs": 1,
        "perception": {"standard": gap, "PGD-AT": gap | {"failure_mse": None}},
        "groups": {"full": [[90.0, 60.0], [92.0, 60.0]]}, "thresholds": {"0.1": [[90.0, 60.0]]},
    }  # fmt: skip
    (tmp_path / "perception_gap.json").write_text(json.dumps(run))
    table = results.filled("perception", "../results/", tmp_path)
    assert "| standard | noise | 0.25 | 0.5 | 2.00 | 75.00 | 50.00 |" in table
    assert "| PGD-AT | PGD-20 | 0.25 | - | - | 75.00 | 50.00 |" in table
    assert table.endswith("[perception_gap.json](../results/perception_gap.json)")
    groups = results.filled("groups", folder=tmp_path).replace("\N{NO-BREAK SPACE}", " ")
    assert "| full | 91.00 ± 1.41 | 60.00 ± 0.00 |" in groups
    assert "| 0.1 | 90.00 | 60.00 |" in results.filled("thresholds", folder=tmp_path)
    assert results.filled("files", folder=tmp_path) == "- [perception_gap.json](results/perception_gap.json)"


def test_the_tables_of_the_subset_hold_what_the_file_holds(tmp_path):
    scores = [{"clean": 30.0, "pgd20": 20.0, "mean": 25.0, "nrr": 24.0, "share": share} for share in (1.0, 2.0)]
    run = {
        "data": "CIFAR-10", "images": {"train": 3, "select": 2, "test": 1}, "threat": "Linf", "seeds": 2, "epochs": 1,
        "runs": {"RAAT": scores}, "final": {"RAAT": scores[:1]}, "weights": {"1/16": scores},
        "verdicts": ["ahead."], "verdicts_final": ["behind."],
        "versions": {"torch": "2"}, "hardware": {"device": "cpu", "threads": 1}, "commit": "0123456789",
    }  # fmt: skip
    (tmp_path / "cifar10_subset.json").write_text(json.dumps(run))
    tables = {name: loaded("results_hook").filled(name, folder=tmp_path).replace("\N{NO-BREAK SPACE}", " ")
              for name in ("subset", "subset_final", "subset_weights")}  # fmt: skip
    assert "| RAAT | 30.00 ± 0.00 | 20.00 ± 0.00 | 25.00 ± 0.00 | 24.00 ± 0.00 |\n\n- ahead." in tables["subset"]
    assert "3 images to train on, 2 to choose `best` on, 1 to test on" in tables["subset"]
    assert "commit `0123456`" in tables["subset"]
    assert "| RAAT | 30.00 | 20.00 | 25.00 | 24.00 |\n\n- behind." in tables["subset_final"]
    assert "| 1/16 | 30.00 ± 0.00 | 20.00 ± 0.00 | 25.00 ± 0.00 | 24.00 ± 0.00 | 1.5 |" in tables["subset_weights"]


def test_the_tables_of_segmentation_hold_what_the_file_holds(tmp_path):
    def network(level):
        attacked = {"clean": level, "pgd": level - 10, "segpgd": level - 9, "cospgd": level - 12, "worst": level - 13}
        return {f"{name} {unit}": {"value": value} for name, value in attacked.items() for unit in ("pixels", "mIoU")}

    levels = {"PGD-AT": (50, 60), "PGD-AT + RPAT": (50, 60), "RAAT, per sample": (51, 61), "RAAT, per place": (51, 63)}
    run = {
        "settings": {"seeds": 2, "steps": 3, "attack_steps": 4, "canvases": 5},
        "where": {"torch": "2", "machine": "m", "threads": 1},
        "runs": {arm: [network(level) for level in both] for arm, both in levels.items()},
    }
    (tmp_path / "segmentation.json").write_text(json.dumps(run))
    scores, differences, attacks = (
        loaded("results_hook").filled(name, folder=tmp_path).replace("\N{NO-BREAK SPACE}", " ")
        for name in ("segmentation", "segmentation_differences", "segmentation_attacks")
    )
    assert "| PGD-AT | 55.00 ± 7.07 | 45.00 ± 7.07 | 46.00 ± 7.07 | 43.00 ± 7.07 | 42.00 ± 7.07 |" in scores
    assert "| RAAT, per sample, beside PGD-AT | **+1.00 ± 0.00** |" in differences
    assert "| RAAT, per place, beside PGD-AT | +2.00 ± 12.71 |" in differences
    assert "| RAAT, per place | +1.00 | -2.00 | +1.00 | -2.00 |" in attacks


def test_the_table_of_the_demo_in_the_readme_is_the_recorded_one():
    path = DOCS / "results" / "demo.json"
    table = loaded("results_hook").demo(json.loads(path.read_text())).partition("\n\n")[0]
    table = table.replace("\N{NO-BREAK SPACE}", " ")
    assert table in (ROOT / "README.md").read_text(), f"put this table into README.md:\n{table}"


def test_recorded_outputs_are_those_of_the_code_on_the_page():
    hook = loaded("outputs_hook")
    record = hook.read()
    assert record
    for name, outputs in record.items():
        text = (DOCS / name).read_text(encoding="utf-8")
        keys = {key for _, key in hook.blocks(text)}
        assert outputs.keys() <= keys, f"run `python docs/outputs_hook.py {name}`"
        assert hook.shown(text, outputs).count('```text title="prints"') == len(outputs)


def test_an_output_stands_under_the_code_that_printed_it():
    hook = loaded("outputs_hook")
    page = "```python\nx = 2\n```\n\n```python\nprint(x + 1)\n```\nend\n"
    outputs = hook.printed(page)
    assert hook.shown(page, outputs).endswith('```\n\n```text title="prints"\n3\n```\nend\n')
    assert hook.shown(page.replace("x = 2", "x = 3"), outputs) == page.replace("x = 2", "x = 3")


# The built site ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    for tool in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed; `uv pip install --group docs` brings it")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    assert "WARNING" not in build.stdout + build.stderr
    return folder


class Page(HTMLParser):
    """What a page loads, links to, and can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.assets, self.links, self.anchors, self.tags = [], [], set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("href") and given.get("rel") not in ("canonical", "prev", "next"):
            self.assets.append(given["href"])
        if tag != "a" and given.get("src"):
            self.assets.append(given["src"])
        if given.get("srcset"):
            self.assets += [part.split()[0] for part in given["srcset"].split(",")]


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_the_site_loads_nothing_from_the_network(site, pages):
    loaded = [asset for page in pages.values() for asset in page.assets]
    for sheet in site.rglob("*.css"):
        loaded += re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", sheet.read_text(encoding="utf-8"))
    assert loaded
    assert [asset for asset in loaded if re.match(r"(?:https?:)?//", asset)] == []


def test_every_asset_is_there(site, pages):
    for path, page in pages.items():
        for asset in page.assets:
            home = site if asset.startswith("/") else path.parent  # the page 404 is served from anywhere
            file = home / re.split("[?#]", asset)[0].lstrip("/")
            assert asset.startswith("data:") or file.exists(), (path.name, asset)


@pytest.mark.slow
def test_every_internal_link_and_anchor_resolves(pages):
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or path.name == "404.html":
                continue
            target, _, anchor = link.partition("#")
            target = (path.parent / target).resolve() if target else path
            target = target / "index.html" if target.is_dir() else target
            assert target in pages or (target.suffix in (".json", ".ipynb") and target.exists()), (path.name, link)
            assert not anchor or anchor in pages[target].anchors, (path.name, link)


@pytest.mark.slow
def test_mathematics_are_rendered(site, pages):
    assert sum("math" in page.tags for page in pages.values()) > 10
    for path in pages:
        text = re.sub(r"<(code|script|pre)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"\$[^$\n]*\\[a-z]+|\\\(|\\\[|\barithmatex\b", text), path.name


def test_the_mathematics_hook_refuses_what_it_cannot_typeset():
    pytest.importorskip("latex2mathml")
    hooks = loaded("hooks")
    assert "<mi>adv</mi>" in hooks.mathml(r"x_{\mathrm{adv}}", display=False)
    assert "<munder><mo" in hooks.mathml(r"\max_i x_i", display=True)
    with pytest.raises(ValueError, match="nosuchcommand"):
        hooks.mathml(r"\nosuchcommand x", display=False)
