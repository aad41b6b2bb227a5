# Each target sets up .venv by itself. PYTHON chooses the interpreter (3.11 or newer), CORES how many cores to use, and
# EXTRAS what .venv gets at once. PYTEST_ADDOPTS="-m gate" makes a heavy suite the small case of it that .ci/run keeps.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
    $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
EXTRAS ?= pipeline,dev
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-cluster test-storage test-faults test-native test-vllm lint bench families docs reference clean

demo: .venv/installed  ## compress SmolLM2-135M four ways and show what was lost and saved
	@$(BIN)/armor progress -- $(BIN)/snakemake --cores $(CORES)
	@$(BIN)/armor summary

test: .venv/installed  ## the whole test suite, the workflow on a tiny random model included
	$(BIN)/pytest -n $(CORES) --dist loadgroup --no-loadscope-reorder --ignore tests/cluster --ignore tests/vllm

test-cluster: .venv/installed  ## the workflow on a real SLURM of one node, started for it; as root, on Linux
	@why=$$($(BIN)/python -c 'from tests.cluster.slurm import missing; print(missing() or "")') || exit 1; \
	if [ -n "$$why" ]; then echo "make test-cluster: NOT RUN: $$why"; else $(BIN)/pytest --ignore tests/cluster/test_storage.py tests/cluster; fi

test-storage: .venv/storage  ## results in a bucket of an S3 server that is started for it, jobs as pods
	$(BIN)/pytest -rs tests/cluster/test_storage.py

.venv/storage: .venv/installed
	@$(BIN)/python -c "import moto, snakemake_storage_plugin_s3" 2>/dev/null || \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[storage]"
	touch $@

test-faults: .venv/installed  ## kill the workflow 50 times; every output as undisturbed, no file left over
	ARMOR_KILLS=50 $(BIN)/pytest -s tests/workflow/test_faults.py

test-native: .venv/installed  ## the C library under the sanitizers of addresses, undefined behaviour and threads
	ARMOR_SANITIZERS=all $(BIN)/pytest tests/runtime/test_cpu.py -k sanitizers

test-vllm: .venv-vllm/installed .venv/installed  ## the vLLM plugin in an environment of its own, with a build of vLLM for CPUs
	.venv-vllm/bin/python -m pytest tests/vllm
	ARMOR_VLLM=$(CURDIR)/.venv-vllm/bin/python $(BIN)/pytest tests/evaluate/test_served.py

.venv-vllm/installed: tests/vllm/requirements.txt pyproject.toml setup.py $(wildcard armor/runtime/native/*.[ch])
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps -r tests/vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@.venv-vllm/bin/python -m compileall -q -j 0 .venv-vllm/lib >/dev/null || true
	touch $@

lint: .venv/installed  ## what CI checks of the form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --warnings
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

bench: .venv/installed  ## the solver against the published optimiser
	$(BIN)/python -m benchmarks.solver

families: .venv/installed  ## every causal class of transformers, tiny, through the pipeline; writes docs/FAMILIES.md
	$(BIN)/python -m benchmarks.families

reference: .venv/installed  ## make the generated pages anew: configuration, methods, records, the JSON schema
	$(BIN)/armor schema > workflow/schemas/config.schema.json
	$(BIN)/armor schema --write README.md --write config/README.md --write docs/RECORDS.md

docs: .venv/docs  ## the documentation as a site, in site/; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.venv/docs: .venv/installed
	@$(BIN)/python -c "import mkdocs, material, mkdocstrings" 2>/dev/null || \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard armor/runtime/native/*.[ch])
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@# All cores make the bytecode, not pip's one. Without it each process compiles torch again where none is written.
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true # a few files of some packages are for other Pythons
	touch $@

clean:  ## remove the environment; results stay
	rm -rf .venv .venv-vllm
