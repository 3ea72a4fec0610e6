"""
Does a recipe take the memory that `e3-trl memory` says? Two updates and an evaluation of the LoRA recipe with the 1.5B
model, fewer rows an update, and every row of full length: vLLM samples a little, and the rest is made up.
"""

from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback

from e3_trl.commands.memory import estimate
from e3_trl.commands.train import make_parser, make_trainer

from .engine import save_model
from .report import Case


RECIPES = Path(__file__).parents[2] / "recipes" / "DeepSeek-R1-Distill-Qwen-1.5B"
TOLERANCE = 0.15
SMALL = {
    "bf16": False,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": False,
    "lora_r": 4,
    "max_completion_length": 16,
    "per_device_eval_batch_size": 8,
    "use_cpu": True,
    "vllm_enable_sleep_mode": False,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": 256,
}


class Meter(TrainerCallback):
    """
    Bytes at the peak of each phase, on a CPU the process's.

    Args:
        cuda (`bool`): whether there is a GPU.
    """

    def __init__(self, cuda: bool):
        self.cuda, self.peaks = cuda, {}
        self.others = self.used() if cuda else 0

    def used(self) -> int:
        if not self.cuda:
            return psutil.Process().memory_info().rss
        free, total = torch.cuda.mem_get_info()
        return total - free

    def watch(self, trainer, length: int) -> None:
        """Sample little, hand out rows of `length` tokens, and begin a phase when they are there."""
        self.trainer, engine = trainer, trainer.vllm_generation
        generate, put_to_sleep, rng = engine.generate, engine.llm.sleep, np.random.default_rng(0)
        engine.max_completion_length = 8

        def full_length(*args, **kwargs):
            prompts, completions, logps, tokens = generate(*args, **kwargs)
            self.peaks.setdefault("sampling", self.used() - self.others)
            longer = [ids[:8] + rng.integers(3, 12, length - len(ids[:8])).tolist() for ids in map(list, completions)]
            logps = [[*row[:8], *[row[0]] * (length - len(row[:8]))] for row in logps]
            self.begin()
            return prompts, longer, logps, tokens

        def sleep(level):
            self.peaks["sampling"] = self.used() - self.others  # at last, with the optimizer's state
            put_to_sleep(level=level)

        engine.generate, engine.llm.sleep = full_length, sleep
        trainer.add_callback(self)

    def begin(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def end(self, phase: str) -> None:
        """What the phase has added at its peak, and what is there in all phases."""
        if not self.cuda:
            self.peaks[phase] = self.used()
            return
        own = [*self.trainer.model.parameters(), *self.trainer.model.buffers()]
        if self.trainer.optimizer is not None:
            states = self.trainer.optimizer.optimizer.state.values()
            own += [value for state in states for value in state.values() if torch.is_tensor(value)]
        added = torch.cuda.max_memory_allocated() - self.before
        self.peaks[phase] = added + sum(tensor.nbytes for tensor in own if tensor.is_cuda)

    def on_step_end(self, args, state, control, **kwargs):
        self.end("training")


def measure(case: Case) -> None:
    gib = 24 if case.miniature else torch.cuda.get_device_properties(0).total_memory / 2**30
    base = RECIPES / f"config_e3_lora_{80 if gib > 75 else 24}gb.yaml"
    model = save_model(case, "tiny" if case.miniature else "qwen2-1.5b")
    data = Path(case.path("memory.jsonl"))
    recipe = yaml.safe_load(base.read_text()) | {
        "dataset_name": str(data),
        "disable_tqdm": True,
        "eval_strategy": "no",
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "model_name_or_path": model,
        "output_dir": case.path("memory"),
        "reward_funcs": ["benchmarks.gpu.engine.odd_reward"],
        "rollout_allocation": "uniform",
        "save_strategy": "no",
    }
    recipe |= SMALL if case.miniature else {}
    path = Path(model) / "recipe.yaml"  # beside the model's config
    path.write_text(yaml.safe_dump(recipe))
    length = recipe["max_completion_length"]
    prompts = [f"A{number:0{recipe['vllm_max_model_length'] - length - 2}}:" for number in range(32)]
    Dataset.from_dict({"prompt": prompts}).to_json(data)

    meter = Meter(not case.miniature)
    trainer = make_trainer(*make_parser().parse_args_and_config(["--config", str(path)]))
    meter.watch(trainer, length)
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(recipe["per_device_eval_batch_size"])))
    meter.end("evaluation")
    # As CUDA counts, so that rounding to the size on the box does not matter.
    said = estimate(path, gpus=(round(gib * 2**30 / 1e9), 1, 1))
    states = said["weights"] + said["gradients"] + said["optimizer"]
    expected = {
        "sampling": states + recipe["vllm_gpu_memory_utilization"] * said["gpu"],
        "training": states + said["activations"] + said["logits"],
        "evaluation": states + said["evaluation"],
    }
    for phase, value in expected.items():
        case.add(f"{base.stem}, {phase}", meter.peaks[phase] / 2**30, "GiB")
        limits = {} if case.miniature else {"at_least": 1 - TOLERANCE, "at_most": 1 + TOLERANCE}
        case.add(f"{phase} over the {value / 2**30:.3g} GiB of e3-trl memory", meter.peaks[phase] / value, **limits)
    peaks = max(meter.peaks.values()), said["peak"]
    limits = {} if case.miniature else {"at_least": 1 - TOLERANCE, "at_most": 1 + TOLERANCE}
    case.add(f"peak over the {peaks[1] / 2**30:.3g} GiB of e3-trl memory", peaks[0] / peaks[1], **limits)
