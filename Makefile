# Everything here sets itself up: a virtual environment in .venv, the dependencies, the native build.
#
#   make demo       train on real digits, draw samples to out/demo        make test       the tests (20 minutes on 2 cores)
#   make install    set up only                                           make test-cpp   of the C++, with sanitizers
#   make lint       ruff, mypy, clang-format                              make test-all   these, and the slow ones
#   make bench      diffkern against eager PyTorch and others, to $(OUT)  make gpu-check  GPU tests and benchmarks, to $(OUT)
#   make docs       the documentation, into out/site      make aot        all Triton kernels compiled for three GPUs
#
#   VENV=DIR        the virtual environment; VENV= (empty) uses the Python at hand with what it holds
#   PYTHON=python3  the Python that makes the virtual environment
#   TORCH_INDEX=URL the package index that torch is taken from, for example one of CPU-only wheels

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
OUT ?= out
# torch's builds for CUDA bring the Triton they need; beside others this one interprets and compiles kernels.
TRITON := 3.6.0

CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')
SOURCES := setup.py pyproject.toml CMakeLists.txt $(filter-out csrc/tests/%,$(CPP))

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  CLANG_FORMAT := clang-format
  # What is installed is so for one Python; cmake and ninja may be packages of it.
  STATE := build/at-hand/$(shell $(PY) -c 'import sys; print((sys.implementation.cache_tag + sys.prefix).replace("/", "-"))')
  export PATH := $(shell $(PY) -c 'import os, sys; print(os.path.dirname(sys.executable))'):$(PATH)
  DEPENDENCIES :=
  DOCS_TOOLS :=
else
  PY := $(VENV)/bin/python
  CLANG_FORMAT := $(VENV)/bin/clang-format
  STATE := $(VENV)
  DEPENDENCIES := $(STATE)/dependencies.stamp
  DOCS_TOOLS := $(STATE)/docs.stamp
endif
COMMA := ,
BUILT := $(STATE)/built.stamp

.PHONY: install demo test test-cpp test-all lint format aot bench gpu-check docs clean
.DELETE_ON_ERROR:

install: $(BUILT)

$(VENV)/dependencies.stamp: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PY) -m pip install --quiet -c constraints.txt 'setuptools>=77' 'pybind11>=2.13' ninja
	PYTHONWARNINGS=ignore DIFFKERN_SKIP_NATIVE=1 $(PY) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --no-deps -c constraints.txt denoising-diffusion-pytorch k-diffusion
	$(PY) -c 'import triton' 2> /dev/null || $(PY) -m pip install --quiet triton==$(TRITON) \
	  || echo 'No Triton for this machine: the tests of its kernels will be skipped.'
	touch $@

$(BUILT): $(DEPENDENCIES) $(SOURCES)
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	mkdir -p $(STATE) && touch $@

demo: install
	$(PY) -m benchmarks.demo --out out/demo

# Files side by side. Threads that wait for others sleep: there are more of them than processors.
test: JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
test: install
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu"

# $(1) names the build folder, $(2) the sanitizers. CMake and ninja are the virtual environment's, where it has them.
define sanitized
	if [ ! -e build/ctest-$(1)/CMakeCache.txt ] && command -v ninja > /dev/null; then export CMAKE_GENERATOR=Ninja; fi; \
	cmake -S . -B build/ctest-$(1) -DDIFFKERN_TESTS=ON -DDIFFKERN_WERROR=ON -DDIFFKERN_SANITIZE=$(2) > /dev/null
	cmake --build build/ctest-$(1) --parallel $(CORES)
	ctest --test-dir build/ctest-$(1) --output-on-failure --parallel $(CORES)
endef

test-cpp: CORES := $(shell getconf _NPROCESSORS_ONLN)
ifneq ($(strip $(VENV)),)
test-cpp: export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
test-cpp:
	$(call sanitized,asan,address$(COMMA)undefined)
	$(call sanitized,tsan,thread)

test-all: test-cpp install
	$(PY) -m pytest -m "not gpu"

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

bench: install
	$(PY) -m diffkern bench --out $(OUT)

aot: install
	$(PY) -m benchmarks.ahead_of_time --out $(OUT)/ahead-of-time

gpu-check: install
	$(PY) -m benchmarks.gpu_check --out $(OUT) --command 'make gpu-check VENV=$(VENV)'

$(VENV)/docs.stamp: $(DEPENDENCIES)
	PYTHONWARNINGS=ignore DIFFKERN_SKIP_NATIVE=1 $(PY) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS_TOOLS)
	$(PY) -m mkdocs build --strict

clean:
	rm -rf build out diffkern/_cpu*.so diffkern/_build_failure.txt $(if $(strip $(VENV)),$(VENV)/*.stamp)
