# make demo   the three stages on the embedded data, into $(OUT)
# make seeds  the demo with five seeds, into outputs/seed0 to seed4, and what they have in common
# make over_optimisation   three longer PPO runs from the demo's models, and the gold score against the KL
# make test   the tests
# make mutations   breaks one detail of the training code at a time: do the tests notice?
# make lint   ruff
# make data   write data/tldr_mini again (the same bytes)
# make base   write the pretraining corpus and train the mini base model from random weights
PYTHON ?= python3
OUT ?= outputs/tldr_mini
ARGS ?=            # for all three stages of the demo, such as ARGS="--seed 1"
PY = .venv/bin/python

.PHONY: demo seeds over_optimisation test mutations lint data base

# stage NAME FOLDER OPTIONS: a finished stage is not run again, an interrupted one goes on.
STAGE = stage() { name=$$1; out=$$2; shift 2; \
	  if [ -e "$$out/final" ]; then echo "$$name is already in $$out ('make demo OUT=outputs/second' starts over)"; \
	  elif [ -s "$$out/metrics.jsonl" ]; then $(PY) scripts/train_$$name.py --output_dir "$$out" "$$@" $(ARGS) --resume; \
	  else $(PY) scripts/train_$$name.py --output_dir "$$out" "$$@" $(ARGS); fi; }

demo: .venv/ready
	@$(STAGE); \
	stage sft "$(OUT)/sft" && \
	stage reward "$(OUT)/reward" --model "$(OUT)/sft/final" && \
	stage ppo "$(OUT)/ppo" --model "$(OUT)/sft/final" --reward_model "$(OUT)/reward/final"

SEEDS = 0 1 2 3 4
seeds:
	@for seed in $(SEEDS); do $(MAKE) demo OUT=outputs/seed$$seed ARGS="--seed $$seed" || exit; done
	$(PY) scripts/studies/compare_seeds.py --runs $(SEEDS:%=outputs/seed%) --output outputs/seeds.png --markdown

KL_COEFS = 0.0 0.04 0.12
over_optimisation: demo
	@$(STAGE); \
	for coef in $(KL_COEFS); do \
	  stage ppo "outputs/over/kl$$coef" --model "$(OUT)/sft/final" --reward_model "$(OUT)/reward/final" --kl_coef $$coef \
	    --total_episodes 8192 --eval_steps 2 --eval_rows 200 || exit; done
	$(PY) scripts/studies/over_optimisation.py --sft "$(OUT)/sft/final" --reward_model "$(OUT)/reward/final" \
	  --runs $(KL_COEFS:%=outputs/over/kl%) --rows 200 --output outputs/over.png

# what DeepSpeed compiles stays here: elsewhere it may have been compiled for another processor
test: .venv/ready-dev
	TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/torch_extensions OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

mutations: .venv/ready-dev
	$(PY) tests/mutations.py $(ARGS)

lint: .venv/ready-dev
	$(PY) -m ruff check .

data: .venv/ready
	$(PY) data/tldr_mini/generate.py

base: .venv/ready
	$(PY) data/tldr_mini/generate.py --pretraining
	$(PY) data/tldr_mini/base_model.py
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
