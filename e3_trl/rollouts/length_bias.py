"""The length bias in a generation batch."""

import torch

from ..method.length_bias import length_bias
from .batch import GenerationBatch


def shorten(trainer, batch: GenerationBatch) -> None:
    """Take from the reward of correct completions of easy prompts what they lose for their length."""
    column = trainer.difficulty_reward_index
    device = batch.shaped_rewards.device
    difficulty = trainer.difficulty_of(batch, batch.of_kept(batch.sampled_ids))
    batch.shaped_rewards[:, column] -= length_bias(
        batch.shaped_rewards[:, column] > 0.5,
        batch.of_kept(batch.lengths),
        torch.as_tensor(batch.group_ids, device=device),
        torch.as_tensor(difficulty, device=device),
        trainer.args.length_bias_coef,
        trainer.args.length_bias_fraction,
    )
