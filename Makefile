# make demo, make lint, make test and make test-all set up what they need on the first run and then do their job.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two targets at a time: while pip downloads, the sanitized C++ tests compile.
MAKEFLAGS += --no-builtin-rules -j2

PYTHON3 ?= python3
PYTHON3_OLDEST ?= $(PYTHON3)
JOBS ?= $(shell nproc)
WERROR ?= OFF

venv := .venv
python := $(venv)/bin/python
stamps := $(venv)/.stamps
venv_oldest := .venv-oldest
python_oldest := $(venv_oldest)/bin/python
stamps_oldest := $(venv_oldest)/.stamps
build := build-make
build_sanitized := build-sanitized
build_threads := build-threads
build_oldest := build-oldest
build_tools := 'scikit-build-core>=0.11' 'pybind11>=2.11' ninja

sources := $(shell find generator templates runtime python -type f -not -path '*/__pycache__/*') \
           CMakeLists.txt pyproject.toml README.md LICENSE
cpp_tests := $(shell find tests/cpp -type f)
formatted := $(filter %.cpp %.h %.cuh,$(sources) $(cpp_tests))

.PHONY: help setup demo lint test test-all test-threads test-oldest test-integrations wheels clean
help:
	@echo 'make demo      prebuild kernels for sm_75, run attention and a training step, compare them with float64'
	@echo 'make lint      clang-format, ruff and mypy: seconds'
	@echo 'make test      lint, build, C++ tests (plain and under sanitizers), Python tests'
	@echo 'make test-all  the same with the full grids, and ThreadSanitizer (alone: make test-threads), and the Python tests'
	@echo '               on the oldest torch that is supported (alone: make test-oldest)'
	@echo 'make test-integrations  transformers, diffusers, xformers ... as installed, each version in its own environment'
	@echo 'make wheels    wheels of every Python here from 3.10 to 3.14, with and without kernels for sm_75, into dist/'
	@echo 'make setup     only install what make test needs; make clean removes every build and virtual environment'

$(stamps)/system: tests/setup/system_packages.sh
	@echo '== system packages'
	@tests/setup/system_packages.sh $(PYTHON3)
	@mkdir -p $(@D) && touch $@

$(stamps)/venv: $(stamps)/system
	@echo '== $(venv)'
	@$(PYTHON3) -m venv $(venv)
	@$(python) -m pip install -q 'pip>=22.3' $(build_tools)
	@cmake --version >/dev/null 2>&1 || $(python) -m pip install -q 'cmake>=3.22'
	@touch $@

$(stamps)/torch: $(stamps)/venv tests/setup/install_torch.py pyproject.toml
	@echo '== torch'
	@$(python) tests/setup/install_torch.py pyproject.toml test
	@touch $@

# pip knows --group since 25.1.
$(stamps)/lint: $(stamps)/torch pyproject.toml
	@echo '== what lint runs'
	@$(python) -m pip install -q 'pip>=25.1'
	@$(python) -m pip install -q --group lint
	@touch $@

# The wheel's build folder is kept, so that only what changed is compiled again; it holds the C++ tests too. Where lint's
# tools are wanted as well they come first: an environment has one pip at a time.
$(stamps)/package: $(stamps)/torch $(sources) $(cpp_tests) | $(if $(filter setup test test-all,$(MAKECMDGOALS)),$(stamps)/lint)
	@echo '== build and install flash-attn-jit into $(venv) (log: $(build)/install.log)'
	@mkdir -p $(build)
	@PATH="$(abspath $(venv))/bin:$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(python) -m pip install -v \
	  --no-build-isolation -Cbuild-dir=$(build) -Ccmake.define.FLASH_ATTN_JIT_TESTS=ON \
	  -Ccmake.define.FLASH_ATTN_JIT_WERROR=$(WERROR) '.[test]' 2>&1 \
	  | tee $(build)/install.log \
	  | { grep --line-buffered -E '^ *(\[[0-9]+/[0-9]+\]|.*(warning|error):|CMake (Warning|Error)|Downloading|Successfully)' || true; } \
	  || { tail -n 60 $(build)/install.log; exit 1; }
	@touch $@

$(stamps)/sanitized: $(stamps)/venv $(sources) $(cpp_tests)
	@echo '== build the C++ tests under AddressSanitizer and UBSan'
	@PATH="$(abspath $(venv))/bin:$$PATH" cmake -S . -B $(build_sanitized) -G Ninja --log-level=WARNING \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=20 \
	  -DFLASH_ATTN_JIT_SANITIZE=ON -DFLASH_ATTN_JIT_WERROR=$(WERROR)
	@PATH="$(abspath $(venv))/bin:$$PATH" cmake --build $(build_sanitized) -j $(JOBS)
	@touch $@

# Each file alone, so that it is seen to include what it uses. The tests of what threads share: the cache, the
# compilers, the launch table. One test is left out: a process that ThreadSanitizer watches does not survive the signal of
# a file-size limit.
$(stamps)/threads: $(stamps)/package $(cpp_tests)
	@echo '== build the C++ tests under ThreadSanitizer'
	@PATH="$(abspath $(venv))/bin:$$PATH" cmake -S . -B $(build_threads) -G Ninja --log-level=WARNING \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFLASH_ATTN_JIT_SANITIZE_THREADS=ON -DFLASH_ATTN_JIT_WERROR=$(WERROR) \
	  -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON
	@PATH="$(abspath $(venv))/bin:$$PATH" cmake --build $(build_threads) -j $(JOBS) --target flash_attn_jit_tests
	@touch $@

