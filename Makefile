# Two commands matter: `make demo` and `make test`. Each does all of its own set-up and can be run again at no cost.
PYTHON ?= python3
VENV ?= .venv
# Another place for torch, such as a CUDA build: make demo TORCH="torch==2.13.0 --index-url https://..."
TORCH ?= torch==2.13.0
# Test processes, each of one thread.
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-services check format docs world clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "opd needs Python 3.11 or newer; set PYTHON="; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/opd demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -m "not services" $(ARGS)

test-services: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m services $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format src tests bench
	$(BIN)/ruff check --fix src tests bench

docs: $(READY)
	$(BIN)/python docs/generate.py

world: $(READY)
	$(BIN)/python -m opd.world.make --seed 0 --out src/opd/world/assets

clean:
	rm -rf $(VENV) runs build *.egg-info
