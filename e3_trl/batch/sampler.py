"""Sampler that repeats each prompt as often as its rollout budget says."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from ..grpo.sampler import PassSampler
from ..method.budget import RolloutBudgetSchedule
from ..method.budget_rules import RULES, Bounds, Rule
from ..method.difficulty import DifficultyTracker


class RolloutBudgetSampler(PassSampler):
    """
    TRL's [`~trl.trainer.utils.RepeatSampler`] with a number of repeats per prompt instead of `mini_repeat_count` for
    all. The total per generation batch stays `batch_size * mini_repeat_count`, so rows per step, rank and micro-batch
    do not change. Without a budget schedule the stream is RepeatSampler's, pass for pass.

    It can be resumed, for the budgets follow from the tracker's ranks, which change only when a new pass begins.

    Args:
        difficulty (`DifficultyTracker`, *optional*):
            Ranks of the prompts. The sampler updates them when a new pass begins. `None` = prompts cannot be told
            apart; then there is no budget schedule.
        budget_schedule (`RolloutBudgetSchedule`, *optional*):
            Bounds of the budgets in each pass. If `None`, every prompt is repeated `mini_repeat_count` times.
        batch_size (`int`, *optional*, defaults to `1`):
            Prompts per generation batch.
        rule (`Callable`, *optional*, defaults to `RULES["rank"]`):
            How a batch is split within the bounds: Algorithm 1, or another of
            [`~e3_trl.method.budget_rules.load_rule`].
        num_candidates (`int`, *optional*):
            Prompts that the trainer chooses these from (PREPO, DPS). The batch's rows are then spread evenly over the
            candidates, and the trainer asks for the [`rows`] of its choice. At most `batch_size * mini_repeat_count`.
        **kwargs:
            Other arguments of [`~trl.trainer.utils.RepeatSampler`].

    Example:

    ```python
    >>> tracker = DifficultyTracker(2, initial_difficulty=[0.0, 1.0])
    >>> sampler = RolloutBudgetSampler(
    ...     data_source=["easy", "hard"],
    ...     mini_repeat_count=3,
    ...     batch_size=2,
    ...     shuffle=False,
    ...     difficulty=tracker,
    ...     budget_schedule=RolloutBudgetSchedule(3, num_generations_min=2, num_generations_step=1),
    ... )
    >>> list(sampler)
    [0, 0, 0, 1, 1, 1]
    >>> sampler.begin_pass(1)
    >>> list(sampler)
    [0, 0, 1, 1, 1, 1]

    ```
    """

    def __init__(
        self,
        difficulty: DifficultyTracker | None,
        budget_schedule: RolloutBudgetSchedule | None = None,
        batch_size: int = 1,
        rule: Rule = RULES["rank"],
        num_candidates: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__(batch_size=num_candidates or batch_size, **kwargs)
        self.rows_per_batch = batch_size * self.mini_repeat_count
        self.num_candidates = num_candidates
        self.difficulty = difficulty
        self.budget_schedule = budget_schedule
        self.rule = rule

    def begin_pass(self, number: int) -> None:
        """Begin a pass, counted from 0: new ranks and wider bounds come into force if it is a later one."""
        if number > self.epoch and self.difficulty is not None:
            self.difficulty.update()
        super().begin_pass(number)

    def state_to_save(self, num_batches: int) -> dict[str, int]:
        """And the bounds in force, for the reader: they follow from the pass."""
        bounds = (self.mini_repeat_count,) * 2
        if self.budget_schedule is not None:
            bounds = self.budget_schedule.bounds(self.epoch)
        names = "num_generations_min", "num_generations_max"
        return super().state_to_save(num_batches) | dict(zip(names, bounds, strict=True))

    def __iter__(self) -> Iterator[int]:
        stream = super().__iter__()
        rows_per_prompt = self.mini_repeat_count * self.repeat_count
        while repeated := list(islice(stream, self.batch_size * rows_per_prompt)):
            prompts_P = np.array(repeated[: self.batch_size * self.mini_repeat_count : self.mini_repeat_count])
            if self.num_candidates is None:
                rows = self.rows(prompts_P)
            else:
                rows = prompts_P[np.arange(self.rows_per_batch) * self.batch_size // self.rows_per_batch]
            yield from rows.tolist() * self.repeat_count

    def __len__(self) -> int:
        return self.num_batches * self.rows_per_batch * self.repeat_count

    def rows(self, prompts: np.ndarray) -> np.ndarray:
        """Each prompt of one generation batch as often as its budget says, shape `(rows_per_batch,)`."""
        if self.budget_schedule is None:
            return np.repeat(prompts, self.mini_repeat_count)
        bounds = Bounds(self.mini_repeat_count, *self.budget_schedule.bounds(self.epoch))
        return np.repeat(prompts, self.rule(self.difficulty.stats(prompts), bounds))