define test_threads
@echo '== C++ tests under ThreadSanitizer'
@for test in kernel_cache cache_processes kernel_library devices host_compiler interrupt side_by_side \
  recorded_tiles autotune; do \
    TSAN_OPTIONS=suppressions=tests/setup/thread_sanitizer.txt $(build_threads)/flash_attn_jit_tests \
      --source-file="*/test_$$test.cpp" --test-case-exclude='*file-size limit*'; \
  done
endef

test-threads: $(stamps)/threads
	$(test_threads)

$(stamps_oldest)/venv: $(stamps)/venv
	@echo '== $(venv_oldest)'
	@$(PYTHON3_OLDEST) -c 'import sys; sys.exit(sys.version_info[:2] > (3, 12))' || { \
	  echo "The oldest torch has wheels for Python 3.10 to 3.12, and $(PYTHON3_OLDEST) is" \
	    "$$($(PYTHON3_OLDEST) --version): make ... PYTHON3_OLDEST=python3.12" >&2; \
	  exit 1; \
	}
	@$(PYTHON3_OLDEST) -m venv $(venv_oldest)
	@$(python_oldest) -m pip install -q 'pip>=25.1' $(build_tools)
	@mkdir -p $(@D) && touch $@

$(stamps_oldest)/torch: $(stamps_oldest)/venv tests/setup/install_torch.py pyproject.toml
	@echo '== the oldest torch'
	@$(python_oldest) tests/setup/install_torch.py pyproject.toml oldest
	@$(python_oldest) -m pip install -q --group oldest
	@touch $@

# Where both environments are of one Python, the wheel comes from the build that $(venv) has: its folder keeps the
# options that it was made with, and nothing is compiled.
version_of = $(shell $(1) -c 'import sysconfig; print(sysconfig.get_python_version())' 2>/dev/null)
one_python = $(filter $(call version_of,$(python)),$(call version_of,$(python_oldest)))
wheel_by = $(if $(one_python),$(python),$(python_oldest))
wheel_from = $(if $(one_python),$(build),$(build_oldest))
$(stamps_oldest)/package: $(stamps)/package $(stamps_oldest)/torch
	@echo '== install flash-attn-jit into $(venv_oldest)'
	@rm -rf $(wheel_from)/wheel
	@PATH="$(abspath $(venv))/bin:$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(wheel_by) -m pip wheel -q --no-deps \
	  --no-build-isolation -Cbuild-dir=$(wheel_from) -w $(wheel_from)/wheel .
	@$(python_oldest) -m pip install -q --no-deps --force-reinstall $(wheel_from)/wheel/*.whl
	@touch $@

setup: $(stamps)/lint $(stamps)/package

demo: $(stamps)/package
	@echo '== demo'
	@$(python) -m flash_attn_jit.demo
	@echo '== a tuning report, of what the model of a T4 predicts'
	@$(python) -m flash_attn_jit.report --demo

lint: $(stamps)/lint
	@echo '== clang-format, ruff and mypy'
	@$(venv)/bin/clang-format --dry-run --Werror $(formatted)
	@awk 'length > 120 && /^ *\/\/ [^ ]/ { print FILENAME ":" FNR ": more than 120 columns"; bad = 1 } END { exit bad }' \
	  $(formatted)
	@$(venv)/bin/ruff check --quiet
	@$(venv)/bin/ruff format --check --quiet
	@$(venv)/bin/mypy --python-executable $(python)

test-all: export FLASH_ATTN_JIT_TEST_ALL = 1
test-all: $(stamps_oldest)/package $(stamps)/threads
# Where the C++ tests find both NVRTCs.
test test-all: export FLASH_ATTN_JIT_TEST_SITE_PACKAGES = $(shell $(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)

test test-all: $(stamps)/sanitized lint $(stamps)/package
	$(if $(filter test-all,$@),$(test_threads))
	@echo '== C++ tests'
	@ctest --test-dir $(build) --output-on-failure -j $(JOBS)
	@echo '== C++ tests under AddressSanitizer and UBSan'
	@ctest --test-dir $(build_sanitized) --output-on-failure -j $(JOBS)
	@echo '== Python tests'
	@$(python) -m pytest -m 'not gpu' -n $(JOBS) --dist worksteal
	@echo '== a sample of the tests of integrations'
	@$(python) tests/setup/run_integrations.py --sample
	$(if $(filter test-all,$@),$(test_oldest))

define test_oldest
@echo '== Python tests on the oldest torch'
@FLASH_ATTN_JIT_TEST_ALL= $(python_oldest) -m pytest -m 'not gpu' -n $(JOBS) --dist worksteal
endef

test-oldest: $(stamps_oldest)/package
	$(test_oldest)

# ONLY="transformers-4.57 xformers" runs these alone.
test-integrations: $(stamps)/package
	@$(python) tests/setup/run_integrations.py $(ONLY)

# Its own torch is what the wheel of its Python is run with. WHEELS="--pack no --only 3.12" are other options.
WHEELS ?= --pack both
wheels: $(stamps)/torch
	@$(python) tools/wheels/build_wheels.py --torch $(python) $(WHEELS)

clean:
	rm -rf $(venv) $(venv_oldest) .venv-integrations $(build) $(build_sanitized) $(build_threads) $(build_oldest) build build-wheels dist
