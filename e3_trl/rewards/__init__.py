"""Reward functions, the processes in which answers are checked, and reasoning-gym's problems with its scorers."""

from .accuracy import REWARD_FUNCS, load_reward_func, math_accuracy_reward, math_reasoning_accuracy_reward
from .reasoning_gym import reasoning_gym_dataset, reasoning_gym_partial_reward, reasoning_gym_reward


__all__ = [
    "REWARD_FUNCS",
    "load_reward_func",
    "math_accuracy_reward",
    "math_reasoning_accuracy_reward",
    "reasoning_gym_dataset",
    "reasoning_gym_partial_reward",
    "reasoning_gym_reward",
]
