# make train   set up and run the embedded job (any CPU)
# make test    set up and run the whole test suite
# make check   lint and format
# make bench   benchmarks that run on this machine
#
# A machine with an NVIDIA GPU gets the CUDA build of the same torch version when its index serves that one. To take
# torch from another index: make train PIP="pip --index-url URL".

PYTHON ?= python3
VENV ?= .venv
PIP ?= pip
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: train test check format bench clean

train: $(VENV)/.train
	$(BIN)/python -m fastrl.train $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if ls csrc/*.cu csrc/*.h >/dev/null 2>&1; then clang-format --dry-run --Werror csrc/*.cu csrc/*.h; fi

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test
	$(BIN)/python bench/bench_step.py
	$(BIN)/python bench/bench_grading.py

# torch first and by exact version: a range would let pip take another build of it
$(VENV)/.train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(PIP) install --quiet $(TORCH)
	$(BIN)/python -m $(PIP) install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m $(PIP) install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist
