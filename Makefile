# Every target sets up what it needs: .venv, then torch, then Weft. Needs GNU make and Python 3.11 or newer.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)
# Enough for two cores; tests themselves use one thread each.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: quickstart quickstart-text test test-slow test-gpu check bench bench-gpu clean

quickstart: .venv/ready-run
	$(BIN)/torchrun --nproc-per-node=4 -m weft train digits_vlm plan=plans/digits_colocated.yaml

quickstart-text: .venv/ready-run
	$(BIN)/weft train stdlib_lm
	$(BIN)/weft compare runs/stdlib_lm/export runs/stdlib_lm --prompt "def main("

test: .venv/ready-dev
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow and not gpu"

test-slow: .venv/ready-dev
	$(PYTEST) -m "slow and not gpu"

test-gpu: .venv/ready-dev
	$(PYTEST) -m gpu -rs

check: .venv/ready-dev
	$(BIN)/python tools/check

bench: .venv/ready-dev
	$(BIN)/python benchmarks/hybrid_vs_transformers.py
	$(BIN)/python benchmarks/block_overhead.py
	$(BIN)/python benchmarks/store_vs_fsdp2.py
	$(BIN)/python benchmarks/async_save.py
	$(BIN)/python benchmarks/pipeline_vs_torch.py
	$(BIN)/python benchmarks/moe_vs_transformers.py
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/routes.py
	$(BIN)/python benchmarks/balance.py
	$(BIN)/python benchmarks/boundary.py
	$(BIN)/python benchmarks/multimodal.py

bench-gpu: .venv/ready-dev
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv build runs .pytest_cache .hypothesis .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch is installed alone and first, so that nothing else chooses its build.
.venv/ready-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Weft needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "this Python cannot make environments; install its venv module (Debian: python3-venv)"; exit 1; }
	@echo "installing torch into .venv"
	@$(PIP) "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@touch $@

.venv/ready-run: .venv/ready-torch pyproject.toml
	@echo "installing Weft into .venv"
	@$(PIP) -c constraints.txt -e '.[hf,digits]'
	@touch $@

.venv/ready-dev: .venv/ready-torch pyproject.toml
	@echo "installing Weft and its development tools into .venv"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
