# `make demo` runs the main job, `make test` passes the tests. Both build .venv on their first run and reuse it after.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Three workers for two cores, as tests mostly wait for other processes; each on a host of its own, where such can be made. Files in
# their order, in which those with long tests come first.
WORKERS      = $(shell expr $$(nproc) \* 3 / 2)
ISOLATED     = $(if $(shell .ci/isolated echo yes 2> /dev/null),.ci/isolated)
SIDE_BY_SIDE = $(if $(ISOLATED),--dist loadfile --no-loadscope-reorder --tx '$(WORKERS)*popen//python=.ci/isolated $(BIN)/python')

.PHONY: help demo test test-local-mode test-cupy test-slow test-cluster test-layouts chaos soak fuzz lint types bench bench-gpu docs wheel-check clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## Run the main job: train, send the weights across, check them, write reports/weight_sync.html
	$(BIN)/python -m actors.weight_sync --report reports/weight_sync.html

test: $(STAMP)  ## Pass the tests, on all cores where isolated hosts can be made for them
	$(BIN)/python -m pytest -q -m 'not slow and not local_mode' $(SIDE_BY_SIDE)

# The last Ray with local_mode, where agents and workers are one process.
LOCAL_MODE_RAY := 2.52.1
LOCAL_MODE     := .venv-local-mode

$(LOCAL_MODE)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(LOCAL_MODE)
	sed 's/^ray==.*/ray==$(LOCAL_MODE_RAY)/' constraints.txt > $(LOCAL_MODE)/constraints.txt
	$(LOCAL_MODE)/bin/python -m pip install --quiet --upgrade pip
	$(LOCAL_MODE)/bin/python -m pip install --quiet --no-compile -c $(LOCAL_MODE)/constraints.txt -e '.[etcd]' pytest pytest-timeout hypothesis
	touch $@

test-local-mode: $(LOCAL_MODE)/.installed  ## The tests marked local_mode, with the last Ray that has it, in an environment of their own
	$(LOCAL_MODE)/bin/python -m pytest -q -m local_mode tests/testing

CUPY := .venv-cupy

$(CUPY)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUPY)
	$(CUPY)/bin/python -m pip install --quiet --upgrade pip
	$(CUPY)/bin/python -m pip install --quiet -c constraints.txt -e '.[gpu-cuda13]' pytest pytest-timeout hypothesis
	touch $@

test-cupy: $(CUPY)/.installed  ## What is assumed of cupy, NVRTC and NCCL, as far as it shows without a GPU, in an environment of their own (3.6 GB)
	$(CUPY)/bin/python -m pytest -q tests/cuda tests/transport/kernels/test_kernel_source.py tests/transport/nccl/test_cupy_nccl.py

# As many workers as cores: Ray gives a node 30 s to start.
test-slow test-cluster: WORKERS = $(shell nproc)

test-slow: $(STAMP)  ## The tests that take minutes, and those marked local_mode with the newest Ray
	$(BIN)/python -m pytest -q -m 'slow or local_mode' $(SIDE_BY_SIDE) --timeout 1800

test-cluster: $(STAMP)  ## README's cluster section as written (ray up over ssh; needs root and sshd); Ray over two hosts; jobs that are submitted
	$(BIN)/python -m pytest -q -m slow $(SIDE_BY_SIDE) tests/actors/test_submit.py tests/cluster

test-layouts: $(STAMP)  ## 100,000 random layouts and plans against DTensor
	$(BIN)/python -m pytest -q tests/layout/test_properties.py tests/plan/test_properties.py tests/plan/test_dtypes.py tests/plan/test_sharing.py tests/plan/test_relays.py \
	  --hypothesis-profile=thorough --timeout 20000

chaos: $(STAMP)  ## Kill, stop and cut off 500 times while weights cross; half an hour
	$(ISOLATED) $(BIN)/python -m tests.chaos --kills 500
	$(ISOLATED) $(BIN)/python -m tests.chaos --kills 100 --ray

soak: $(STAMP)  ## 10,000 syncs between two processes and two agents: memory and open files must not grow
	$(BIN)/python -m tests.soak --syncs 10000

fuzz: $(STAMP)  ## 100,000 commands and as many replies that are nearly right, and 20,000 values for each kind of place where bytes are read
	ETHA_RAY_FUZZ=100000 $(BIN)/python -m pytest -q tests/security --timeout 3600

lint: $(STAMP)  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

bench: $(STAMP)  ## The benchmarks, each beside its baselines
	$(BIN)/etha-ray bench roundtrip
	$(BIN)/etha-ray bench small
	$(BIN)/etha-ray bench sync
	$(BIN)/etha-ray bench network
	$(BIN)/etha-ray bench store
	$(BIN)/etha-ray bench plan
	$(BIN)/etha-ray bench faults

bench-gpu: $(STAMP)  ## The benchmark of a GPU's own copies; needs one
	$(BIN)/etha-ray bench gpu

docs: $(STAMP)  ## Build the site into build/site; a broken link or name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel-check: $(STAMP)  ## Build the wheel, install it into an empty environment, import it there
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --wheel --outdir dist
	rm -rf build/wheel-venv && $(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --no-compile -c constraints.txt dist/*.whl
	cd build && wheel-venv/bin/python -c 'import etha_ray, sys; print(etha_ray.__version__, etha_ray.__file__); assert "ray" not in sys.modules'
	build/wheel-venv/bin/etha-ray --help > /dev/null

clean:  ## Remove what the targets above made
	rm -rf $(VENV) $(LOCAL_MODE) $(CUPY) build dist reports .mypy_cache .ruff_cache .pytest_cache .hypothesis
