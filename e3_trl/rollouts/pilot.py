"""A pilot in a generation batch: part of each group first, the rest where that part has shown that it is of use."""

import numpy as np

from ..method.budget_rules import commit_rollouts, pilot_rollouts
from .batch import GenerationBatch
from .rounds import ScoredRounds
from .telemetry import rollout_counts


def sample_in_two_parts(trainer, batch: GenerationBatch, prompts: list) -> tuple:
    """
    Sample the batch's rows in two calls, of which the second depends on what the first has given.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        batch ([`GenerationBatch`]): the batch, with the prompts that it begins with.
        prompts (`list`): the prompts of this process's rows. They become those of the rows that are sampled.

    Returns:
        `tuple`: what TRL's `_generate` returns, of all rows, those of a prompt beside each other.
    """
    args, ids, rounds = trainer.args, batch.prompt_ids, ScoredRounds(trainer, batch)
    pilots = pilot_rollouts(len(ids), args.num_generations_min, batch.num_processes)
    first = batch.make_round(np.repeat(ids, pilots), trainer.train_dataset)
    batch.rounds = [first]
    rounds.sample([example["prompt"] for example in first.examples])

    correctness = first.rewards[:, trainer.difficulty_reward_index].cpu().numpy()
    counts = rollout_counts(first.prompt_ids, correctness, np.zeros(len(first.prompt_ids)))  # in the order of `ids`
    rate = counts["correct"] / np.where(counts["scored"] > 0, counts["scored"], np.nan)
    rest = commit_rollouts(rate, pilots, args.num_generations, args.num_generations_max) - pilots
    if rest.any():
        rounds.sample_next(np.repeat(ids, rest))
    order = np.argsort(ids)
    place = order[np.searchsorted(ids, batch.sampled_ids, sorter=order)]
    rows = np.argsort(place, kind="stable")
    batch.group_ids = batch.sampled_ids[rows]
    return rounds.keep(rows, prompts)
