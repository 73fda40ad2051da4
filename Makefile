# Every target is one or two commands; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
V := .venv/bin
JOB ?= train
RANK ?= 0
CLUSTER ?= local
need_run = $(if $(RUN),,$(error name the run, as in make $@ RUN=runs/...))

.PHONY: help setup demo test proof numerics chaos test-system lint format check slurm-up slurm-down preview merge status logs constraints clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(V)/.installed ## make .venv with what constraints.txt pins

$(V)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Muster needs Python 3.11 or later; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(V)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(V)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## fine-tune the bundled model here, from rows to a merged model that answers
	$(V)/python launch.py $(ARGS)

test: setup test-system ## all tests, on a real Slurm where this machine can start one
	$(V)/python -m pytest -m 'not proof' $(ARGS)

proof: setup test-system ## the slower proof: every kill, layout and world size (an hour or two)
	$(V)/python -m pytest -m proof $(ARGS)

chaos: setup test-system ## strike trainings on a real Slurm with 60 faults, and write docs/resilience.md (an hour)
	$(V)/python -m tests.slurm.chaos $(ARGS)

numerics: setup ## hold every layout's curve against one process, and write docs/numerics.md (a quarter of an hour)
	$(V)/python -m tests.jobs.numerics

test-system: # Slurm for the tests, where we may install it
	@tests/install_slurm.sh

lint: setup ## ruff, mypy, and shellcheck of the shell scripts
	$(V)/ruff check .
	$(V)/ruff format --check .
	$(V)/mypy
	$(V)/shellcheck .ci/run tests/*.sh

format: setup ## let ruff format and sort
	$(V)/ruff format .
	$(V)/ruff check --fix .

check: lint ## lint, then the tests that need neither Slurm nor many seconds
	$(V)/python -m pytest -m 'not slurm and not slow and not proof'

slurm-up: test-system ## start a real Slurm of four nodes on this machine (ACCOUNTING=1 for sacct)
	@$(PYTHON) tests/slurm/cluster.py up $(if $(ACCOUNTING),--accounting)

slurm-down: ## stop it, leaving nothing behind
	@$(PYTHON) tests/slurm/cluster.py down

preview: setup ## print what the mission command would submit
	$(V)/python launch.py cluster=slurm model=llama70b parallel=zero3 dry_run=true $(ARGS)

merge: setup ## consolidate a run's newest checkpoint: RUN=... [STEP=500] [DTYPE=bf16] [CLUSTER=slurm]
	$(need_run)$(V)/python -m launcher merge $(RUN) cluster=$(CLUSTER) $(if $(STEP),consolidate.step=$(STEP)) $(if $(DTYPE),consolidate.dtype=$(DTYPE)) $(ARGS)

status: ## the jobs of a run: RUN=...
	@$(need_run)$(V)/python -m launcher status $(RUN) || [ $$? -eq 1 ] # 1: a job has failed, as shown

logs: ## a rank's log: RUN=... [JOB=train RANK=0]
	@$(need_run)$(V)/python -m launcher logs $(RUN) --job $(JOB) --rank $(RANK) $(ARGS)

constraints: setup ## write constraints.txt from .venv
	@{ grep '^#' constraints.txt; $(V)/pip list --format=freeze | grep -viE '^(pip|setuptools|muster)=' | sed 's/+cpu//'; } > .constraints && mv .constraints constraints.txt

clean: ## remove .venv and caches; runs stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
