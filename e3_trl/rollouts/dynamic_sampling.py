"""DAPO's dynamic sampling in a generation batch."""

import torch
from accelerate.utils import gather_object

from ..method.dynamic_sampling import DynamicSampling
from .batch import GenerationBatch


def keep_informative_groups(trainer, batch: GenerationBatch, prompts: list, output: tuple) -> tuple:
    """
    Sample further rounds of prompts until every group of the batch has rewards that differ, or the rounds are over.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        batch ([`GenerationBatch`]): the batch, whose first round has been sampled.
        prompts (`list`): the prompts of this process's rows. They become those of the rows that are kept.
        output (`tuple`): what TRL's `_generate` has returned for them.

    Returns:
        `tuple`: the same of the rows that are kept.
    """
    sampling = DynamicSampling(batch.group_ids, len(trainer.train_dataset), [trainer.args.seed, batch.index])
    logs = trainer._pending_extra_logs
    round_prompts, rows = prompts, []
    while True:
        prompt_ids, completion_ids, _, completions, logprobs, *rest = output
        logs.clear()
        rewards = trainer._calculate_rewards(batch.round.examples, round_prompts, completions, completion_ids)
        total = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1)
        sampling.observe(total.masked_fill(rewards.isnan().all(dim=1), torch.nan).cpu().numpy())
        logged = [{name: values[row] for name, values in logs.items()} for row in range(len(prompts))]
        fields = round_prompts, prompt_ids, completion_ids, completions, logprobs or completions, logged
        rows += gather_object(list(zip(*fields, strict=True)))
        if sampling.is_full or len(batch.rounds) > trainer.args.max_resample_rounds:
            break
        drawn = sampling.draw()
        if drawn is None:
            break
        batch.rounds.append(batch.make_round(drawn, trainer.train_dataset))
        round_prompts = [example["prompt"] for example in batch.round.examples]
        output = trainer._generate(round_prompts)

    batch.kept = sampling.rows
    trainer.add_metric("rollouts/sampled", float(len(batch.sampled_ids)))
    trainer.add_metric("rollouts/discarded", float(len(batch.sampled_ids) - len(batch.group_ids)))
    kept = zip(*(rows[row] for row in sampling.rows[batch.share]), strict=True)
    prompts[:], prompt_ids, completion_ids, completions, kept_logprobs, logged = map(list, kept)
    for name in sorted({name for row in rows for name in row[-1]}):  # on all ranks the same
        logs[name] = [row.get(name) for row in logged]
    return prompt_ids, completion_ids, None, completions, kept_logprobs if logprobs else None, *rest
