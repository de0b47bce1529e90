# Everything runs in .venv, which is made on first use; nothing else of the machine is touched.
PYTHON ?= python3
RUN := .venv/bin/python
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo demo-short test lint docs figures clean

demo: .venv/ready
	$(RUN) examples/demo.py

demo-short: .venv/ready
	$(RUN) examples/demo.py --seeds 2 --epochs 2 --out outputs/demo-short

test: .venv/ready
	$(RUN) -m pytest

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: .venv/ready
	.venv/bin/mkdocs build --strict

figures: .venv/ready
	$(RUN) docs/figures/make.py

.venv/ready: pyproject.toml tools/setup
	PYTHON="$(PYTHON)" sh tools/setup
	touch $@

clean:
	rm -rf .venv .uv site outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
