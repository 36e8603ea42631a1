# `make` alone lists what there is. PYTHON builds the environment; everything else runs inside VENV.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev,megatron,metrics,offline,optimizers
RANKS  ?= 2
KILLS  ?= 60
# Processes that run tests, whole files each, those of whole trainings first; a test with process groups starts more.
WORKERS ?= 2

BIN := $(VENV)/bin
# One thread a process: the ranks of a test or of the demo share the cores. Nothing may look for a hub.
OFFLINE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help env demo-data demo-corpus demo test test-all soak test-fast wheel-test trackers-test checks docs doctor clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## build or update the virtual environment (.venv)
	@$(PYTHON) tools/setup_env.py --target $(VENV) --extras $(EXTRAS)

demo-data: env  ## make the demo data and the tiny model (.demo)
	@$(BIN)/python tools/demo_data.py --output .demo/data
	@OMP_NUM_THREADS=1 $(BIN)/python tools/tiny_model.py --data .demo/data --output .demo/model

DOMAINS    := demo_c4,demo_wiki,demo_alpaca_text,demo_python
VALIDATION := demo_c4_validation,demo_wiki_validation,demo_alpaca_text_validation,demo_python_validation

demo-corpus: demo-data  ## make what examples/megatron needs: .bin/.idx files and a small mixture of experts (.demo)
	@$(OFFLINE) $(BIN)/python tools/prepare_corpus.py --dataset $(DOMAINS) --dataset-dir .demo/data --tokenizer .demo/model --output .demo/corpus
	@$(OFFLINE) $(BIN)/python tools/prepare_corpus.py --dataset $(VALIDATION) --dataset-dir .demo/data --tokenizer .demo/model --output .demo/corpus_validation
	@OMP_NUM_THREADS=1 $(BIN)/python tools/tiny_model.py --data .demo/data --experts 4 --output .demo/moe

demo: demo-data  ## train a small model on four domains with dynamic mixing, on two processes
	$(OFFLINE) $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m dataflex_mega.train examples/demo.yaml
	@echo
	@echo "The run is in .demo/output. Look at:"
	@find .demo/output -maxdepth 1 -name '*.png' | sort | sed 's/^/  /'
	@echo "or at all curves with: $(BIN)/tensorboard --logdir .demo/output"

test: env  ## run every unit test and the trainings that find most: 12 minutes on two cores
	@$(OFFLINE) $(BIN)/python -m pytest tests -m "not exhaustive" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: env  ## run all tests
	@$(OFFLINE) $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

soak: env  ## kill trainings at random moments, by hand: KILLS=60, half an hour on two cores
	@$(OFFLINE) $(BIN)/python -m tools.soak.kills $(KILLS)

test-fast: env  ## run the unit tests only, no process groups and no training
	@$(OFFLINE) $(BIN)/python -m pytest tests/unit -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

wheel-test:  ## build the wheel and use it in an empty environment with a CPU torch; minutes, by hand
	@$(PYTHON) tools/wheel_test.py

trackers-test: env  ## train with wandb, mlflow, trackio and swanlab offline and read their stores; minutes, by hand
	@$(BIN)/python tools/trackers_test.py

checks: env  ## lint, format, types, layer and size rules
	@status=0; \
	$(BIN)/ruff check --no-cache . || status=1; \
	$(BIN)/ruff format --no-cache --check . || status=1; \
	$(BIN)/pyright --pythonpath $(BIN)/python || status=1; \
	$(BIN)/python tools/checks.py || status=1; \
	exit $$status

docs:  ## build the documentation (docs/_build)
	@$(PYTHON) tools/setup_env.py --target $(VENV) --extras $(EXTRAS),docs
	@$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

doctor: env  ## say what this machine can run
	@$(BIN)/python -m dataflex_mega.doctor

clean:  ## remove what was built, trained and downloaded
	rm -rf $(VENV) .demo docs/_build build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
