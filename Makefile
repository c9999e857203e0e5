# Everything runs in .venv, which make creates. `make` alone lists the targets.
# Other choices: make test PYTHON=python3.12 TORCH="torch==2.12.0" ARGS="-k packed"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
CUDA_ARCHS ?= 80 90 100 120

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The build finds ninja on PATH and takes its number of jobs from MAX_JOBS.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MAX_JOBS ?= $(JOBS)

# Folders too: a file that was deleted changes its folder.
CSRC := $(shell find csrc)
PYTHON_FILES := setup.py torchrnn $(wildcard tests bench examples)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips at once in one environment damage it.
.NOTPARALLEL:
.PHONY: help demo examples test test-slow check format bench bench-peers nvcc-check clean distclean

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
FALLBACK_TESTS := $(addprefix tests/test_,$(addsuffix .py,parity ops native modules sequences cells errors convert scan dropout))

test: $(VENV)/.with-test build/.extension ## Run the tests (about seven minutes on two cores); ARGS goes to pytest.
	@$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)
	@TORCHRNN_PURE=1 $(BIN)/python -m pytest -q -n $(JOBS) $(FALLBACK_TESTS) $(ARGS)

test-slow: $(VENV)/.with-test build/.extension ## Run the full grids and long runs.
	@$(BIN)/python -m pytest -q -n $(JOBS) -m slow $(ARGS)

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
	@$(BIN)/python setup.py build_ext --inplace --force >build/extension.log 2>&1 || \
	  { cat build/extension.log; exit 1; }
	@grep -A 4 'warning:' build/extension.log || true
	@touch $@

# The headers that the CPU and CUDA share must compile for the device without a warning, also where there is no GPU.
# The kernels of csrc/cells/nvcc_check.cu instantiate every cell.
NVCC := $(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc))
NVCC_FLAGS := -std=c++20 -Icsrc -Werror all-warnings -Xptxas -warn-spills \
  $(foreach arch,$(CUDA_ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch))
HOST_ONLY := csrc/cells/vec.h
DEVICE_HEADERS := $(filter-out $(HOST_ONLY),$(wildcard csrc/params.h csrc/scan_params.h csrc/cells/*.h))
DEVICE_SOURCES := $(wildcard csrc/cells/nvcc_check.cu)

nvcc-check: ## Compile the shared headers with nvcc; without nvcc it says so and passes.
ifeq ($(NVCC),)
	@echo "nvcc-check: not run (no nvcc)"
else
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	for header in $(DEVICE_HEADERS:csrc/%=%); do echo "#include \"$$header\""; done >"$$folder/headers.cu" && \
	for source in $$folder/headers.cu $(DEVICE_SOURCES); do \
	  $(NVCC) $(NVCC_FLAGS) -c "$$source" -o "$$folder/object.o" || exit 1; \
	done
	@echo "nvcc-check: $(words $(DEVICE_HEADERS)) headers, $(words $(DEVICE_SOURCES)) sources, sm: $(CUDA_ARCHS)"
endif
