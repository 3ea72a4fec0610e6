"""E3 (Efficiency and Exploration in RL for LLMs, https://huggingface.co/papers/2505.18573) as a TRL trainer."""

from .callbacks import TemperatureCallback
from .config import E3GRPOConfig
from .evaluation.metrics import pass_at_k
from .method.advantages import group_advantages
from .method.budget import RolloutBudgetSchedule, allocate_rollouts
from .method.difficulty import DifficultyTracker
from .method.temperature import TemperatureSchedule
from .rewards import math_accuracy_reward, math_reasoning_accuracy_reward
from .rollouts.sampler import RolloutBudgetSampler
from .rollouts.telemetry import read_rollouts
from .trainer import E3GRPOTrainer


__version__ = "0.1.0"

__all__ = [
    "DifficultyTracker",
    "E3GRPOConfig",
    "E3GRPOTrainer",
    "RolloutBudgetSampler",
    "RolloutBudgetSchedule",
    "TemperatureCallback",
    "TemperatureSchedule",
    "allocate_rollouts",
    "group_advantages",
    "math_accuracy_reward",
    "math_reasoning_accuracy_reward",
    "pass_at_k",
    "read_rollouts",
]
