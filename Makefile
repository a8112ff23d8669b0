PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup demo test test-slow lint docs picture bench clean

setup: $(READY)

# torch goes first and pinned: resolved as somebody's dependency it would fetch another build.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "TRL 1.16 needs Python 3.11 or newer; make PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' requirements.lock)"
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/alignctl dpo demo-dpo --overwrite

test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: setup
	$(BIN)/python scripts/document.py

picture: setup
	$(BIN)/alignctl dpo demo-dpo --overwrite
	$(BIN)/alignctl eval runs/demo-dpo
	chromium --headless=new --no-sandbox --hide-scrollbars --window-size=1120,1480 \
		--screenshot=docs/report.png runs/demo-dpo/report.html

bench: setup
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python benchmarks/pairs.py --method dpo --small
	$(BIN)/python benchmarks/pairs.py --method orpo --small

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
