# The interpreter that makes .venv; any Python from 3.10 on.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python run.py

.PHONY: help setup demo reproduce-paper report best dashboard docs bench bench-gpu profile tensorboard test test-slow torture

help: ## print this
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: .venv/.installed ## make .venv and install everything; does nothing when nothing changed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup ## compare the four methods on real digits, three students each; then a pair for which distillation helps
	$(RUN) -m method=scratch,kd,ta,trained_teacher replicates=3 hydra.sweep.dir=outputs/demo
	$(RUN) -m experiment=ours/digits/scratch_plane2,ours/digits/kd_net_plane2 replicates=8 hydra.sweep.dir=outputs/demo-plane2

best: setup ## train, or load, the best setting of the newest finished multirun again; FOLDER=multirun/… says which
	@best="$(or $(FOLDER:%=%/best.sh),$$(ls -t multirun/*/best.sh multirun/*/*/best.sh outputs/*/best.sh 2>/dev/null | head -1))"; \
	if [ ! -f "$$best" ]; then echo "no multirun has left a best setting ($${best:-none is in multirun/ or outputs/})"; exit 1; fi; \
	cat "$$best"; PATH="$(CURDIR)/$(BIN):$$PATH" sh "$$best"

dashboard: setup ## Optuna's page on the newest search, on this machine only
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dashboard]'
	$(BIN)/optuna-dashboard sqlite:///$$(ls -t multirun/*/study.db | head -1) --host 127.0.0.1 --port 8080

test: setup ## ruff, mypy --strict and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict kd bench run.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

docs: setup ## write docs/experiments.md from conf/paper
	$(BIN)/python docs/experiments.py

bench: setup ## training speed beside the usual script's, and what each loss costs, into results/: about 25 quiet minutes
	$(BIN)/python -m bench.speed
	$(BIN)/python -m bench.losses

bench-gpu: setup ## training speed on a GPU, with several students in one step too, into results/; STUDENTS="plane2 resnet8" are some
	$(BIN)/python -m bench.gpu $(STUDENTS)

profile: setup ## where a training step's time goes
	$(BIN)/python -m bench.profile

tensorboard: setup ## serve the runs of tracking=tensorboard on http://127.0.0.1:6006
	$(BIN)/tensorboard --host 127.0.0.1 --logdir_spec outputs:outputs,multirun:multirun

test-slow: setup ## the tests on real images and long trainings
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n auto --dist loadfile

torture: setup ## kill runs 202 times and compare what is left with undisturbed ones: about an hour
	OMP_NUM_THREADS=1 $(BIN)/pytest -m torture -n 2

PAPER = $(BIN)/python -m kd.paper --profile $(or $(PROFILE),smoke) $(TABLE:%=--table %) $(ROW:%=--row %) \
  $(SEEDS:%=--seeds %) $(DATA:%=--data %) $(if $(LABEL),--label '$(LABEL)') $(VARY:%=--vary %) $(OUT:%=--out %) $(SET)

reproduce-paper: setup ## the papers' tables beside ours: PROFILE=smoke|cpu|full TABLE= ROW= SEEDS= DATA=cifar10=FOLDER PLAN=1
	$(PAPER) $(if $(PLAN),--plan)

report: setup ## write the report of what is trained already, and train nothing; takes what reproduce-paper takes
	$(PAPER) --report
