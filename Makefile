# `make` lists the targets. Needs Python >= 3.11 with pip; everything else goes into .venv.
PYTHON ?=
BIN := .venv/bin

# Install in .venv what pip calls $(1); .venv itself is made when it is missing or was left half made.
# A Python without ensurepip (Debian splits it off) lends its own pip instead.
define install
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for py in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	    $$py -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; py=; \
	  done; \
	  if [ -z "$$py" ]; then \
	    echo "error: no Python >= 3.11 among: $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)" >&2; \
	    echo "       install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "making .venv with $$($$py --version), $$py"; \
	  $$py -m venv --clear .venv >/dev/null 2>&1 || { \
	    $$py -m venv --clear --without-pip .venv && $$py -m pip --python $(BIN)/python install --quiet pip; \
	  } || { echo "error: $$py could make no .venv; it needs the modules venv and pip" >&2; rm -rf .venv; exit 1; }; \
	}
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --editable '$(1)'
	@touch $@
endef

# A command that a user would type, printed as he would type it.
mlfs = @printf '\n$$ mlfs %s\n' '$(1)'; $(BIN)/mlfs $(1)

.PHONY: help setup demo docs experiments test lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: .venv/.test  ## .venv with the package (editable) and all that the tests need

.venv/.test: setup.cfg
	$(call install,.[test])
	@touch .venv/.core

.venv/.core: setup.cfg
	$(call install,.)

# Installed beside what is there: an editable install with one extra keeps those of another.
.venv/.docs: setup.cfg
	$(call install,.[docs])
	@touch .venv/.core

docs: .venv/.docs  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

demo: .venv/.core  ## fetch a model and data, fit a small palette, show, export and verify it (runs/demo)
	@rm -rf runs/demo exported/quarter
	$(call mlfs,fetch minilm-l6 wiki)
	$(call mlfs,fit --model minilm-l6 --task wiki-topic --out runs/demo --preset demo)
	$(call mlfs,palette runs/demo)
	$(call mlfs,export runs/demo --subnet quarter --to exported/quarter)
	$(call mlfs,verify exported/quarter --against runs/demo)
	$(call mlfs,info runs/demo)

# What two cores can do. A bench runs every time; the five studies behind it measure only what is not stored with the
# same settings, so that they go on where they were stopped: delete their experiments/results/NAME.json to start anew.
# Not here, because they need what this does not make (experiments/README.md has their commands): plan_llama,
# spa_network, check_gguf_llamacpp, spa latency --plugin, bench_gpu.
STUDIES := bench_execution bench_input bench_latency bench_side_memory bench_palette_cost bench_sandwich bench_lora bench_generate bench_cloud fuzz_frames
STUDIES += spa_quantised mlfs_choices mlfs_encoder_palette mlfs_decoder spa_tables

experiments: demo  ## run the benches, and what is missing in the five long studies' results; hours, resumable
	@cp runs/demo/palette.json experiments/results/demo_palette.json
	@cp runs/demo/palette.png experiments/results/demo_palette.png
	$(BIN)/spa latency --jitter 0.1 --png experiments/results/spa_latency.png --json > experiments/results/spa_latency.tmp
	@mv experiments/results/spa_latency.tmp experiments/results/spa_latency.json
	@for study in $(STUDIES); do echo "$$ python experiments/$$study.py"; $(BIN)/python experiments/$$study.py || exit; done
	$(BIN)/python experiments/index.py

test: .venv/.test  ## the tests; ARGS="-k name" for some
	@$(BIN)/mlfs fetch minilm-l6 bert-tiny smollm2-135m wiki movie || echo "no download: tests of real checkpoints are skipped"
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.test  ## let ruff sort the imports and lay out the code
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, runs, exported and the caches
	rm -rf .venv runs exported site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
