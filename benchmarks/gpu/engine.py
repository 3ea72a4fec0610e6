"""
Does vLLM sample from the policy that is trained? E3 with temperatures from 1 to 2, each prompt's own, through 20 large
updates; and how quickly it does, asked once per prompt, against TRL's request for each row. Of LoRA
the adapter alone is sent, and how long a sync takes is beside that of all weights.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.generation import vllm_generation

from benchmarks.generation import BUDGETS, EQUAL, ONE_PER_ROW, compare_calls
from benchmarks.optimizer import make_model, make_tokenizer
from e3_trl import E3GRPOConfig, E3GRPOTrainer
from recipes.quickstart.task import RuleTask

from .report import Case


# The model's embeddings, and the engine's settings: TRL always compiles, and always sleeps at level 2.
CASES = {
    "tied, compiled, sleep level 2": {"tied": True, "enforce_eager": False, "sleep": 2},
    "untied, eager, sleep level 1": {"tied": False, "enforce_eager": True, "sleep": 1},
    "no sleep": {"tied": False, "enforce_eager": False, "sleep": 0},
    # Which sleeps at level 1 of itself, also where TRL asks for 2.
    "the adapter alone": {"tied": False, "enforce_eager": False, "sleep": 2, "lora": True},
}
UPDATES = 20
MAX_DIFFERENCE, MAX_RATIO_ERROR = 0.03, 0.01


class RisingTemperature(TrainerCallback):
    """From 1.0 to 2.0."""

    trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.temperature = 1 + min(1, state.global_step / UPDATES)


def save_model(case: Case, name: str, tied: bool = False) -> str:
    """Folder of a model of random weights, one of `benchmarks.optimizer`; made unless it is there."""
    folder = case.path(f"{name}-tied" if tied else name)
    if not (Path(folder) / "tokenizer.json").exists():
        make_model(name, 8192, case.device, tied).save_pretrained(folder)
        make_tokenizer(RuleTask.characters).save_pretrained(folder)  # last: what is there with it is whole
        torch.cuda.empty_cache()
    return folder


def start_engine(start, *, enforce_eager: bool, sleep: int, **settings):
    """In the place of `vllm.LLM`, where TRL starts it."""
    llm = start(**settings, **{"enforce_eager": True} if enforce_eager else {})
    put_to_sleep = llm.sleep
    llm.sleep = lambda level: put_to_sleep(level=min(level, sleep))
    return llm


def odd_reward(completion_ids, **kwargs) -> list[float]:
    """Gives every group an advantage."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def seconds_of_sync(generation) -> float:
    start = time.perf_counter()
    generation.sync_weights()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def hold(case: Case, trainer, name: str) -> None:
    """Note how far sampling and training were apart, at the worst step and at the last."""
    logs = {
        key: np.array([entry[key] for entry in trainer.state.log_history if key in entry])
        for key in ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean")
    }
    differences, ratios = logs.values()
    case.add(f"log-prob difference, {name}: at first", differences[0], at_most=MAX_DIFFERENCE)
    case.add(
        f"log-prob difference, {name}: after {len(differences) - 1} updates", differences[-1], at_most=MAX_DIFFERENCE
    )
    case.add(f"log-prob difference, {name}: at worst", differences.max(), at_most=MAX_DIFFERENCE)
    worst = ratios[np.abs(ratios - 1).argmax()]
    bounds = {"at_least": 1 - MAX_RATIO_ERROR, "at_most": 1 + MAX_RATIO_ERROR}
    case.add(f"importance ratio, {name}: at worst", worst, **bounds)


def measure(case: Case) -> None:
    engine = dict(CASES[case.name])
    tied, lora = engine.pop("tied"), engine.pop("lora", False)
    sleeps = engine["sleep"] > 0 and not case.miniature  # which is for GPUs alone
    model = save_model(case, "tiny" if case.miniature else "wide", tied)
    vllm_generation.LLM = partial(start_engine, vllm_generation.LLM, **engine)
    config = E3GRPOConfig(
        output_dir=case.path("run"),
        **case.settings,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=16 if case.miniature else 64,
        max_steps=UPDATES + 1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        temperature_schedule="constant",
        temperature_spread=0.5,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=sleeps,
        vllm_lora_sync=lora,
        vllm_max_model_length=256,
        vllm_gpu_memory_utilization=0.3,
        vllm_importance_sampling_mode="token_truncate",
        model_init_kwargs={"dtype": "bfloat16"},
        bf16=not case.miniature,
        gradient_checkpointing=False,
    )
    prompts = Dataset.from_dict({"prompt": [f"A{number}:" for number in range(10, 26)]})
    rising = RisingTemperature()
    adapter = LoraConfig(target_modules="all-linear", r=4 if case.miniature else 32) if lora else None
    rising.trainer = trainer = E3GRPOTrainer(
        model, odd_reward, config, prompts, callbacks=[rising], peft_config=adapter
    )
    trainer.train()
    hold(case, trainer, case.name)
    temperatures = [row for row in trainer.state.log_history if "temperature" in row]
    case.add(f"temperature, {case.name}: at the end", temperatures[-1]["temperature"], at_least=1.9)

    if not tied:
        generation = trainer.vllm_generation
        if sleeps:  # which takes longer than such a call
            generation.sync_weights()
            generation.llm.wake_up(tags=["kv_cache"])
            generation.enable_sleep_mode = False
        case.add(f"a sync, {case.name}", np.median([seconds_of_sync(generation) for _ in range(5)]), "s")
    if not tied and not lora:
        generation.generation_kwargs = {"ignore_eos": True}
        generation.max_completion_length = length = 16 if case.miniature else 128
        num_prompts, rounds = (4, 1) if case.miniature else (64, 5)
        seconds = compare_calls(generation, len(trainer.processing_class), num_prompts, 64, length, rounds)
        for name, times in seconds.items():
            case.add(f"generation, {name}", num_prompts * 8 * length / np.median(times), "tokens/s")
        for name in (EQUAL, BUDGETS):
            ratio = np.median(np.array(seconds[ONE_PER_ROW]) / seconds[name])
            case.add(f"speed over TRL's, {name}", ratio, **{} if case.miniature else {"at_least": 0.95})
