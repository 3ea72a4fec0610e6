"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): sample on until every group has something to teach."""

import numpy as np


class DynamicSampling:
    """
    Which groups of which rounds make up one generation batch.

    A batch is a row of slots, each for a group of a given number of rollouts. Every round samples the whole batch
    anew, from other prompts. A group whose rewards are not all equal takes the first free slot of its size; one whose
    rewards are all equal is dropped, for its advantages are zero. A slot that is still free when the rounds are over
    keeps the group that it began with.

    Differs from DAPO's released code: a batch that never fills is trained on as it is, not an error.

    Args:
        prompt_ids (`np.ndarray` of shape `(N,)`):
            Prompt of each row of the first round. Rows of a group are neighbours.
        num_prompts (`int`):
            Size of the dataset that further prompts are drawn from.
        seed (`list[int]`):
            Makes the draws those of a run that is resumed or repeated.

    Attributes:
        prompt_ids (`list[np.ndarray]`): prompt of each row, round by round.

    Example:

    ```python
    >>> sampling = DynamicSampling(np.array([0, 0, 1, 1]), num_prompts=3, seed=[0])
    >>> sampling.observe(np.array([1.0, 0.0, 1.0, 1.0]))
    >>> sampling.is_full, sampling.rows.tolist()
    (False, [0, 1, 2, 3])
    >>> sorted(sampling.draw().tolist())  # every prompt but 0, whose group is kept
    [1, 1, 2, 2]
    >>> sampling.observe(np.array([1.0, 1.0, 0.0, 1.0]))
    >>> sampling.is_full, sampling.rows.tolist()  # in the second slot, the second group of the second round
    (True, [0, 1, 6, 7])

    ```
    """

    def __init__(self, prompt_ids: np.ndarray, num_prompts: int, seed: list[int]) -> None:
        prompt_ids = np.asarray(prompt_ids)
        self.starts = np.flatnonzero(np.r_[True, prompt_ids[1:] != prompt_ids[:-1]])
        self.sizes = np.diff(np.r_[self.starts, len(prompt_ids)])
        self.prompt_ids = [prompt_ids]
        self._num_prompts = num_prompts
        self._rng = np.random.default_rng(seed)
        # The row, over all rounds, at which the group in each slot begins; -1 = the slot is free.
        self._taken = np.full(len(self.starts), -1)

    @property
    def is_full(self) -> bool:
        """Whether every slot holds a group whose rewards differ."""
        return bool((self._taken >= 0).all())

    @property
    def rows(self) -> np.ndarray:
        """Rows of the batch as it stands, shape `(N,)`, counted through all rounds."""
        begins = np.where(self._taken >= 0, self._taken, self.starts)
        return np.concatenate([begin + np.arange(size) for begin, size in zip(begins, self.sizes, strict=True)])

    def observe(self, rewards: np.ndarray) -> None:
        """Take in the rewards of the newest round's rows, shape `(N,)`, NaN = unscorable, which tells nothing."""
        first_row = (len(self.prompt_ids) - 1) * len(rewards)
        for slot, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            group = rewards[start : start + size]
            group = group[~np.isnan(group)]
            # The first round's groups are where they belong, should theirs stay free.
            free = [slot] if first_row == 0 else np.flatnonzero((self._taken < 0) & (self.sizes == size))
            if len(free) and len(group) and group.min() != group.max():
                self._taken[free[0]] = first_row + start

    def draw(self) -> np.ndarray | None:
        """
        Prompts of another round's rows, shape `(N,)`: new ones, or else any that are not kept. `None` if the dataset
        has too few.
        """
        sampled = np.concatenate(self.prompt_ids)
        for excluded in (sampled, sampled[self._taken[self._taken >= 0]]):
            others = np.setdiff1d(np.arange(self._num_prompts), excluded)
            if len(others) >= len(self.sizes):
                break
        else:
            return None
        drawn = np.repeat(self._rng.choice(others, len(self.sizes), replace=False), self.sizes)
        self.prompt_ids.append(drawn)
        return drawn
