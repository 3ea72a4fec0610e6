"""Difficulty of a prompt from its cumulative mean reward: Section 4.1 of E3."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .solved_chain import SolvedChain


# Means that are this close, and that rounding alone has put apart, are equal.
_ROUNDING = 1e-10
# What the names of the chain's arrays begin with in a tracker's state.
_CHAIN = "solved_chain."


@dataclass(frozen=True)
class PromptStats:
    """
    What is known of a batch's prompts when their budgets are given: the statistics in force since the last pass ended.

    Args:
        difficulty (`np.ndarray` of shape `(B,)`): rank in (0, 1], 1 = hardest, NaN = not known.
        success_rate (`np.ndarray` of shape `(B,)`): share of right rollouts (reward above 0.5), NaN = not known.
        num_rollouts (`np.ndarray` of shape `(B,)`): scored rollouts so far.
        mean_success_rate (`float`): of all prompts of the dataset that have been sampled, NaN = none was.
        partly_solved (`np.ndarray` of shape `(B,)`, *optional*):
            Probability that some of its rollouts will be right and some wrong
            ([`~e3_trl.method.solved_chain.SolvedChain`]), for rules of the user's own.
    """

    difficulty: np.ndarray
    success_rate: np.ndarray
    num_rollouts: np.ndarray
    mean_success_rate: float = np.nan
    partly_solved: np.ndarray | None = None


class DifficultyTracker:
    r"""
    Ranks prompts by their cumulative mean reward, easiest first: \\( k_i = rank(q_i) / |D| \\), 1 = hardest.

    Prompts with equal means share the mean of their ranks (an index order would give equal prompts different budgets).
    A prompt that was never sampled has no difficulty (NaN) unless a starting one is given. Ranks change only in
    [`DifficultyTracker.update`], in the paper once per pass.

    Differs from the paper where a pass has left prompts out, which it has no case of: \\( |D| \\) is then the number
    of prompts that have a rank, so that the hardest has 1 also after a pass over a fifth of the data. Algorithm 1
    goes by the shares alone, which are the same.

    Args:
        num_prompts (`int`):
            Number of prompts in the dataset.
        initial_difficulty (`np.ndarray` of shape `(num_prompts,)`, *optional*):
            Starting difficulty in [0, 1], 1 = hardest, NaN = unknown. It ranks a prompt as a mean reward of
            `1 - initial_difficulty` would, until the prompt has been sampled.
        decay (`float`, *optional*, defaults to `1.0`):
            What a count is multiplied by after each pass, in (0, 1]: 1 = all rollouts of the run count alike (the
            paper), less = older ones count less, as the policy that made them is less like today's.
        prior (`float`, *optional*, defaults to `0.0`):
            Right and wrong rollouts that a prompt is taken to have had before its first: with \\( a \\) of each the
            mean is that of a Beta posterior, \\( (r + a) / (n + 2 a) \\)
            (https://huggingface.co/papers/2507.04632). A prompt that was never solved then still has a chance.
        predicts (`bool`, *optional*, defaults to `False`):
            Whether there is a `solved_chain`, which takes 104 bytes a prompt.

    Attributes:
        difficulty (`np.ndarray` of shape `(num_prompts,)`):
            The ranks in force, in (0, 1] or NaN.
        success_rate (`np.ndarray` of shape `(num_prompts,)`):
            The shares of right rollouts (reward above 0.5) in force, or NaN. With rewards of 0 and 1 they are the mean
            rewards, which the ranks are of; with others, such as -1 and 1, they are not.
        num_rollouts (`np.ndarray` of shape `(num_prompts,)`):
            Scored rollouts so far, \\( n_i \\).
        reward_sum (`np.ndarray` of shape `(num_prompts,)`):
            Sum of their rewards, \\( r_i \\).
        num_correct (`np.ndarray` of shape `(num_prompts,)`):
            How many of them are right.
        solved_chain ([`~e3_trl.method.solved_chain.SolvedChain`], *optional*):
            What predicts which prompts will be partly solved, from the same rollouts.

    Example:

    ```python
    >>> tracker = DifficultyTracker(4)
    >>> tracker.observe([0, 0, 1, 1, 2, 2], [1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    >>> tracker.update()
    >>> tracker.difficulty
    array([0.33333333, 0.83333333, 0.83333333,        nan])

    ```
    """

    def __init__(
        self,
        num_prompts: int,
        initial_difficulty: np.ndarray | None = None,
        decay: float = 1.0,
        prior: float = 0.0,
        predicts: bool = False,
    ):
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}. Set it in (0, 1], 1 = none.")
        if not 0 <= prior < np.inf:
            raise ValueError(f"prior is {prior}. Set it to 0 (none) or more.")
        self.decay, self.prior = decay, prior
        self.num_rollouts = np.zeros(num_prompts, dtype=np.float64)
        self.reward_sum = np.zeros(num_prompts, dtype=np.float64)
        self.num_correct = np.zeros(num_prompts, dtype=np.float64)
        if initial_difficulty is None:
            initial_difficulty = np.full(num_prompts, np.nan)
        self.initial_difficulty = np.asarray(initial_difficulty, dtype=np.float64)
        if self.initial_difficulty.shape != (num_prompts,):
            raise ValueError(
                f"initial_difficulty must have shape ({num_prompts},), got {self.initial_difficulty.shape}."
            )
        self.solved_chain: SolvedChain | None = None
        self.update()
        if predicts:
            self.solved_chain = SolvedChain(num_prompts)

    @property
    def mean_reward(self) -> np.ndarray:
        r"""Cumulative mean reward \\( r_i / n_i \\) of each prompt, shape `(num_prompts,)`, NaN if never sampled."""
        return self._per_rollout(self.reward_sum)

    def _per_rollout(self, sums: np.ndarray) -> np.ndarray:
        rollouts = np.where(self.num_rollouts > 0, self.num_rollouts + 2 * self.prior, np.nan)
        return (sums + self.prior) / rollouts

    def observe(self, prompt_ids: np.ndarray, rewards: np.ndarray) -> None:
        """
        Count rollouts and their rewards. NaN rewards (unscorable) are not counted.

        Args:
            prompt_ids (`np.ndarray` of shape `(N,)`): index of each rollout's prompt in the dataset.
            rewards (`np.ndarray` of shape `(N,)`): its correctness reward, before any length bias.
        """
        prompt_ids_N, rewards_N = np.asarray(prompt_ids), np.asarray(rewards, dtype=np.float64)
        scored_N = ~np.isnan(rewards_N)
        np.add.at(self.num_rollouts, prompt_ids_N[scored_N], 1)
        np.add.at(self.reward_sum, prompt_ids_N[scored_N], rewards_N[scored_N])
        np.add.at(self.num_correct, prompt_ids_N[scored_N], rewards_N[scored_N] > 0.5)
        if self.solved_chain is not None:
            self.solved_chain.observe(prompt_ids_N, rewards_N)

    def update(self) -> None:
        """Put new ranks in force: a full pass over the dataset is over."""
        mean_reward, self.success_rate = (
            np.where(self.num_rollouts > 0, self._per_rollout(sums), 1 - self.initial_difficulty)
            for sums in (self.reward_sum, self.num_correct)
        )
        for counts in (self.num_rollouts, self.reward_sum, self.num_correct):
            counts *= self.decay
        if self.solved_chain is not None:
            self.solved_chain.begin_pass()
        self._note_mean()
        # Cumulative means take few values: ranking these is several times faster than ranking a million prompts.
        value_P, means = pd.factorize(mean_reward)  # the code of NaN is -1, the last entry of `tie` and of `rank`
        easiest_first = np.argsort(-means)
        ordered = means[easiest_first]
        # Decayed counts are rounded: 3/4 of 8 rollouts and of 12 are neighbours then, and no further apart than this.
        is_other = ~np.isclose(ordered[1:], ordered[:-1], rtol=_ROUNDING, atol=_ROUNDING)
        tie = np.full(len(means) + 1, -1)
        tie[easiest_first] = np.cumsum(np.r_[0, is_other])[: len(means)]
        tie_P = tie[value_P]
        size = np.bincount(tie_P[tie_P >= 0])
        rank = np.append(np.cumsum(size) - (size - 1) / 2, np.nan)
        self.difficulty = rank[tie_P] / max(size.sum(), 1)

    def stats(self, prompt_ids: np.ndarray) -> PromptStats:
        """What a budget rule gets of these prompts, of shape `(B,)`."""
        columns = (values[prompt_ids] for values in (self.difficulty, self.success_rate, self.num_rollouts))
        predicted = None if self.solved_chain is None else self.solved_chain.partly_solved(prompt_ids)
        return PromptStats(*columns, mean_success_rate=self._mean_success_rate, partly_solved=predicted)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays of shape `(num_prompts,)` from which [`DifficultyTracker.load_state_dict`] goes on exactly."""
        chain = {} if self.solved_chain is None else self.solved_chain.state_dict()
        return {
            **{_CHAIN + name: values for name, values in chain.items()},
            "num_rollouts": self.num_rollouts.copy(),
            "reward_sum": self.reward_sum.copy(),
            "num_correct": self.num_correct.copy(),
            "difficulty": self.difficulty.copy(),
            "success_rate": self.success_rate.copy(),
        }

    def load_state_dict(self, state_dict: dict[str, np.ndarray]) -> None:
        """Restore what [`DifficultyTracker.state_dict`] returned; `ValueError` if it is of another dataset size."""
        chain = {name: values for name, values in state_dict.items() if name.startswith(_CHAIN)}
        if chain and self.solved_chain is not None:  # else it was switched on since, and nothing is known yet
            self.solved_chain.load_state_dict({name.removeprefix(_CHAIN): values for name, values in chain.items()})
        for name, current in self.state_dict().items():
            if name.startswith(_CHAIN):
                continue
            if np.shape(state_dict[name]) != current.shape:
                raise ValueError(f"{name} has shape {np.shape(state_dict[name])}, expected {current.shape}.")
            setattr(self, name, np.array(state_dict[name], dtype=current.dtype))
        self._note_mean()

    def _note_mean(self) -> None:
        known = ~np.isnan(self.success_rate)
        self._mean_success_rate = float(self.success_rate[known].mean()) if known.any() else np.nan

    state_to_save = state_dict

    def restore(self, state: dict | None) -> None:
        """Go on from a checkpoint's state; `None` = it has none, and nothing is known of the prompts."""
        if state is not None:
            self.load_state_dict(state)
