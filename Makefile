# Everything runs in .venv, which make creates. `make` alone lists the targets.
# Other choices: make test PYTHON=python3.12 TORCH="torch==2.12.0" ARGS="-k packed"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The build finds ninja on PATH and takes its number of jobs from MAX_JOBS.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MAX_JOBS ?= $(JOBS)

# Folders too: a file that was deleted changes its folder.
CSRC := $(shell find csrc)
PYTHON_FILES := setup.py torchrnn $(wildcard tests bench examples gpu)
CXX_FILES := $(filter %.h %.cpp %.cu,$(CSRC) $(wildcard tests/cuda/* gpu/*))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips at once in one environment damage it.
.NOTPARALLEL:
.PHONY: help demo examples test test-slow fuzz check format bench bench-peers cuda-check gpu clean distclean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.with-demo build/.extension ## Train a small classifier of digits and compare it with torch.nn.
	@$(BIN)/python examples/digits.py $(ARGS)

EXAMPLES := manual_loop stacked_lstm sentences digit_rows char_rnn

examples: $(VENV)/.with-demo build/.extension ## Train small models as they were written in TensorFlow 1.
	@for name in $(EXAMPLES); do \
	  echo "== $$name" && $(BIN)/python examples/$$name.py --epochs 3 --hidden 48 $(ARGS) || exit 1; \
	done

# Twice: with the kernels, and without them, so that every op takes its fallback.
FALLBACK_TESTS := $(addprefix tests/test_,$(addsuffix .py,parity ops native modules sequences cells errors convert scan dropout empty inplace recompute))

# Tests of the CUDA sources that need a compiler for the host and no GPU: they are a part of cuda-check.
HOST_TESTS := $(wildcard tests/test_cuda_*.py tests/cuda/test_*.py)

test: $(VENV)/.with-test build/.extension ## Run the tests but those of cuda-check (fifteen minutes on two cores); ARGS goes to pytest.
	@status=0; \
	$(BIN)/python -m pytest -q -n $(JOBS) $(addprefix --ignore=,$(HOST_TESTS)) $(ARGS) || status=1; \
	TORCHRNN_PURE=1 $(BIN)/python -m pytest -q -n $(JOBS) $(FALLBACK_TESTS) $(ARGS) || status=1; \
	exit $$status

test-slow: $(VENV)/.with-test build/.extension ## Run the full grids and long runs.
	@$(BIN)/python -m pytest -q -n $(JOBS) -m slow $(ARGS)

CALLS ?= 20000

fuzz: $(VENV)/.with-test build/.extension ## Call the ops at random, CALLS times (20000), and count crashes and wrong results.
	@$(BIN)/python tests/fuzz_ops.py --calls $(CALLS) --jobs $(JOBS) $(ARGS)

check: $(VENV)/.with-dev ## Check formatting, lint and types.
	$(BIN)/ruff format --quiet --check $(PYTHON_FILES)
	$(BIN)/ruff check --quiet $(PYTHON_FILES)
	$(BIN)/mypy --no-error-summary
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.with-dev ## Apply the formatters and the safe fixes of the linter.
	$(BIN)/ruff check --quiet --fix-only $(PYTHON_FILES)
	$(BIN)/ruff format --quiet $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.with-bench build/.extension ## Measure the speed against torch.nn; ARGS goes to the bench.
	@$(BIN)/python -m bench $(ARGS)

bench-peers: $(VENV)/.with-peers ## The same against ONNX Runtime and OpenVINO too, which it installs.
	@$(MAKE) --no-print-directory bench

clean: ## Remove what was built, and the caches.
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find torchrnn -name '*.so' -delete
	find torchrnn tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## Remove .venv as well.
	rm -rf $(VENV)

# The environment, in three steps: torch and the build tools; torchrnn and the extras of a target; the extension.
# torch comes first and with its version, so that no later step chooses another one.
$(VENV)/.with-torch:
	@echo "venv: $(TORCH) into $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install $(TORCH) 'setuptools>=77' ninja wheel
	@touch $@

# Pure here, because an editable install compiles everything in a temporary folder, each time anew.
$(VENV)/.with-%: $(VENV)/.with-torch setup.py pyproject.toml
	@echo "venv: torchrnn[$*]"
	@TORCHRNN_PURE=1 $(PIP) install --no-build-isolation --editable '.[$*]'
	@touch $@

# In place and incremental: ninja compiles only what has changed, so --force costs no more than the linking.
build/.extension: $(VENV)/.with-torch setup.py pyproject.toml $(CSRC)
	@echo "build: torchrnn._C, log in build/extension.log"
	@mkdir -p build
	@$(BIN)/python setup.py build_ext --inplace --force --build-temp build/objects >build/extension.log 2>&1 || \
	  { cat build/extension.log; exit 1; }
	@grep -A 4 'warning:' build/extension.log || true
	@touch $@

# The CUDA sources where there is no GPU. With nvcc they are compiled, as setup.py does it and without a warning,
# for each generation of GPUs that they are for; the library is linked, also to a torch without CUDA; and what
# its kernels take and its ops look like is compared with what they should. The headers of all cells compile for
# the device too: tests/cuda/cells_check.cu instantiates them.
NVCC := $(or $(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc))
CUDA_ARCHS := 8.0 9.0 10.0 12.0
CELL_HEADERS := $(filter-out csrc/cells/vec.h,$(wildcard csrc/params.h csrc/scan_params.h csrc/cells/*.h))
CELL_FLAGS := -std=c++20 -Icsrc -Werror all-warnings -Xptxas -warn-spills \
  $(foreach arch,$(subst .,,$(CUDA_ARCHS)),-gencode arch=compute_$(arch),code=sm_$(arch))

.PHONY: nvcc-check
ifeq ($(NVCC),)
nvcc-check:
	@echo "cuda-check: compilation not run (no nvcc)"
else
nvcc-check: $(VENV)/.with-test build/.extension
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	for header in $(CELL_HEADERS:csrc/%=%); do echo "#include \"$$header\""; done >"$$folder/headers.cu" && \
	for source in $$folder/headers.cu tests/cuda/cells_check.cu; do \
	  $(NVCC) $(CELL_FLAGS) -c "$$source" -o "$$folder/object.o" || exit 1; \
	done
	@echo "build: torchrnn._C_cuda for sm $(CUDA_ARCHS), log in build/cuda.log"
	@TORCHRNN_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" $(BIN)/python setup.py build_ext \
	  --build-temp build/objects --build-lib build/cuda >build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	@$(BIN)/python tests/cuda/registers.py build/objects/nvcc --nvcc $(NVCC)
	@TORCHRNN_PURE=1 $(BIN)/python tests/cuda/schemas.py build/cuda/torchrnn/_C_cuda.abi3.so csrc/cuda/*.cpp
endif

cuda-check: $(VENV)/.with-test build/.extension nvcc-check ## Check the CUDA sources without a GPU: all of it where there is nvcc.
	@$(BIN)/python -m pytest -q -n $(JOBS) $(HOST_TESTS) $(ARGS)

OUT ?= build/gpu
STAGE ?= all

gpu: ## On a machine with a GPU: build, test and measure there; STAGE is a part of it, results go to OUT.
	@PATH="$${PATH#$(CURDIR)/$(BIN):}" $(PYTHON) gpu/run.py --out $(OUT) --stage $(STAGE) $(ARGS)
