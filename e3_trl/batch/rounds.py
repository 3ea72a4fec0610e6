"""How the completions of a generation batch are sampled: in one call, or in rounds that depend on what came before."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object

from ..method.advantages import total_rewards
from ..method.budget_rules import (
    VIGOR_ROUNDS,
    Bounds,
    commit_rollouts,
    pilot_rollouts,
    refine_rollouts,
    split_rounds,
)
from ..method.counts import rollout_counts
from ..method.dynamic_sampling import DynamicSampling
from .batch import GenerationBatch, Round


# Of a round and the prompts of this process's rows: what TRL's `_generate` returns.
Sample = Callable[[Round, list], tuple]
# Of a round, prompts, completions and their tokens: rewards of all processes' rows by function, `(R, num_funcs)`.
Score = Callable[[Round, list, list, list], torch.Tensor]


class OneCall:
    """
    All rows in one call.

    Args:
        batch ([`GenerationBatch`]): the batch, with the prompts that it begins with.
        sample, score (`Callable`): how a round is sampled and scored.
    """

    def __init__(self, batch: GenerationBatch, sample: Sample, score: Score):
        self.batch, self.sample, self.score = batch, sample, score

    def generate(self, prompts: list) -> tuple:
        """
        Sample the batch.

        Args:
            prompts (`list`): prompts of this process's rows. They become those of the rows that are trained on.

        Returns:
            `tuple`: what TRL's `_generate` returns, of this process's rows.
        """
        return self.sample(self.batch.round, prompts)

    def rewards(self, prompts: list, completions: list, completion_ids: list) -> torch.Tensor:
        """Rewards of the rows that are trained on, of all processes, by function; shape `(N, num_funcs)`."""
        newest = self.batch.round
        newest.rewards = self.score(newest, prompts, completions, completion_ids)
        return newest.rewards


class Rounds(OneCall):
    """
    Rounds of completions, of which it is decided, once they are scored, what is sampled next and which rows are kept.
    A method is a subclass with [`Rounds.choose`].

    Args:
        reward_weights (`torch.Tensor` of shape `(num_funcs,)`): weight of each reward function.
        aggregation (`str`): how several of them become one advantage (`multi_objective_aggregation`).
        extra_logs (`dict[str, list]`): what reward functions have logged of the rows that they were given last.
        **kwargs: as in [`OneCall`].
    """

    def __init__(self, reward_weights: torch.Tensor, aggregation: str, extra_logs: dict, **kwargs):
        super().__init__(**kwargs)
        self.reward_weights, self.aggregation, self.extra_logs = reward_weights, aggregation, extra_logs
        self._rows: list[tuple] = []
        self._has_logprobs = False
        self._rest: list = []

    def choose(self) -> np.ndarray:
        """Run rounds. Returns the rows to train on, shape `(N,)`, counted through all rounds."""
        raise NotImplementedError

    def run(self) -> np.ndarray:
        """
        Sample and score the batch's newest round.

        Returns:
            `np.ndarray` of shape `(R,)`: what each of the round's rows is compared by, NaN = unscorable. Equal in a
            group whose advantages are zero.
        """
        newest, logs = self.batch.round, self.extra_logs
        prompts = [example["prompt"] for example in newest.examples]
        prompt_ids, completion_ids, _, completions, logprobs, *self._rest = self.sample(newest, prompts)
        self._has_logprobs = logprobs is not None
        logs.clear()
        newest.rewards = self.score(newest, prompts, completions, completion_ids)
        logged = [{name: values[row] for name, values in logs.items()} for row in range(len(prompts))]
        fields = prompts, prompt_ids, completion_ids, completions, logprobs or completions, logged
        self._rows += gather_object(list(zip(*fields, strict=True)))
        groups = torch.as_tensor(newest.prompt_ids, device=newest.rewards.device)
        total = total_rewards(newest.rewards, self.reward_weights, groups, self.aggregation)
        # What cancels out over the functions does so to rounding, where each was divided by a deviation.
        return (total.round(decimals=5) if self.aggregation == "normalize_then_sum" else total).cpu().numpy()

    def run_next(self, prompt_ids: np.ndarray) -> np.ndarray:
        """[`Rounds.run`] a further round, with these prompts of the dataset."""
        self.batch.rounds.append(self.batch.make_round(prompt_ids))
        return self.run()

    def generate(self, prompts: list) -> tuple:
        batch, logs = self.batch, self.extra_logs
        batch.kept = self.choose()
        kept = zip(*(self._rows[row] for row in batch.kept[batch.share]), strict=True)
        prompts[:], prompt_ids, completion_ids, completions, logprobs, logged = map(list, kept)
        logs.clear()
        for name in sorted({name for row in self._rows for name in row[-1]}):  # on all ranks the same
            logs[name] = [row.get(name) for row in logged]
        return prompt_ids, completion_ids, None, completions, logprobs if self._has_logprobs else None, *self._rest

    def rewards(self, prompts: list, completions: list, completion_ids: list) -> torch.Tensor:
        return self.batch.of_kept(self.batch.rewards)


class InformativeGroups(Rounds):
    """
    DAPO's dynamic sampling: rounds of prompts until every group has rewards that differ, or the rounds are over.

    Args:
        seed (`int`): the run's.
        max_rounds (`int`): rounds after the first, at most.
        **kwargs: as in [`Rounds`].
    """

    def __init__(self, seed: int, max_rounds: int, **kwargs):
        super().__init__(**kwargs)
        self.seed, self.max_rounds = seed, max_rounds

    def choose(self) -> np.ndarray:
        batch = self.batch
        sampling = DynamicSampling(batch.group_ids, len(batch.dataset), [self.seed, batch.index])
        sampling.observe(self.run())
        while not sampling.is_full and len(batch.rounds) <= self.max_rounds:
            drawn = sampling.draw()
            if drawn is None:
                break
            sampling.observe(self.run_next(drawn))
        return sampling.rows


class Portions(Rounds):
    """
    Part of each group first, the rest where that part has shown that it is of use. All that is sampled is trained on.

    Args:
        bounds ([`Bounds`]): mean, fewest and most rollouts of a prompt.
        correctness_column (`int`): column of the rewards that tells right from wrong.
        **kwargs: as in [`Rounds`].
    """

    def __init__(self, bounds: Bounds, correctness_column: int, **kwargs):
        super().__init__(**kwargs)
        self.bounds, self.correctness_column = bounds, correctness_column

    def run_further(self, ids: np.ndarray, first: np.ndarray) -> None:
        """Run the rounds after the first one, which gave each of the prompts `ids` so many rollouts."""
        raise NotImplementedError

    def choose(self) -> np.ndarray:
        batch, ids = self.batch, self.batch.prompt_ids
        first = pilot_rollouts(len(ids), self.bounds.num_generations_min, batch.num_processes)
        batch.rounds = [batch.make_round(np.repeat(ids, first))]
        self.run()
        self.run_further(ids, first)
        rows = np.argsort(self.places(ids), kind="stable")
        batch.group_ids = batch.sampled_ids[rows]
        return rows

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Of each row that was sampled, the place of its prompt in `ids`."""
        order = np.argsort(ids)
        return order[np.searchsorted(ids, self.batch.sampled_ids, sorter=order)]


