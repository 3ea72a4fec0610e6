"""DAPO's dynamic sampling in a generation batch."""

from ..method.dynamic_sampling import DynamicSampling
from .batch import GenerationBatch
from .rounds import ScoredRounds


def keep_informative_groups(trainer, batch: GenerationBatch, prompts: list) -> tuple:
    """
    Sample rounds of prompts until every group of the batch has rewards that differ, or the rounds are over.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        batch ([`GenerationBatch`]): the batch, with its first round.
        prompts (`list`): the prompts of this process's rows. They become those of the rows that are kept.

    Returns:
        `tuple`: what TRL's `_generate` returns, of the rows that are kept.
    """
    sampling = DynamicSampling(batch.group_ids, len(trainer.train_dataset), [trainer.args.seed, batch.index])
    rounds = ScoredRounds(trainer, batch)
    sampling.observe(rounds.sample(prompts))
    while not sampling.is_full and len(batch.rounds) <= trainer.args.max_resample_rounds:
        drawn = sampling.draw()
        if drawn is None:
            break
        sampling.observe(rounds.sample_next(drawn))
    trainer.add_metric("rollouts/sampled", float(len(batch.sampled_ids)))
    trainer.add_metric("rollouts/discarded", float(len(batch.sampled_ids) - len(batch.group_ids)))
    return rounds.keep(sampling.rows, prompts)
