"""E3 (Efficiency and Exploration in RL for LLMs, https://huggingface.co/papers/2505.18573) as a TRL trainer."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .batch.sampler import RolloutBudgetSampler
    from .callbacks import TemperatureCallback
    from .config import E3GRPOConfig
    from .evaluation.metrics import pass_at_k
    from .grpo.config import FastGRPOConfig
    from .grpo.trainer import FastGRPOTrainer
    from .method.advantages import group_advantages
    from .method.budget import RolloutBudgetSchedule, allocate_rollouts
    from .method.difficulty import DifficultyTracker
    from .method.temperature import TemperatureSchedule
    from .rewards import (
        math_accuracy_reward,
        math_reasoning_accuracy_reward,
        reasoning_gym_dataset,
        reasoning_gym_partial_reward,
        reasoning_gym_reward,
    )
    from .runs.rollout_log import read_rollout_columns, read_rollouts
    from .trainer import E3GRPOTrainer

__version__ = "0.1.0"

# Loaded when they are asked for, as in TRL: the trainer takes many seconds where vLLM is installed, and what reads a
# run, or splits rollouts, does not need it.
_MODULES = {
    "DifficultyTracker": "method.difficulty",
    "E3GRPOConfig": "config",
    "E3GRPOTrainer": "trainer",
    "FastGRPOConfig": "grpo.config",
    "FastGRPOTrainer": "grpo.trainer",
    "RolloutBudgetSampler": "batch.sampler",
    "RolloutBudgetSchedule": "method.budget",
    "TemperatureCallback": "callbacks",
    "TemperatureSchedule": "method.temperature",
    "allocate_rollouts": "method.budget",
    "group_advantages": "method.advantages",
    "math_accuracy_reward": "rewards",
    "math_reasoning_accuracy_reward": "rewards",
    "pass_at_k": "evaluation.metrics",
    "read_rollout_columns": "runs.rollout_log",
    "read_rollouts": "runs.rollout_log",
    "reasoning_gym_dataset": "rewards",
    "reasoning_gym_partial_reward": "rewards",
    "reasoning_gym_reward": "rewards",
}
__all__ = [
    "DifficultyTracker",
    "E3GRPOConfig",
    "E3GRPOTrainer",
    "FastGRPOConfig",
    "FastGRPOTrainer",
    "RolloutBudgetSampler",
    "RolloutBudgetSchedule",
    "TemperatureCallback",
    "TemperatureSchedule",
    "allocate_rollouts",
    "group_advantages",
    "math_accuracy_reward",
    "math_reasoning_accuracy_reward",
    "pass_at_k",
    "read_rollout_columns",
    "read_rollouts",
    "reasoning_gym_dataset",
    "reasoning_gym_partial_reward",
    "reasoning_gym_reward",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
