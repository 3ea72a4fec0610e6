"""Dynamic rollout budget: Section 4.1 and Algorithm 1 of E3 (https://huggingface.co/papers/2505.18573)."""

from dataclasses import dataclass

import numpy as np


# Shares that rounding puts this close below an integer are that integer (8 * 0.1 / 0.8 must give 1 rollout, not 0).
_ROUNDING = 1e-9


def allocate_rollouts(
    difficulty: np.ndarray,
    num_generations: int,
    num_generations_min: int,
    num_generations_max: int,
) -> np.ndarray:
    r"""
    Split a batch's constant total of rollouts over its prompts by difficulty (Algorithm 1).

    With \\( N = B \cdot G \\): (1) every prompt gets \\( G_{min} \\); (2) of the remaining
    \\( N - B \cdot G_{min} \\), prompt \\( i \\) gets the floor of its share \\( k_i / \sum_j k_j \\);
    (3) what is left goes to one prompt after another in descending \\( k \\), each filled up to \\( G_{max} \\).

    The sum is always \\( N \\) and every budget lies in \\( [G_{min}, G_{max}] \\). A harder prompt never gets less
    than an easier one. Differs from the paper's released code, in which step 2 can exceed \\( G_{max} \\). Where the
    paper is silent: a prompt without a difficulty counts as its batch's mean, and if all difficulties are equal or
    unknown every prompt gets \\( G \\).

    Args:
        difficulty (`np.ndarray` of shape `(B,)`):
            Difficulty \\( k \in (0, 1] \\) of each prompt, 1 = hardest, NaN = never sampled.
        num_generations (`int`):
            Mean number of rollouts per prompt, \\( G \\).
        num_generations_min (`int`):
            Fewest rollouts of a prompt, \\( 2 \le G_{min} \le G \\) (an advantage needs two).
        num_generations_max (`int`):
            Most rollouts of a prompt, \\( G_{max} \ge G \\).

    Returns:
        `np.ndarray` of shape `(B,)` and dtype `int64`: rollouts of each prompt.

    Raises:
        `ValueError`: if a bound or a difficulty is out of range.

    Example:

    ```python
    >>> allocate_rollouts([0.25, 0.5, 0.75, 1.0], num_generations=8, num_generations_min=4, num_generations_max=12)
    array([ 5,  7,  8, 12])

    ```
    """
    check_bounds(num_generations, num_generations_min, num_generations_max)
    difficulty_P = np.asarray(difficulty, dtype=np.float64)
    if difficulty_P.ndim != 1:
        raise ValueError(f"difficulty must have shape (B,), got {difficulty_P.shape}.")
    known_P = ~np.isnan(difficulty_P)
    if not ((difficulty_P[known_P] > 0) & (difficulty_P[known_P] <= 1)).all():
        raise ValueError("difficulty must lie in (0, 1], 1 = hardest, NaN = never sampled.")
    if not known_P.any():
        return np.full(len(difficulty_P), num_generations, dtype=np.int64)
    if not known_P.all():
        difficulty_P = np.where(known_P, difficulty_P, difficulty_P[known_P].mean())

    room = num_generations_max - num_generations_min
    remaining = len(difficulty_P) * (num_generations - num_generations_min)
    share_P = remaining * (difficulty_P / difficulty_P.sum())
    extra_P = np.minimum(np.floor(share_P + _ROUNDING).astype(np.int64), room)

    # Step 3: a prompt gets what the prompts before it (in descending k) leave over, up to its own room.
    descending = np.argsort(-difficulty_P, kind="stable")
    room_P = room - extra_P[descending]
    before_P = np.cumsum(room_P) - room_P
    extra_P[descending] += np.clip(remaining - extra_P.sum() - before_P, 0, room_P)
    return num_generations_min + extra_P


def check_bounds(num_generations: int, num_generations_min: int, num_generations_max: int) -> None:
    """Raise `ValueError`, naming the field and the remedy, unless `2 <= G_min <= G <= G_max`."""
    if num_generations_min < 2:
        raise ValueError(
            f"num_generations_min is {num_generations_min}, but an advantage needs at least 2 rollouts of a prompt. "
            "Set it to 2 or more."
        )
    if num_generations_min > num_generations:
        raise ValueError(
            f"num_generations_min is {num_generations_min}, above num_generations ({num_generations}). "
            "Lower num_generations_min or raise num_generations."
        )
    if num_generations_max < num_generations:
        raise ValueError(
            f"num_generations_max is {num_generations_max}, below num_generations ({num_generations}). "
            "Raise num_generations_max or lower num_generations."
        )


@dataclass(frozen=True)
class RolloutBudgetSchedule:
    r"""
    Bounds of a prompt's rollouts in each pass over the dataset: \\( G_{min} = G_{max} = G \\) in the first pass, then
    \\( G_{min} \\) falls and \\( G_{max} \\) rises by `num_generations_step` after each pass, down and up to their
    limits (Section 4.1; 8 -> 4 and 8 -> 12 in steps of 2 in the paper).

    Args:
        num_generations (`int`):
            Mean number of rollouts per prompt, \\( G \\).
        num_generations_min (`int`, *optional*):
            Lower limit of \\( G_{min} \\). `None` = half of `num_generations`, and at least 2: the paper's 4 of 8.
        num_generations_max (`int`, *optional*):
            Upper limit of \\( G_{max} \\). `None` = half as many again as `num_generations`: the paper's 12 of 8.
        num_generations_step (`int`, *optional*, defaults to `2`):
            How far each bound moves per pass.
        starts_ranked (`bool`, *optional*, defaults to `False`):
            Whether difficulty is known before the first pass. Its bounds are then one step wide already, as those of
            the second: the paper, where it is not known, has no such case.

    Example:

    ```python
    >>> schedule = RolloutBudgetSchedule(num_generations=8)
    >>> [schedule.bounds(num_passes) for num_passes in range(4)]
    [(8, 8), (6, 10), (4, 12), (4, 12)]
    >>> RolloutBudgetSchedule(num_generations=8, starts_ranked=True).bounds(0)
    (6, 10)

    ```
    """

    num_generations: int
    num_generations_min: int | None = None
    num_generations_max: int | None = None
    num_generations_step: int = 2
    starts_ranked: bool = False

    def __post_init__(self):
        if self.num_generations_min is None:
            object.__setattr__(self, "num_generations_min", max(2, self.num_generations // 2))
        if self.num_generations_max is None:
            object.__setattr__(self, "num_generations_max", self.num_generations + self.num_generations // 2)
        check_bounds(self.num_generations, self.num_generations_min, self.num_generations_max)
        if self.num_generations_step < 0:
            raise ValueError(f"num_generations_step is {self.num_generations_step}. Set it to 0 or more.")

    def bounds(self, num_passes: int) -> tuple[int, int]:
        r"""\\( (G_{min}, G_{max}) \\) after `num_passes` full passes over the dataset."""
        widening = max(num_passes, int(self.starts_ranked)) * self.num_generations_step
        return (
            max(self.num_generations_min, self.num_generations - widening),
            min(self.num_generations_max, self.num_generations + widening),
        )
