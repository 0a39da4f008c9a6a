# make demo   the three stages on the embedded data, into $(OUT)
# make seeds  the demo with five seeds, into outputs/seed0 to seed4, and what they have in common
# make over_optimisation   three longer PPO runs from the demo's models, and the gold score against the KL
# make real   a real model on real posts: three stages and a table, into outputs/real (TLDR_DATA_DIR: the posts)
# make test   the tests that a change should pass: all details, at most 8 minutes on two cores
# make test-slow   the others: every engine, killed runs, two nodes, every layout
# make mutations   breaks one detail of the training code at a time: do the tests notice?
# make lint   ruff
# make data   write data/tldr_mini again (the same bytes)
# make base   write the pretraining corpus and train the mini base model from random weights
# make lock   write requirements*.txt and uv.lock from pyproject.toml (needs uv)
#
# The first of these makes the environment, in .venv. PyTorch comes in builds of very different size:
#   TORCH=cpu     for CPUs, 200 MB: the default on Linux where nvidia-smi finds no GPU
#   TORCH=pypi    what the package index has: on Linux for CUDA, 2.7 GB to download; the default everywhere else
#   TORCH=cu130   any other build that PyTorch offers under this name, as in `make demo TORCH=cu130`
# Another TORCH in a later call replaces the build.
PYTHON ?= python3
OUT ?= outputs/tldr_mini
ARGS ?=            # for all three stages of the demo, such as ARGS="--seed 1"
TORCH ?=
UV ?= uv
PY = .venv/bin/python

.PHONY: demo seeds over_optimisation real test test-slow mutations lint data base lock

# stage NAME FOLDER OPTIONS: a finished stage is not run again, an interrupted one goes on.
STAGE = stage() { name=$$1; out=$$2; shift 2; \
	  if [ -e "$$out/final" ]; then \
	    echo "$$name is already in $$out ('make demo OUT=outputs/second' starts over)"; \
	  elif [ -s "$$out/metrics.jsonl" ]; then \
	    $(PY) scripts/train_$$name.py --output_dir "$$out" "$$@" $(ARGS) --resume; \
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
	  stage ppo "outputs/over/kl$$coef" --model "$(OUT)/sft/final" --reward_model "$(OUT)/reward/final" \
	    --kl_coef $$coef --total_episodes 8192 --eval_steps 2 --eval_rows 200 || exit; done
	$(PY) scripts/studies/over_optimisation.py --sft "$(OUT)/sft/final" --reward_model "$(OUT)/reward/final" \
	  --runs $(KL_COEFS:%=outputs/over/kl%) --rows 200 --output outputs/over.png

real: .venv/ready
	$(PY) scripts/studies/real.py $(ARGS)

# what DeepSpeed compiles stays here: elsewhere it may have been compiled for another processor
PYTEST = TORCH_EXTENSIONS_DIR="$(CURDIR)/.venv/torch_extensions" OMP_NUM_THREADS=1 \
	 $(PY) -m pytest -n 2 --dist loadfile

test: .venv/ready-dev
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: .venv/ready-dev
	@case "$(CURDIR)" in *" "*) echo "note: torch cannot link what DeepSpeed compiles in a path with spaces:" \
	  "runs with an offloaded optimizer will fail here" ;; esac
	$(PYTEST) -m slow $(ARGS)

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

lock:
	$(PYTHON) tests/helpers/write_requirements.py
	$(UV) lock

# The environment is made once, and brought up to date when a requirements file changes.
$(PY):
	@case "$$(uname -s)" in Linux|Darwin) ;; \
	  *) echo "error: $$(uname -s) is not supported; on Windows use WSL 2 (Linux)" >&2; exit 2 ;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11; name another, as in" \
	  "'make PYTHON=python3.12 demo'" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# .venv/torch holds the name of the build that is installed.
TORCH_INDEX = https://download.pytorch.org/whl
ANSWERS = $(PY) -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)'
ifneq ($(strip $(TORCH)),)
ifneq ($(strip $(TORCH)),$(shell cat .venv/torch 2>/dev/null))
.PHONY: .venv/torch
endif
endif

.venv/torch: requirements.txt | $(PY)
	@build="$(strip $(TORCH))"; \
	if [ -z "$$build" ]; then \
	  if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then build=cpu; else build=pypi; fi; \
	fi; \
	set -- $$(grep '^torch==' requirements.txt); \
	size="1.7 GB on the disk"; \
	if [ "$$build" = pypi ]; then \
	  [ "$$(uname -s)" != Linux ] || size="the CUDA build, 2.7 GB to download"; \
	elif $(ANSWERS) "$(TORCH_INDEX)/$$build/torch/" 2>/dev/null; then \
	  set -- "$$@" --index-url "$(TORCH_INDEX)/$$build"; \
	elif [ "$$build" = cpu ]; then \
	  size="it may be the CUDA build, 2.7 GB to download"; \
	  echo "PyTorch's index of CPU builds does not answer: torch comes from the package index"; \
	else echo "error: TORCH: no build '$$build' at $(TORCH_INDEX)/$$build/torch/" >&2; exit 2; fi; \
	if [ -s $@ ] && [ "$$(cat $@)" != "$$build" ]; then $(PY) -m pip uninstall -q -y torch || exit; fi; \
	echo "installing PyTorch ($$build) and what it needs into .venv: $$size; 'make TORCH=...' takes another"; \
	echo "pip install $$*"; $(PY) -m pip install "$$@" && echo "$$build" > $@

.venv/ready: requirements.txt .venv/torch
	$(PY) -m pip install -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(PY) -m pip install -r requirements-dev.txt
	touch $@
