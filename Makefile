# `make help` lists the targets. Each target installs what it needs into .venv, once,
# and again when setup.py changes.

VENV ?= .venv
BIN := $(VENV)/bin
GECKO := $(BIN)/gecko
CORPUS := gecko_jax/quickstart

# The first Python of a supported version that runs: a name on the PATH may be a shim
# for a version that is not installed.
RUNS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	if $$python -c '$(RUNS)' >/dev/null 2>&1; then echo $$python; break; fi; done)

# An existing environment keeps its Python: refuse another PYTHON.
MADE_WITH := $(shell cat $(VENV)/.python 2>/dev/null)
ifneq ($(filter command environment,$(origin PYTHON)),)
ifneq ($(MADE_WITH),)
ifneq ($(MADE_WITH),$(PYTHON))
$(error $(VENV) was made with $(MADE_WITH); add VENV=.venv-other, or remove $(VENV))
endif
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@echo "gecko_jax: Gecko text embeddings in JAX. Targets:"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | \
		awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo "Another Python: make test PYTHON=python3.12 VENV=.venv312"

# `make demo` fine-tunes `mini`, the bundled model; `make demo START=scratch`
# trains a small Gecko from scratch, in the two stages of the paper.
START := mini
COMMA := ,
SCRATCH := $(filter scratch,$(START))
TAG := $(if $(filter mini,$(START)),,-$(START))
BEGINNING := $(if $(SCRATCH),demo/prefinetune,$(START))
SEARCHES := "which privileges does a role need" "how are modules found on import" \
	"large wading bird"

.PHONY: demo
demo: $(VENV)/.core ## generate data (FRet), fine-tune mini, evaluate, search
	$(GECKO) fret run --config=configs/fret.py:local,recorded --workdir=demo/fret
	$(GECKO) fret report --config=configs/fret.py:local,recorded --workdir=demo/fret
	$(if $(SCRATCH),$(GECKO) train --config=configs/prefinetune.py:local \
		--workdir=demo/prefinetune)
	test -e demo/triples.jsonl || $(GECKO) data prepare $(CORPUS)/train.jsonl \
		--output=demo/triples.jsonl --negatives=1
	$(GECKO) train --workdir=demo/finetune$(TAG) \
		--config=configs/finetune.py:local$(if $(SCRATCH),,$(COMMA)shipped) \
		--config.data.files="('demo/triples.jsonl', 'demo/fret/export/fret.jsonl')" \
		--config.init.checkpoint=$(BEGINNING) \
		$(if $(SCRATCH),,--config.data.vocabulary=$(START))
	$(GECKO) evaluate quickstart --model=demo/finetune$(TAG) --beside=mini --untrained \
		--output=demo/evaluation$(TAG)
	$(GECKO) embed $(CORPUS)/corpus.jsonl --model=demo/finetune$(TAG) \
		--output=demo/embeddings$(TAG)
	$(GECKO) index demo/embeddings$(TAG) --output=demo/index$(TAG)
	$(GECKO) embed $(CORPUS)/corpus.jsonl --model=mini --output=demo/mini/embeddings
	$(GECKO) index demo/mini/embeddings --output=demo/mini/index
	$(GECKO) search --model=demo/finetune$(TAG) --index=demo/index$(TAG) $(SEARCHES)
	@echo
	@echo "The same searches with mini, the bundled model:"
	$(GECKO) search --model=mini --index=demo/mini/index $(SEARCHES)
	@echo
	@echo "The results are in demo/:"
	@echo "  fret          data that a language model generated from passages: report.html"
	@echo "  finetune$(TAG)      the model: gecko_jax.load(\"demo/finetune$(TAG)\");"
	@echo "                training.png shows the loss"
	@echo "  evaluation$(TAG)    quality at each dimension, compared with mini, the bundled"
	@echo "                model, and BM25: table.txt, quality.png"
	@echo "  index$(TAG)         the index: $(GECKO) search --model=demo/finetune$(TAG)" \
		"--index=demo/index$(TAG)"

# The bundled model is a table of token vectors that is distilled from a sentence encoder.
# TEACHER is the folder of all-MiniLM-L6-v2, and T5_VOCABULARY is T5's SentencePiece model.
# DATA=DIR adds the pairs of a data folder that have permissive licences. JUDGED names
# files of sentence pairs, whose texts are excluded. A second run resumes the first.
MADE := runs/pretrained
TEACHER :=
T5_VOCABULARY :=
DATA :=
JUDGED :=
DISTIL :=

