"""Reward functions, and the processes in which answers are checked."""

from .accuracy import REWARD_FUNCS, load_reward_func, math_accuracy_reward, math_reasoning_accuracy_reward


__all__ = ["REWARD_FUNCS", "load_reward_func", "math_accuracy_reward", "math_reasoning_accuracy_reward"]
