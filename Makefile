# Every target does its own set-up; a second run is quick. Variables: PYTHON (python3), VENV (.venv);
# TRACES, a folder of count traces, for the part of a benchmark that needs them; COUNTS, one of them.
PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV
STAMPS := $(VENV)/.stamps
RUN := $(VENV)/bin/python
CORE := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h .deps/complete)

.PHONY: help setup build demo test check format bench bench-models bench-offload bench-offload-figures bench-lossy bench-prediction bench-serve soak docs clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 14

demo: $(STAMPS)/build ## build a small MoE model, pack it, and chat with it in less memory than it has bytes
	$(RUN) -m zipmoe demo

test: $(STAMPS)/build $(STAMPS)/browser ## run the tests
	$(RUN) -m pytest

check: $(STAMPS)/build ## run linters, type checks, format checks, house rules; generated docs are current
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h
	$(RUN) tools/house.py
	$(RUN) tools/generate_docs.py --check

format: $(STAMPS)/build ## format all code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/*.cpp csrc/*.h

bench: $(STAMPS)/build $(STAMPS)/bench ## measure; results go to benchmarks/results
	$(RUN) benchmarks/codec.py --out benchmarks/results/codec.json
	$(RUN) benchmarks/entropy.py --out benchmarks/results/entropy.json
	$(RUN) benchmarks/pack.py --out benchmarks/results/pack.json
	$(RUN) benchmarks/kernels.py --busy --out benchmarks/results/kernels.json
	$(RUN) benchmarks/schedule.py --out benchmarks/results/schedule.json
	$(RUN) benchmarks/planner.py --out benchmarks/results/planner.json
	$(RUN) benchmarks/policy.py $(TRACES:%=--traces %) --out benchmarks/results/policy.json

bench-models: $(STAMPS)/build $(STAMPS)/bench ## measure whole models, also against llama.cpp (34 GB of disk, 20 GB of memory)
	tools/setup.sh llama
	$(RUN) benchmarks/layer.py --out benchmarks/results/layer.json
	$(RUN) benchmarks/decode.py --out benchmarks/results/decode.json

bench-offload: $(STAMPS)/build $(STAMPS)/bench ## measure where weights do not fit, in memory cgroups (root, 48 GB of disk)
	tools/setup.sh llama
	$(RUN) benchmarks/offload.py $(COUNTS:%=--counts %) --out benchmarks/results/offload.json
	$(RUN) tools/generate_docs.py

bench-offload-figures: $(STAMPS)/build $(STAMPS)/bench ## the same model: policies, lookahead, lengths of answers, codecs (an hour)
	$(RUN) benchmarks/offload_figures.py $(COUNTS:%=--counts %) --out benchmarks/results/offload_figures.json
	$(RUN) tools/generate_docs.py

bench-lossy: $(STAMPS)/build ## measure what lossy stores cost and gain (14 GB of disk, 12 GB of memory, an idle machine for two hours)
	$(RUN) benchmarks/lossy.py --out benchmarks/results/lossy.json
	$(RUN) tools/generate_docs.py

bench-prediction: $(STAMPS)/build ## measure how well the next layer's experts can be foretold (an idle machine)
	$(RUN) benchmarks/prediction.py $(TRACES:%=--traces %) --speed --out benchmarks/results/prediction.json
	$(RUN) tools/generate_docs.py

bench-serve: $(STAMPS)/build $(STAMPS)/bench ## measure the server under load: batches, long prompts, first tokens (root, 15 minutes)
	tools/setup.sh llama
	$(RUN) benchmarks/serve.py $(COUNTS:%=--counts %) --out benchmarks/results/serve.json
	$(RUN) tools/generate_docs.py

soak: $(STAMPS)/build $(STAMPS)/browser $(STAMPS)/ray ## run the full volumes of the acceptance points (20 minutes); report in benchmarks/results
	$(RUN) -m pytest -m soak -o timeout=14400 --soak-report=benchmarks/results/soak.json

docs: $(STAMPS)/build ## write the generated documents again (families.md runs its sweep: minutes)
	$(RUN) tools/generate_docs.py
	$(RUN) tools/generate_families.py

setup: $(STAMPS)/packages ## system packages, virtual environment, Python packages
build: $(STAMPS)/build ## compile the native core

$(STAMPS)/venv: tools/setup.sh
	tools/setup.sh system
	tools/setup.sh venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/browser: $(STAMPS)/venv
	tools/setup.sh browser
	@touch $@

$(STAMPS)/packages: $(STAMPS)/venv pyproject.toml tools/fetch_deps.py
	tools/setup.sh packages
	@touch $@

$(STAMPS)/build: $(STAMPS)/packages $(CORE)
	@echo "setup: compiling the core (a minute or two the first time)" >&2
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install -qq --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/bench: $(STAMPS)/packages tools/setup.sh pyproject.toml
	tools/setup.sh bench
	@touch $@

$(STAMPS)/ray: $(STAMPS)/packages tools/setup.sh pyproject.toml
	tools/setup.sh ray
	@touch $@

clean: ## remove what was built; the virtual environment and cached models stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMPS)/build
