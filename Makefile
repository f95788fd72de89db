# Two commands do everything from a clean clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0
unexport PYTHONDONTWRITEBYTECODE  # it costs every Ray worker some 20 s of imports

.PHONY: install demo serve check test coverage test-fast test-slow docs wheel

install: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

demo: install
	$(BIN)/brainray demo

serve: install
	$(BIN)/brainray serve

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes, because a test that waits for Ray, a service or a browser leaves a core idle. Each
# takes the next file in the order of tests/conftest.py.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: check
	$(BIN)/python -m pytest $(PARALLEL)

coverage: install
	$(BIN)/python -m pytest $(PARALLEL) --cov brainray --cov-report term

test-fast: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not (slow or ray or browser or service or heavy)"

test-slow: install
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m "slow or hypothesis"

.venv/.docs-installed: docs/requirements.lock .venv/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r docs/requirements.lock
	touch $@

docs: .venv/.docs-installed
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --jobs auto --quiet docs build/docs
	@echo "open build/docs/index.html"

wheel: install
	.ci/wheel
