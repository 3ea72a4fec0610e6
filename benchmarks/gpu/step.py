"""
Where does the time of a whole step go? The 1.5B model with vLLM, which sleeps while it is trained, 64 rows of up to
1,024 tokens: stock GRPOTrainer and FastGRPOTrainer on one engine, a step each in turns.
"""

import math
import os
from functools import cache, partial

import numpy as np
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation

from benchmarks.optimizer import MODELS, STOCK, Bench, StepClock
from e3_trl import FastGRPOConfig, FastGRPOTrainer

from .engine import odd_reward, save_model
from .report import Case


PHASES = ("generation", "sync", "scoring", "rewards", "optimizer")


class PhaseClock(StepClock):
    """Also tells the parts of getting rows from each other."""

    def watch(self, trainer):
        super().watch(trainer)
        trainer._prepare_inputs = self._timed("_prepare_inputs", trainer._prepare_inputs)
        engine = trainer.vllm_generation
        # Which wakes the engine with the weights if it sleeps, so syncing may be inside of it.
        engine.sync_weights = self._timed("sync", engine.sync_weights)
        engine.generate = self._timed("generate", engine.generate)

    def on_step_end(self, args, state, control, **kwargs):
        end, spent = self._now(), self.spent
        self.step = end - self.first["get_batch_samples"]
        self.phases = {
            "generation": spent["_generate"] - spent["sync"],
            "sync": spent["sync"],
            "rewards": spent["_calculate_rewards"],
            "scoring": spent["_prepare_inputs"] - spent["_generate"] - spent["_calculate_rewards"],
            "optimizer": self.step - spent["_prepare_inputs"],
        }
        self.generation = spent["_generate"]
        self.optimizer = self.phases["optimizer"]


def one_engine(start, **settings):
    """
    An engine for all trainers that ask for these settings: each brings its weights.

    Args:
        start (`Callable`): gives the same one for the same settings.
    """
    engine = start(**settings)
    vars(engine).pop("generate", None)  # what the trainer before has put in its place
    if engine.llm_engine.is_sleeping():
        engine.wake_up()  # which the next one puts to sleep
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # or accelerate takes the next one for one of several processes
        os.environ.pop(name, None)
    return engine


def measure(case: Case) -> None:
    name = "tiny" if case.miniature else "qwen2-1.5b"
    model = save_model(case, name)
    length, mean = (16, 6) if case.miniature else (1024, 350)
    # Random weights hardly ever end a completion. So lengths are geometric, which is long-tailed.
    end = math.log(MODELS[name]["vocab_size"] / mean)
    vllm_generation.LLM = partial(one_engine, cache(vllm_generation.LLM))
    trainers, calls = {}, {}
    for name, trainer_class, config_class in (
        (STOCK, GRPOTrainer, GRPOConfig),
        ("FastGRPOTrainer", FastGRPOTrainer, FastGRPOConfig),
    ):
        config = config_class(
            output_dir=case.path(name),
            **case.settings,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=8 if case.miniature else 16,
            num_generations=8,
            max_completion_length=length,
            generation_kwargs={"logit_bias": {1: end}},
            max_steps=1,
            learning_rate=1e-6,
            optim="sgd",
            use_vllm=True,
            vllm_mode="colocate",
            vllm_enable_sleep_mode=not case.miniature,
            vllm_max_model_length=256 if case.miniature else 1088,
            vllm_gpu_memory_utilization=0.3,
            vllm_importance_sampling_mode="token_truncate",
            model_init_kwargs={"dtype": "bfloat16"},
            bf16=not case.miniature,
            gradient_checkpointing=not case.miniature,
        )
        prompts = Dataset.from_dict({"prompt": [f"A{number}:" for number in range(10, 18)]})
        trainers[name] = trainer_class(model, odd_reward, config, prompts)
        engine = trainers[name].vllm_generation.llm
        calls[name] = engine.generate
    bench = Bench(trainers, PhaseClock)
    found = {name: [] for name in trainers}
    for turn in range(2 if case.miniature else 3):
        for name, trainer in trainers.items():
            # Each turn is a run from step 0, and the engine has the other's weights.
            trainer._last_loaded_step, engine.generate = -1, calls[name]
            bench.turn(name)
            if turn > 0:
                clock = bench.clocks[name]
                found[name].append({**clock.phases, "step": clock.step})
    for name, steps in found.items():
        for phase in ("step", *PHASES):
            case.add(f"{name}: {phase}", np.median([step[phase] for step in steps]), "s")
    ratio = np.median([fast["step"] / stock["step"] for stock, fast in zip(*found.values(), strict=True)])
    case.add("a step of FastGRPOTrainer over one of stock", ratio, **{} if case.miniature else {"at_most": 1.0})
