"""E3 (Efficiency and Exploration in RL for LLMs, https://huggingface.co/papers/2505.18573) as a TRL trainer."""

from .advantages import group_advantages
from .budget import RolloutBudgetSchedule, allocate_rollouts
from .callbacks import TemperatureCallback
from .config import E3GRPOConfig
from .difficulty import DifficultyTracker
from .metrics import pass_at_k
from .rewards import math_accuracy_reward, math_reasoning_accuracy_reward
from .sampler import RolloutBudgetSampler
from .telemetry import read_rollouts
from .temperature import TemperatureSchedule
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
