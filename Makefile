# make demo   the three stages on the embedded data, into $(OUT)
# make test   the tests
# make lint   ruff
# make data   write data/tldr_mini again (the same bytes)
# make base   write the pretraining corpus and train the mini base model from random weights
PYTHON ?= python3
OUT ?= outputs/tldr_mini
ARGS ?=            # for all three stages of the demo, such as ARGS="--seed 1"
PY = .venv/bin/python

.PHONY: demo test lint data base

# A finished stage is not run again, an interrupted one goes on.
demo: .venv/ready
	@stage() { name=$$1; shift; \
	  if [ -e "$(OUT)/$$name/final" ]; then echo "$$name is already in $(OUT)/$$name ('make demo OUT=outputs/second' starts over)"; \
	  elif find "$(OUT)/$$name/checkpoints" -maxdepth 1 \( -name 'checkpoint-*' -o -name 'update-*' \) 2>/dev/null | grep -q .; then $(PY) scripts/train_$$name.py --output_dir "$(OUT)/$$name" "$$@" $(ARGS) --resume; \
	  else $(PY) scripts/train_$$name.py --output_dir "$(OUT)/$$name" "$$@" $(ARGS); fi; }; \
	stage sft && \
	stage reward --model "$(OUT)/sft/final" && \
	stage ppo --model "$(OUT)/sft/final" --reward_model "$(OUT)/reward/final"

test: .venv/ready-dev
	$(PY) -m pytest

lint: .venv/ready-dev
	$(PY) -m ruff check .

data: .venv/ready
	$(PY) data/tldr_mini/generate.py

base: .venv/ready
	$(PY) data/tldr_mini/generate.py --pretraining
	$(PY) scripts/train_sft.py --config configs/tldr_mini/base_lists.yaml
	$(PY) scripts/train_sft.py --config configs/tldr_mini/base.yaml

# The environment is made once, and brought up to date when a requirements file changes.
$(PY):
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/ready: requirements.txt | $(PY)
	$(PY) -m pip install -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(PY) -m pip install -r requirements-dev.txt
	touch $@
