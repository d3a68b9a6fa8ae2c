# Each target sets up what it needs on a bare machine: a virtual environment in .venv, and the installation.
PYTHON ?= python3
RUN := .venv/bin/python -m

# A process of tests takes one core; each begins with half of the files, so what the tests of a file start is mostly shared.
PYTEST := $(RUN) pytest --numprocesses 2 --dist worksteal

.PHONY: demo test test-slow test-gpu test-oldest check docs clean

demo: .venv/installed  ## train the default experiment on the embedded pictures
	$(RUN) repr.fit

test: .venv/installed-dev  ## run the default tests
	$(PYTEST)

test-slow: .venv/installed-dev  ## run the tests that take long
	$(PYTEST) -m slow

test-gpu: .venv/installed-dev  ## run the tests that need a GPU; docs/gpu.md says how without a network
	$(PYTEST) --numprocesses 4 -m gpu

test-oldest: .venv/installed-dev  ## test the exports with the oldest open_clip and timm that pyproject.toml allows
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/oldest \
		$$(grep -oE '(open-clip-torch|timm)>=[0-9.]+' pyproject.toml | sed 's/>=/==/')
	PYTHONPATH=$(CURDIR)/.venv/oldest $(RUN) pytest tests/export/test_round_trips.py

check: .venv/installed-dev  ## ruff, mypy, import-linter
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	.venv/bin/lint-imports

docs: .venv/installed-dev  ## write the site to docs/_build/html; a warning is an error
	$(RUN) sphinx --jobs 2 --fail-on-warning --keep-going --quiet --builder html \
		--doctree-dir docs/_build/doctrees docs docs/_build/html
	@! grep --recursive --include='*.html' -E '<(script|link|img)[^>]*"https?:' docs/_build/html  # it works without a network
	@echo "written: docs/_build/html/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "repr needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing repr and PyTorch into .venv (a few GB, one to three minutes) ..."
	@$(RUN) pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "installing repr, PyTorch and the test tools into .venv (a few GB, one to three minutes) ..."
	@$(RUN) pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@# Only its metrics are used, as a peer; what it depends on (Java programs, transformers) they do not need.
	@$(RUN) pip install --quiet --disable-pip-version-check --no-deps clip-benchmark
	@touch $@ .venv/installed

clean:
	rm -rf .venv
