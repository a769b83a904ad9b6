# make train   set up and run the embedded job (any CPU)
# make test    set up and run the whole test suite
# make check   lint and format
# make bench   benchmarks that run on this machine; without a GPU those of kernels print a model's figures
# make gpu     tests and benchmarks of kernels on a GPU, into bench/results
#
# A machine with an NVIDIA GPU gets the CUDA build of the same torch version when its index serves that one. To take
# torch from another index: make train PIP="pip --index-url URL".

PYTHON ?= python3
VENV ?= .venv
PIP ?= pip
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: train test check format bench gpu clean

train: $(VENV)/.train
	$(BIN)/python -m fastrl.train $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cu csrc/*.h

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cu csrc/*.h

bench: $(VENV)/.test
	$(BIN)/python bench/bench_step.py
	$(BIN)/python bench/bench_grading.py
	$(BIN)/python bench/bench_linear_policy_loss.py
	$(BIN)/python bench/bench_flat_update.py

# PYTHON_GPU: an environment that has torch for CUDA, Triton, pytest and this package
PYTHON_GPU ?= $(BIN)/python
KERNEL_TESTS = linear_logprob linear_policy_loss policy_loss apo_loss selective_logprob flat_update kernels_parity ops
RESULT = bench/results/$(1)_$$(date +%F)_gpu_$$(git rev-parse --short HEAD 2>/dev/null || echo unknown).json

gpu:
	$(PYTHON_GPU) -m pytest -q $(KERNEL_TESTS:%=tests/test_%.py)
	$(PYTHON_GPU) bench/bench_linear_policy_loss.py --out $(call RESULT,linear_policy_loss)
	$(PYTHON_GPU) bench/bench_flat_update.py --out $(call RESULT,flat_update)

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
