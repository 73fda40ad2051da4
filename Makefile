# Every target is one or two commands. `make` without a target lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
V := .venv/bin
JOB ?= train
RANK ?= 0
TRL ?= 1.16.0
RAY ?= 2.60.0
CLUSTER ?= local
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
or_none = || [ $$? -eq 5 ] # 5: ARGS selects none of these tests
of_a_run := $(filter merge status logs,$(MAKECMDGOALS))
ifneq ($(of_a_run),)
ifndef RUN
$(error name the run, as in make $(firstword $(of_a_run)) RUN=runs/...)
endif
endif

.PHONY: help setup demo test test-oldest proof numerics families foreign custom chaos slurm-versions sites wrong-configs screenshots recording test-system lint format check bench-data bench-templates slurm-up slurm-down preview merge status logs constraints clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(V)/.installed ## create .venv with the versions of constraints.txt

$(V)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Muster needs Python 3.11 or later; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(V)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(V)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## fine-tune a tiny model on this machine, from rows to a merged model
	$(V)/python launch.py $(ARGS)

test: setup test-system ## all tests; as root on Debian or Ubuntu also on a real Slurm
	$(V)/python -m pytest -m 'not proof and not slurm' -n $(WORKERS) --dist worksteal $(ARGS) $(or_none)
	$(V)/python -m pytest -m 'not proof and slurm' $(ARGS) $(or_none)

test-oldest: .oldest/.installed ## the tests of layouts, models and checkpoints with the oldest libraries allowed (15 minutes)
	.oldest/bin/python -m tests.oldest $(ARGS)

proof: setup test-system ## the slower tests: every kill, layout and number of ranks (one to two hours)
	$(V)/python -m pytest -m proof $(ARGS)

chaos: setup test-system ## inject 80 faults into trainings on a real Slurm, and write docs/resilience.md (one hour)
	$(V)/python -m tests.slurm.chaos $(ARGS)

slurm-versions: setup ## test chain, requeue and crash under this machine's Slurm and two newer ones (20 minutes)
	@tests/install_slurm.sh debootstrap
	$(V)/python -m tests.slurm.versions $(ARGS)

sites: setup test-system ## run the tests of what sites do differently, and write docs/sites.md
	$(V)/python -m tests.sites $(ARGS)

numerics: setup ## compare every layout with one process, and write docs/numerics.md (15 minutes)
	$(V)/python -m tests.jobs.numerics

families: setup ## compare families of models with transformers and PEFT, and write docs/models.md (over an hour)
	$(V)/python -m tests.jobs.families $(ARGS)

foreign: setup ## merge real checkpoints of other programs, compare, and write the table of docs/merge.md (20 minutes)
	$(V)/python -m tests.jobs.foreign --ranks 2 --write docs/merge.md

wrong-configs: setup ## launch wrong and right configs as dry runs, and write docs/wrong-configs.md (two minutes)
	$(V)/python -m tests.launcher.check.wrong_configs $(ARGS)

screenshots: setup ## take the pictures of docs/pages in headless Chromium, and check the pages for accessibility (five minutes)
	@tests/install_browser.sh .browser
	$(V)/python -m tests.pages.screenshots $(ARGS)

recording: setup ## type what a new user types, and write docs/terminal.md (five minutes)
	$(V)/python -m tests.terminal_recording

custom: .bench/.installed test-system ## run the programs of examples/custom on a real Slurm that preempts each, and write the table of docs/own-trainer.md (20 minutes)
	.bench/bin/python -m tests.slurm.own_trainers $(ARGS)

test-system: # install Slurm for the tests, if this user may
	@tests/install_slurm.sh

lint: setup ## ruff, mypy, and shellcheck of the shell scripts
	$(V)/ruff check .
	$(V)/ruff check --preview --select PLW1514 conf jobs launcher muster pages launch.py
	$(V)/ruff format --check .
	$(V)/mypy
	$(V)/shellcheck .ci/run tests/*.sh

format: setup ## format the code and sort imports with ruff
	$(V)/ruff format .
	$(V)/ruff check --fix .

check: lint ## lint, then the fast tests that need no Slurm
	$(V)/python -m pytest -m 'not slurm and not slow and not proof' -n $(WORKERS) --dist worksteal

bench-data: .bench/.installed ## measure preprocess against TRL, which is installed beside in .bench (ten minutes)
	.bench/bin/python benchmarks/preprocess.py $(ARGS)

bench-templates: .bench/.installed ## compare chats under the templates that TRL ships with transformers (one minute)
	.bench/bin/python benchmarks/chat_templates.py $(ARGS)

# A venv that also sees the packages of .venv, after its own
define venv_before
	$(V)/python -m venv --clear $(1)
	$(V)/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
endef

.bench/.installed: $(V)/.installed Makefile
	$(call venv_before,.bench)
	.bench/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt trl==$(TRL) 'ray[train]==$(RAY)'
	@touch $@

.oldest/.installed: $(V)/.installed Makefile constraints-oldest.txt
	$(call venv_before,.oldest)
	.oldest/bin/pip install --quiet --disable-pip-version-check --requirement constraints-oldest.txt
	@touch $@

slurm-up: test-system ## start a real Slurm of four nodes on this machine (ACCOUNTING=1 for sacct)
	@$(PYTHON) tests/slurm/cluster.py up $(if $(ACCOUNTING),--accounting)

slurm-down: ## stop that Slurm and remove its files
	@$(PYTHON) tests/slurm/cluster.py down

preview: setup ## print what would be submitted for llama70b with zero3
	$(V)/python launch.py cluster=slurm model=llama70b parallel=zero3 dry_run=true $(ARGS)

merge: setup ## consolidate a run's newest checkpoint: RUN=... [STEP=500] [DTYPE=bf16] [CLUSTER=slurm]
	$(V)/python -m launcher merge $(RUN) cluster=$(CLUSTER) $(if $(STEP),consolidate.step=$(STEP)) $(if $(DTYPE),consolidate.dtype=$(DTYPE)) $(ARGS)

$(V)/python:
	@echo "Muster is not installed here. Type make setup, or name another environment, as in make $(of_a_run) V=/path/to/bin RUN=$(RUN)" >&2; exit 2

status: | $(V)/python ## show the jobs of a run: RUN=...
	@$(V)/python -m launcher status $(RUN) || [ $$? -eq 1 ] # 1: a job has failed, as shown

logs: | $(V)/python ## print the log of a rank: RUN=... [JOB=train RANK=0]
	@$(V)/python -m launcher logs $(RUN) --job $(JOB) --rank $(RANK) $(ARGS)

constraints: setup ## write constraints.txt from .venv
	@{ grep '^#' constraints.txt; $(V)/pip list --format=freeze | grep -viE '^(pip|setuptools|muster)=' | sed 's/+cpu//'; } > .constraints && mv .constraints constraints.txt

clean: ## remove .venv and caches; runs stay
	rm -rf .venv .bench .oldest .browser build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
