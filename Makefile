# Everything runs in .venv, created once from requirements*.txt. `make help` lists the targets.
# Extra arguments: make test ARGS="-k rle -x". Another Python: make PYTHON=python3.12 env.

PYTHON ?= python3
ARGS ?=
FAST := not slow and not slurm and not browser and not gpu and not docs
SLOW := (slow or slurm or browser) and not gpu and not docs

# `make -f some/where/Makefile` restarts in the Makefile's own folder, whose path may contain spaces.
HERE := $(shell file="$(MAKEFILE_LIST)"; CDPATH= cd "$$(dirname "$${file# }")" && pwd -P)
ifneq "$(HERE)" "$(CURDIR)"

GOALS := $(or $(MAKECMDGOALS),help)
.PHONY: again $(GOALS)
$(GOALS): again ;
again:
	@$(MAKE) --no-print-directory -C "$(HERE)" $(GOALS)

else

PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: help env demo lint format test test-slow test-docs test-oldest gpu clients fuzz bench quality docs clean
help:
	@echo 'make env        the environment in .venv: pinned packages, SAM 2, this project (editable)'
	@echo 'make demo       synthetic strips, LoRA training, merge, table; writes runs/demo/'
	@echo 'make test       the test suite, after make lint'
	@echo 'make lint       format and a small set of rules (ruff); make format applies them'
	@echo 'make test-slow  the slower tests: kills, cluster, browser'
	@echo 'make test-docs  every command of every page, the install lines in a fresh environment: half an hour'
	@echo 'make test-oldest   the tests with the oldest packages allowed, in .venv-oldest (PYTHON is 3.11)'
	@echo 'make gpu        on a CUDA machine, no network, ten minutes: tests, and a measured table of training steps'
	@echo 'make clients    other programs on our files: installs them (requirements-clients.txt), runs their tests'
	@echo 'make fuzz       the readers under random input for a minute each'
	@echo 'make bench      cost: a training step, the data, bytes between ranks'
	@echo 'make quality    quality on NEU-Seg: base, LoRA, full fine-tuning (40 minutes)'
	@echo 'make docs       the documentation as a site: site/index.html'
	@echo 'make clean      removes caches and the demo run, not the environment'

env: $(STAMP)

# The stamp holds the folder's path: an environment that was moved or copied or has no working Python is reinstalled.
INSTALLED := $(shell $(PY) -c 'print(open("$(STAMP)").read())' 2>/dev/null)
ifneq "$(INSTALLED)" "$(CURDIR)"
.PHONY: $(STAMP)
endif

# A package folder without its RECORD was not installed completely, but pip would accept it.
$(STAMP): requirements.txt requirements-sam2.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " \
	    + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@rm -f $(STAMP)
	@if ! $(PY) -m pip --version >/dev/null 2>&1 || \
	    find .venv/lib -name '*.dist-info' ! -exec test -f '{}/RECORD' ';' -print | grep -q .; then \
	    echo 'making .venv'; rm -rf .venv && $(PYTHON) -m venv .venv; fi
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	SAM2_BUILD_CUDA=0 $(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation --require-hashes \
	    -r requirements-sam2.txt
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(PY) -c 'import torch, torchvision, training.train, sam2_lora_ext.host.configs'
	@pwd -P > $(STAMP)

demo: env
	$(PY) tools/demo.py $(ARGS)

lint: env
	.venv/bin/ruff check --quiet .
	.venv/bin/ruff format --quiet --check . || { echo 'make format fixes these files'; exit 1; }

format: env
	.venv/bin/ruff check --quiet --fix .
	.venv/bin/ruff format --quiet .

# One thread a process: the models under test are small, and some tests start several ranks. Two processes, a file at a time.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "$(FAST)" $(ARGS)

# pytest's exit code 5 means that no test was selected, which is not a failure here.
test-slow: env
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "$(SLOW)" $(ARGS) || [ $$? -eq 5 ]

test-docs: env
	OMP_NUM_THREADS=1 $(PY) -m pytest -m docs $(ARGS)

# torch 2.5.1 and the other lower bounds of pyproject.toml, if there are wheels for Python 3.11. Needs 7 GB.
OLDEST := .venv-oldest/bin/python
.venv-oldest/.installed: requirements-oldest.txt requirements-sam2.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the oldest packages need Python 3.11")'
	rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --disable-pip-version-check -r requirements-oldest.txt
	SAM2_BUILD_CUDA=0 $(OLDEST) -m pip install --disable-pip-version-check --no-deps --no-build-isolation \
	    --require-hashes -r requirements-sam2.txt
	$(OLDEST) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest -n 2 --dist loadfile -m "$(FAST)" $(ARGS)

# The second command measures for six minutes at most; cuBLAS needs a fixed workspace to be deterministic.
gpu: env
	$(PY) -c 'import torch, sys; sys.exit(not torch.cuda.is_available() and "make gpu needs a GPU, and torch sees none")'
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(PY) -m pytest -m gpu tests/product/test_gpu.py $(ARGS)
	$(PY) -m benchmarks.gpu

# Installed without dependencies, some of which would replace ours.
clients: env
	$(PY) -m pip install --disable-pip-version-check --no-deps -r requirements-clients.txt
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/clients $(ARGS)

fuzz: env
	SAM2_LORA_FUZZ_SECONDS=60 $(PY) -m pytest tests/data/test_fuzz_readers.py -s $(ARGS)

bench: env
	$(PY) -m benchmarks $(ARGS)

quality: env
	$(PY) -m benchmarks.quality $(ARGS)

docs: env
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	$(PY) -m mkdocs build --strict

clean:
	rm -rf site build dist sam2_lora_ext.egg-info .pytest_cache .hypothesis runs/demo
	find sam2_lora_ext hydra_plugins tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

endif