.PHONY: pretrained
pretrained: $(VENV)/.test ## make the bundled model again: up to two hours
	@test -n "$(TEACHER)" -a -n "$(T5_VOCABULARY)" || { \
		echo "name the teacher and the vocabulary: make pretrained TEACHER=DIR" \
		"T5_VOCABULARY=FILE" >&2; exit 1; }
	test -e $(MADE)/text/text.json || $(BIN)/python benchmarks/text.py \
		$(if $(DATA),--data=$(DATA)) --judged $(JUDGED) --output=$(MADE)/text
	$(BIN)/python benchmarks/distil.py --text=$(MADE)/text --teacher=$(TEACHER) \
		--vocabulary=$(T5_VOCABULARY) --output=$(MADE)/tables $(DISTIL)
	$(BIN)/python benchmarks/distilled.py $(MADE)/tables \
		--vocabulary=$(T5_VOCABULARY) --output=$(MADE)/model
	$(GECKO) evaluate quickstart $(JUDGED) \
		$(if $(DATA),$(patsubst %/,%,$(wildcard $(DATA)/eval/test/*/))) \
		--model=$(MADE)/model --hybrid --output=$(MADE)/evaluation
	$(BIN)/python benchmarks/pretrained.py $(MADE)/model --text=$(MADE)/text \
		--results=$(MADE)/evaluation/results.json --output=gecko_jax/pretrained/mini

# The tests of a file share compiled functions, so one process runs them. The longest
# files run first: tests/conftest.py sorts them, and xdist must keep this order.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: test
test: $(VENV)/.test ## the fast tests
	$(PYTEST)

.PHONY: test-slow
test-slow: $(VENV)/.test ## the fast tests and the slow ones
	$(PYTEST) -m "not gpu and not tpu and not torch and not network and not beam and not t5x"

# A CPU build is enough: make test-torch TORCH=torch==2.13.0, or any installed version.
TORCH ?= torch

.PHONY: test-torch
test-torch: $(VENV)/.torch ## comparisons with PyTorch libraries, and runs inside mteb
	$(PYTEST) -m "torch and not slow"

.PHONY: check
check: $(VENV)/.dev ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)

.PHONY: format
format: $(VENV)/.dev ## format the code and apply the fixes of the linter
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: test-beam
test-beam: ## the tests of Apache Beam, in .venv-beam with an older protobuf
	$(MAKE) VENV=.venv-beam .venv-beam/.beam
	.venv-beam/bin/python -m pytest -q -m beam

# t5x is installed from git. Without access to its repositories, name local checkouts:
# make test-t5x T5X=/src/t5x AIRIO=/src/airio JESTIMATOR=/src/jestimator
T5X ?= $(call from_git,t5x)
AIRIO ?= $(call from_git,airio)
JESTIMATOR ?= $(call from_git,jestimator)
from_git = $(shell sed -n 's/^$(1) @ //p' requirements-t5x.txt)

.PHONY: test-t5x
test-t5x: ## the tests with t5x, in .venv-t5x; installs t5x from git
	$(MAKE) VENV=.venv-t5x .venv-t5x/.t5x
	.venv-t5x/bin/python -m pytest -q -m t5x

# One stamp for each set of extras. It is touched only after pip succeeds.
$(VENV)/.core: setup.py | $(VENV)/.python
	$(call install,.)

$(VENV)/.test: setup.py | $(VENV)/.python
	$(call install,.[test])
	@touch $(VENV)/.core

$(VENV)/.dev: setup.py | $(VENV)/.python
	$(call install,.[dev])
	@touch $(VENV)/.core $(VENV)/.test

# A comma would end the argument of `call`.
TORCH_EXTRAS := .[test,torch,eval]
$(VENV)/.torch: setup.py | $(VENV)/.python
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(call install,$(TORCH_EXTRAS))
	@touch $(VENV)/.core $(VENV)/.test

# sentencepiece 0.2.3 needs the newer protobuf, but does not declare it.
$(VENV)/.beam: setup.py | $(VENV)/.python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test,beam]" \
		"sentencepiece<0.2.3"
	@touch $@

# --no-deps, because airio pins an older grain than this package needs.
$(VENV)/.t5x: setup.py requirements-t5x.txt | $(VENV)/.python
	$(call install,$(T5X_EXTRAS))
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps \
		$(T5X) $(AIRIO) $(JESTIMATOR) || { \
		echo "pip could not install one of $(T5X) $(AIRIO) $(JESTIMATOR)" \
		"from git: check the network, or name local checkouts:" \
		"make test-t5x T5X=/src/t5x AIRIO=/src/airio JESTIMATOR=/src/jestimator" \
		>&2; exit 1; }
	@touch $@

T5X_EXTRAS := .[test,t5x]

define install
@echo "Installing gecko-jax$(1:.%=%) into $(VENV), once: 3.5 GB, a few minutes"
$(BIN)/python -m pip install --disable-pip-version-check -e "$(1)"
@touch $@
endef

$(VENV)/.python:
	@test -n "$(PYTHON)" || { \
		echo "No Python 3.11 or 3.12 with the venv module found. Install one (on" \
		"Debian: apt-get install python3-venv), or name it:" \
		"make test PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c '$(RUNS)' >/dev/null 2>&1 || { \
		echo "PYTHON=$(PYTHON): not a working Python 3.11 or 3.12 with venv;" \
		"name another" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@echo "$(PYTHON)" > $@
