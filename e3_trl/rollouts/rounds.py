"""Rounds of completions of which it is decided, once they are scored, what is sampled next and which rows are kept."""

import numpy as np
import torch
from accelerate.utils import gather_object

from .batch import GenerationBatch


class ScoredRounds:
    """
    What the rounds of a generation batch have given so far, over all processes.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        batch ([`GenerationBatch`]): the batch.
    """

    def __init__(self, trainer, batch: GenerationBatch):
        self.trainer, self.batch = trainer, batch
        self._rows: list[tuple] = []
        self._has_logprobs = False
        self._rest: list = []

    def sample(self, prompts: list) -> np.ndarray:
        """
        Sample and score the batch's newest round.

        Args:
            prompts (`list`): the prompts of this process's rows.

        Returns:
            `np.ndarray` of shape `(R,)`: the total reward of each of the round's rows, NaN = unscorable.
        """
        trainer, logs = self.trainer, self.trainer._pending_extra_logs
        prompt_ids, completion_ids, _, completions, logprobs, *self._rest = trainer.sample_round(prompts)
        self._has_logprobs = logprobs is not None
        logs.clear()
        rewards = trainer._calculate_rewards(self.batch.round.examples, prompts, completions, completion_ids)
        logged = [{name: values[row] for name, values in logs.items()} for row in range(len(prompts))]
        fields = list(prompts), prompt_ids, completion_ids, completions, logprobs or completions, logged
        self._rows += gather_object(list(zip(*fields, strict=True)))
        total = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), torch.nan).cpu().numpy()

    def sample_next(self, prompt_ids: np.ndarray) -> np.ndarray:
        """[`sample`] a further round, with these prompts of the dataset."""
        self.batch.rounds.append(self.batch.make_round(prompt_ids, self.trainer.train_dataset))
        return self.sample([example["prompt"] for example in self.batch.round.examples])

    def keep(self, rows: np.ndarray, prompts: list) -> tuple:
        """
        Train on these rows.

        Args:
            rows (`np.ndarray` of shape `(N,)`): rows of the batch, counted through all rounds.
            prompts (`list`): prompts of this process's rows. They become those of the rows that are kept.

        Returns:
            `tuple`: what TRL's `_generate` returns, of this process's rows.
        """
        batch, logs = self.batch, self.trainer._pending_extra_logs
        batch.kept = rows
        kept = zip(*(self._rows[row] for row in rows[batch.share]), strict=True)
        prompts[:], prompt_ids, completion_ids, completions, logprobs, logged = map(list, kept)
        for name in sorted({name for row in self._rows for name in row[-1]}):  # on all ranks the same
            logs[name] = [row.get(name) for row in logged]
        return prompt_ids, completion_ids, None, completions, logprobs if self._has_logprobs else None, *self._rest
