# Each target sets up what it needs on a bare machine: a virtual environment in .venv, and the installation.
PYTHON ?= python3
RUN := .venv/bin/python -m

# A process of tests takes one core; each begins with half of the files, so what the tests of a file start is mostly shared.
PYTEST := $(RUN) pytest --numprocesses 2 --dist worksteal

.PHONY: demo test test-slow test-gpu test-oldest test-loggers check docs release-notes clean

demo: .venv/installed  ## train the default experiment on the embedded pictures
	$(RUN) repr.fit

test: .venv/installed-dev  ## run the default tests
	$(PYTEST)

test-slow: .venv/installed-dev  ## run the tests that take long
	$(PYTEST) -m slow

test-gpu: .venv/installed-dev  ## run the tests that need a GPU; docs/gpu.md says how without a network
	$(PYTEST) --numprocesses 4 -m gpu

# The oldest versions that pyproject.toml allows of some packages, in a folder that comes before the installed ones.
oldest = $$(grep -oE '"($(1))>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/')

test-oldest: .venv/installed-dev  ## test objectives, runs and exports with the oldest PyTorch, Lightning, open_clip and timm
	$(RUN) pip install --quiet --disable-pip-version-check --upgrade --target .venv/oldest \
		$(call oldest,torch|torchvision|lightning|open-clip-torch|timm)
	PYTHONPATH=$(CURDIR)/.venv/oldest $(RUN) pytest tests/losses/test_exchange.py \
		tests/objectives/test_every_objective.py::test_a_step_is_finite_and_reaches_every_parameter \
		tests/test_optim.py tests/test_fit.py tests/training/test_checkpoint.py tests/export/test_round_trips.py

test-loggers: .venv/installed-dev  ## by hand: the loggers of other libraries, in an environment of their own
	$(RUN) venv .venv/loggers
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$(.venv/loggers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth
	.venv/loggers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[loggers]'
	.venv/loggers/bin/python -m pytest tests/training/test_loggers.py

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

release-notes:  ## print what CHANGELOG.md says of the newest version
	@awk '/^## / { if (n++) exit } n' CHANGELOG.md

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
	@# s3fs comes first, or pip from 25 on tries all releases of what it and moto want of boto3, and does not end.
	@$(RUN) pip install --quiet --disable-pip-version-check s3fs --editable '.[dev]'
	@# Only its metrics are used, as a peer; what it depends on (Java programs, transformers) they do not need.
	@$(RUN) pip install --quiet --disable-pip-version-check --no-deps clip-benchmark
	@touch $@ .venv/installed

clean:
	rm -rf .venv
