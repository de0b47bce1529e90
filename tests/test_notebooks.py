"""The notebooks are the tutorials, cell by cell, and run."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools/notebooks"))
PAGES = TOOL["PAGES"]


def written(page):
    return (ROOT / "docs/notebooks" / f"{Path(page).stem}.ipynb").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_a_notebook_is_what_its_page_says(page):
    assert written(page) == TOOL["notebook"](page), "run `python tools/notebooks`"
    text = "".join(line for cell in json.loads(written(page))["cells"] for line in cell["source"])
    assert not re.search(r"#only-|<!-- |^///|^!!!|\]\[perceptual_at|\]\(\.\./[^)]*\.md", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_notebook_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in json.loads(written(page))["cells"]:
        if cell["cell_type"] == "code":
            code = re.sub(r"^(SEED, EPOCHS, WIDTH) = .*$", r"\1 = 0, 1, 4", "".join(cell["source"]), flags=re.MULTILINE)
            exec(compile(code, page, "exec"), namespace)
