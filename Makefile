# make setup   the virtual environment .venv with the `harness` command
# make demo    fine-tune a small pretrained base on real pairs and print scores and translations
# make demo-llm   QLoRA on a small chat model, its answers before and after, the adapter and a merged model
# make test    every test; those of clusters need root, Linux and Debian's packages, and say so where they are skipped
# make quick   only the tests without processes
# make lint    formatting, lint and types
# make bench   the measurements of benchmarks/
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp

quick test: export DS_ACCELERATOR = cpu
quick test: export OMP_NUM_THREADS = 1
quick test: export TOKENIZERS_PARALLELISM = false
quick test demo demo-llm: export HF_HUB_OFFLINE = 1

.PHONY: setup demo demo-llm test quick lint format docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m examples.demo

demo-llm: setup
	$(BIN)/python -m examples.demo_llm

quick: setup
	$(BIN)/pytest -m "not slow and not cluster"

test: setup
	failed=0; for tests in "not slow and not cluster" "slow and not cluster" cluster; do \
	  $(BIN)/pytest -m "$$tests" || failed=1; \
	done; exit $$failed

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run launch/*.sh slurm/*.sbatch tests/cluster/*.sh

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m harness.config.reference > docs/configuration.md.tmp && mv docs/configuration.md.tmp docs/configuration.md

bench: setup
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
