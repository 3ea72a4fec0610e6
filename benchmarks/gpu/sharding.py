"""
Does sharding change what is learned? Ten steps of E3 with ZeRO-3 and with FSDP2, of one process, on completions that
do not depend on it: loss, gradient norm, entropy and temperature against those of neither.
"""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor

from e3_trl import E3GRPOConfig, E3GRPOTrainer

from .engine import save_model
from .report import Case


LOGGED = ("loss", "grad_norm", "entropy", "temperature")
MAX_DIFFERENCE = 1e-3


class Completions:
    """Of a step's number and a row's place alone."""

    def __init__(self, trainer, length: int):
        self.trainer, self.length = trainer, length

    def __call__(self, prompt_ids, *args):
        rng = np.random.default_rng(self.trainer.state.global_step)
        lengths = rng.integers(2, self.length, len(prompt_ids))
        return [rng.integers(3, 12, length).tolist() + [1] for length in lengths], None


def let_accelerate_shard_on_a_cpu() -> None:
    """It takes processes on a CPU for ones without FSDP, which PyTorch has there too."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


def leave_out_inference() -> None:
    """On a CPU, DeepSpeed compiles for a minute or more what reduces tensors in inference, which no training calls."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def measure(case: Case) -> None:
    model = save_model(case, "tiny")
    is_sharded = case.name != "none"
    if case.miniature and case.name == "fsdp2":
        let_accelerate_shard_on_a_cpu()
    if case.miniature and case.name == "zero3":
        leave_out_inference()
    config = E3GRPOConfig(
        output_dir=case.path(case.name),
        # On a CPU, DeepSpeed would gather nothing if it were told so.
        **case.settings | {"use_cpu": case.miniature and not is_sharded},
        ddp_backend="gloo" if case.miniature and is_sharded else None,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_generations=4,
        num_generations_min=2,
        num_generations_max=8,
        max_completion_length=64,
        max_steps=10,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # or a rounding error of a gradient near 0 is a whole step
        num_iterations=2,  # on-policy a loss is 0
        model_init_kwargs={"dtype": "float32"},  # in bfloat16 they would differ by what each keeps in float32
        bf16=False,
        gradient_checkpointing=False,
    )
    prompts = Dataset.from_dict({"prompt": [f"A{number}:" for number in range(10, 18)]})
    trainer = E3GRPOTrainer(
        model, lambda completion_ids, **kwargs: [len(ids) / 7 for ids in completion_ids], config, prompts
    )
    trainer._generate_single_turn = Completions(trainer, 64)
    trainer.train()
    logs = {key: [entry[key] for entry in trainer.state.log_history if key in entry] for key in LOGGED}
    Path(case.path(f"{case.name}.json")).write_text(json.dumps(logs))
    if not is_sharded:
        case.add("change of the entropy in ten steps, unsharded", logs["entropy"][-1] - logs["entropy"][0])
        return
    parts = [isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()]
    case.add(f"share of parameters that are sharded, {case.name}", np.mean(parts), at_least=1)
    expected = json.loads(Path(case.path("none.json")).read_text())
    for key in LOGGED:
        one, other = np.array(expected[key]), np.array(logs[key])
        apart = np.abs(one - other).max() / np.abs(one).max()
        case.add(f"{key}, largest difference over ten steps, {case.name}", apart, at_most=MAX_DIFFERENCE)