class Pilot(Portions):
    """The rest in one round, to prompts that were not always right ([`~e3_trl.method.budget_rules`])."""

    def run_further(self, ids, first):
        batch = self.batch
        correctness = batch.round.rewards[:, self.correctness_column].cpu().numpy()
        # In the order of `ids`.
        counts = rollout_counts(batch.round.prompt_ids, correctness, np.zeros(len(correctness)))
        rate = counts["correct"] / np.where(counts["scored"] > 0, counts["scored"], np.nan)
        rest = commit_rollouts(rate, first, self.bounds.num_generations, self.bounds.num_generations_max) - first
        if rest.any():
            self.run_next(np.repeat(ids, rest))


class Vigor(Portions):
    """The rest in three rounds, each to the half of its prompts whose rewards vary most."""

    def run_further(self, ids, first):
        batch, sampled, active = self.batch, first, np.ones(len(ids), dtype=bool)
        rest = len(ids) * self.bounds.num_generations - first.sum()
        for rows in split_rounds(int(rest), VIGOR_ROUNDS, batch.num_processes):
            groups = torch.as_tensor(batch.sampled_ids, device=batch.rewards.device)
            # Also where each function is normalized in its group, after which all vary alike.
            total = total_rewards(batch.rewards, self.reward_weights, groups).double().cpu()
            by_prompt = pd.Series(total.numpy()).groupby(self.places(ids))
            variance, mean = (
                values.reindex(range(len(ids))).to_numpy() for values in (by_prompt.var(), by_prompt.mean())
            )
            given, active = refine_rollouts(variance, mean, sampled, active, rows, self.bounds.num_generations_max)
            self.run_next(np.repeat(ids, given))
            sampled = sampled + given


ROUNDS = {"pilot": Pilot, "vigor": Vigor}


def sampling_of(
    args, batch: GenerationBatch, sample: Sample, score: Score, correctness_column: int, **kwargs
) -> OneCall:
    """
    How a batch is sampled under these settings.

    Args:
        args ([`E3GRPOConfig`]): the run's configuration.
        batch, sample, score: as in [`OneCall`].
        correctness_column (`int`): column of the rewards that tells right from wrong.
        **kwargs: further arguments of [`Rounds`].
    """
    how = {"batch": batch, "sample": sample, "score": score}
    kwargs["aggregation"] = args.multi_objective_aggregation
    if args.dynamic_sampling:
        return InformativeGroups(args.seed, args.max_resample_rounds, **how, **kwargs)
    if args.rollout_allocation in ROUNDS:
        bounds = Bounds(args.num_generations, args.num_generations_min, args.num_generations_max)
        return ROUNDS[args.rollout_allocation](bounds, correctness_column, **how, **kwargs)
    return OneCall(**how)
