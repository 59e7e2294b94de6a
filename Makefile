# Every target sets up what it needs in .venv on a fresh machine with Python >= 3.10 and a C++ compiler.
#   make test    PYTHON=python3.12 make test    MAX_JOBS=4 make build
# But for gpu-report: that takes a python3 whose torch sees a GPU as it is (GPU_PYTHON=... chooses another).
#
# Stamps under .venv/.stamps remember what is done: a changed requirement reinstalls, a changed C++ source rebuilds.

# A Python that is asked for gets an environment of its own: nothing is ever deleted to make room for it.
ifdef PYTHON
  VENV ?= .venv-$(notdir $(PYTHON))
else
  PYTHON := python3
  VENV ?= .venv
endif
PY     := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
CMAKE_BUILD := build/cmake

CXX_SOURCES    := $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS   := setup.py pyproject.toml $(wildcard _build_backend/*.py) $(CXX_SOURCES)
# The GPU report runs on the machine's own Python where its torch sees a GPU, else in .venv.
SYSTEM_PYTHON := $(shell command -v python3)
GPU_PYTHON    ?= $(shell $(or $(SYSTEM_PYTHON),false) -c 'import torch; exit(not torch.cuda.is_available())' 2> /dev/null \
                   && echo $(SYSTEM_PYTHON) || echo $(PY))
# Tools of the environment (ninja, cmake) are found without activating it.
export PATH := $(abspath $(VENV))/bin:$(PATH)

SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help build test test-python test-cpp emulation bench gpu-report demo examples lint format config clean distclean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: $(STAMPS)/build  ## set up .venv and build the extension in place

test: $(STAMPS)/nvcc lint test-cpp test-python  ## lint, C++ unit tests, Python tests

test-python: $(STAMPS)/build emulation
	$(PY) -m pytest --numprocesses auto --dist worksteal $(PYTEST_ARGS)

test-cpp: $(STAMPS)/cmake
	cmake --build $(CMAKE_BUILD) --target microkernel_test mixing_test emulation_test emulation_faults_test $(if $(MAX_JOBS),-j $(MAX_JOBS))
	ctest --test-dir $(CMAKE_BUILD) --output-on-failure

emulation: $(STAMPS)/cmake  ## the CUDA kernels for this host, which the Python tests run
	cmake --build $(CMAKE_BUILD) --target effens_cuda_emulation $(if $(MAX_JOBS),-j $(MAX_JOBS))

bench: $(STAMPS)/build  ## measure every op against its peers and print the report
	$(PY) -m bench.report $(BENCH_ARGS)

gpu-report:  ## on a machine with a GPU: build, test, check and measure, in parts that can be resumed
	@python=$(GPU_PYTHON); if [ "$$python" = "$(PY)" ]; then $(MAKE) build || exit; fi; \
	  echo "== $$python -m bench.gpu $(GPU_REPORT_ARGS)"; $$python -m bench.gpu $(GPU_REPORT_ARGS)

demo: $(STAMPS)/build  ## what every kind of ensemble costs and is worth: under five minutes
	$(PY) examples/cost_table.py $(DEMO_ARGS)

examples: $(STAMPS)/build  ## the other examples, one after the other
	$(PY) examples/forum_ensembles.py $(FORUM_ARGS)
	$(PY) examples/batchensemble_mlp.py $(BATCHENSEMBLE_ARGS)
	$(PY) examples/layer_ensembles.py $(LAYER_ENSEMBLE_ARGS)
	$(PY) examples/mixture_ensembles.py $(MIXTURE_ARGS)
	$(PY) examples/rl_critics.py $(RL_ARGS)

lint: $(STAMPS)/requirements  ## ruff and clang-format, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(STAMPS)/requirements  ## ruff and clang-format, rewriting files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

config: $(STAMPS)/build  ## what is built, what runs here, and why not
	$(PY) -m effens_kernels

clean:  ## remove builds, keep .venv
	rm -rf build dist *.egg-info effens_kernels/*.so .pytest_cache .ruff_cache
	rm -f $(STAMPS)/build $(STAMPS)/cmake

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; choose another, e.g. PYTHON=python3.12 make test"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "make: $(PYTHON) cannot create environments; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || \
	  { echo "make: no C++ compiler; on Debian or Ubuntu: sudo apt-get install g++"; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requirements: requirements-dev.txt $(STAMPS)/venv
	@echo "== installing requirements-dev.txt into $(VENV) (torch is large: minutes on a slow line)"
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The tests read what nvcc makes of the CUDA kernels: a machine without it gets the one on PyPI.
$(STAMPS)/nvcc: requirements-cuda.txt $(STAMPS)/requirements
	@$(PY) -c 'import sys; sys.path.insert(0, "_build_backend"); import toolchain; sys.exit(not toolchain.find_nvcc())' \
	  || $(PY) -m pip install --disable-pip-version-check -r requirements-cuda.txt
	@touch $@

$(STAMPS)/cmake: $(STAMPS)/requirements CMakeLists.txt
	cmake -S . -B $(CMAKE_BUILD) -G Ninja -DPython_EXECUTABLE=$(abspath $(PY)) > $(STAMPS)/cmake.log || { cat $(STAMPS)/cmake.log; exit 1; }
	@touch $@

$(STAMPS)/build: $(STAMPS)/requirements $(BUILD_INPUTS)
	@echo "== building the extension in place"
	@# pip says nothing while it compiles; its log has ninja's steps, of which the file names are shown.
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -v -e . 2>&1 \
	  | tee $(STAMPS)/build.log | sed -unE 's/^ *(\[[0-9]+\/[0-9]+\]).* -c ([^ ]+).*/\1 \2/p' \
	  || { tail -n 100 $(STAMPS)/build.log; exit 1; }
	@touch $@
