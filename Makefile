# Everything runs in .venv, which `make install` makes.
#
#   make demo      install, then score two architectures on the MAD tasks
#   make test      install, then run the tests
#   make lint      formatters, linters and type checkers
#   make cuda-check  compile every CUDA kernel and write docs/cuda-resources.md: registers, spills, shared memory (needs nvcc;
#                    CONTRIBUTING.md says how to get it where there is no CUDA toolkit)
#   make ptx-check   runs what nvcc makes of the CUDA kernels on the CPU: op tests, vocabulary, every barrier left out in turn, convolutions
#                    of every length (needs nvcc, as cuda-check does)
#   make gpu-check   on a machine with a GPU, offline, 9 minutes at most: build, op tests, compute-sanitizer, benchmarks; results in
#                    the folder OUT; WHEELS: a folder of wheels of pytest and hypothesis, where they are not installed
#   make site      the pages and the API as a site, in build/site
#   make documents  runs the commands and the Python of README.md and docs/, from the pages
#   make pictures  draws docs/pictures and the reports of docs/studies, from the data there and in benchmarks/results
#   make wheels    a source distribution, and wheels for PYTHONS (default: PYTHON), in dist (docs/packaging.md)
#   make sanitize  the op tests over kernels built with AddressSanitizer and UndefinedBehaviorSanitizer
#
#   make gpu-training  on a machine with a GPU, offline: training steps of presets of 70M and 1B and of a slice of 7B, against plain
#                    torch ops, compiled; results in the folder OUT
#
# TORCH chooses the torch to install where .venv has none, e.g. make test TORCH=torch==2.11.0.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

# The op tests: the contract of all ops that the package names, and what each has of its own.
OP_TESTS = $(shell $(BIN)/python -c 'import madkernels; print(*(f"$(CURDIR)/tests/test_{name}.py" for name in ("op_contract", *madkernels.OPS)))')
PTX_TESTS := $(addprefix tests/test_,$(addsuffix .py,simulator device gpu_kernels gpu_check views))

.PHONY: install demo test lint format documents pictures site sanitize cuda-check ptx-check gpu-check gpu-training wheels clean

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/torch: | .venv/bin/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	touch $@

# Without build isolation, so that the extension is built against the torch that runs it.
.venv/installed: $(SOURCES) .venv/torch
	$(BIN)/pip install --quiet 'setuptools>=77' 'cmake>=3.26' ninja 'pybind11>=2.13' numpy
	$(BIN)/pip install --quiet --no-compile --no-build-isolation -e '.[dev]'  # thousands of files compile as they are needed
	touch $@

demo: install
	$(BIN)/madkernels mad run --protocol demo --out $(or $(OUT),out/demo)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python tools/check_sources.py

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

# With packages of its own, so that those of the tests stay as they are.
site: install
	$(BIN)/pip install --quiet --upgrade --target build/site-packages mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=build/site-packages $(BIN)/python -m mkdocs build --quiet

documents: install
	$(BIN)/python tools/documents.py

pictures: install
	$(BIN)/python tools/pictures.py

# The sanitizers' runtime has to be loaded before Python; leaks are Python's own, so they are not reported.
sanitize: install
	rm -rf build/sanitized
	MADKERNELS_SANITIZE=ON MADKERNELS_CUDA=off $(BIN)/pip install --quiet --no-build-isolation --no-deps --target build/sanitized .
	cd build/sanitized && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	MADKERNELS_SANITIZE=ON PYTHONPATH=$(CURDIR)/build/sanitized ../../$(BIN)/python -m pytest --rootdir=$(CURDIR)/tests -c $(CURDIR)/pyproject.toml \
	  --capture=sys -p no:cacheprovider --backend cpu $(OP_TESTS)

cuda-check: install
	$(BIN)/python tools/cuda_check.py --markdown docs/cuda-resources.md

ptx-check: install
	$(BIN)/python -m pytest --backend ptx --slow $(PTX_TESTS) $(OP_TESTS)

# With the packages that PYTHON has, and no network.
gpu-check:
	$(PYTHON) tools/gpu_check.py --out $(or $(OUT),out/gpu-check) $(if $(WHEELS),--wheels $(WHEELS))

# After gpu-check, whose build it uses.
gpu-training:
	PYTHONPATH=. $(PYTHON) tools/gpu_training.py --json $(or $(OUT),out)/training.json

wheels:
	$(PYTHON) tools/wheels.py build $(or $(PYTHONS),$(PYTHON))

clean:
	rm -rf build dist .venv *.egg-info madkernels/_C*.so
