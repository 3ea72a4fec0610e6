"""Advantages of a generation batch."""

import torch

from ..method.advantages import aggregate_advantages
from .batch import GenerationBatch


def compare(trainer, batch: GenerationBatch) -> None:
    """TRL compares rows of `num_generations`; a group here has its prompt's own number of completions."""
    batch.advantages, std = aggregate_advantages(
        batch.shaped_rewards,
        trainer.reward_weights,
        torch.as_tensor(batch.group_ids, device=trainer.accelerator.device),
        trainer.scale_rewards,
        trainer.multi_objective_aggregation,
    )
    is_equal = torch.isclose(std, torch.zeros_like(std))
    trainer._metrics["train"]["frac_reward_zero_std"][-1] = is_equal.float().mean().item()
