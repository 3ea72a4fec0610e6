"""Other ways than Algorithm 1 to split a batch's rollouts: by each prompt's success rate, or by a pilot."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .. import dotted_path
from .budget import allocate_rollouts, check_bounds
from .difficulty import PromptStats


class Bounds(NamedTuple):
    r"""Rollouts of a prompt: \\( G \\) in the mean, which the total of a batch holds, and the fewest and the most."""

    num_generations: int
    num_generations_min: int
    num_generations_max: int


# What a batch's prompts get, of what is known of them: shape `(B,)`, integers within the bounds.
Rule = Callable[[PromptStats, Bounds], np.ndarray]


def minimum_variance_rollouts(
    success_rate: np.ndarray, num_generations: int, num_generations_min: int, num_generations_max: int
) -> np.ndarray:
    r"""
    Rollouts with which the sum of the variances of the prompts' mean rewards, \\( \sum_i p_i (1 - p_i) / n_i \\), is
    the least that the bounds allow: \\( n_i \propto \sqrt{p_i (1 - p_i)} \\) where they leave room
    (https://huggingface.co/papers/2602.01601, https://huggingface.co/papers/2505.02391).

    A prompt that is always or never solved has no variance, so it gets the minimum while others can use more. The sum
    is always \\( B \cdot G \\), and every budget lies within the bounds. A prompt without a success rate counts as its
    batch's mean; if all are unknown or alike, every prompt gets \\( G \\).

    Args:
        success_rate (`np.ndarray` of shape `(B,)`): probability \\( p \\) that a rollout is right, NaN = not known.
        num_generations (`int`): mean number of rollouts per prompt, \\( G \\).
        num_generations_min (`int`): fewest rollouts of a prompt, 2 or more.
        num_generations_max (`int`): most rollouts of a prompt.

    Returns:
        `np.ndarray` of shape `(B,)` and dtype `int64`: rollouts of each prompt.

    Raises:
        `ValueError`: if a bound or a success rate is out of range.

    Example:

    ```python
    >>> minimum_variance_rollouts([0.5, 0.1, 0.02, 0.0], 8, 4, 16)
    array([15,  9,  4,  4])

    ```
    """

    def saved(p_P1: np.ndarray, n_N: np.ndarray) -> np.ndarray:
        return p_P1 * (1 - p_P1) / (n_N * (n_N - 1))

    return _most_valuable(success_rate, saved, num_generations, num_generations_min, num_generations_max)


def knapsack_rollouts(
    success_rate: np.ndarray, num_generations: int, num_generations_min: int, num_generations_max: int
) -> np.ndarray:
    r"""
    Rollouts of the greatest total value, where \\( n \\) of a prompt are worth
    \\( p (1 - p)^2 \left( 1 - p^n - (1 - p)^n \right) \\): what a gradient gains, times the chance that their rewards
    differ (Knapsack RL, https://huggingface.co/papers/2509.25849).

    A prompt that is always or never solved is worth nothing, and gets the minimum while others can use more. Sum,
    bounds, arguments, return value and errors are as in [`minimum_variance_rollouts`].

    Example:

    ```python
    >>> knapsack_rollouts([0.5, 0.1, 0.02, 0.0], 8, 4, 16)
    array([ 8, 16,  4,  4])

    ```
    """

    def gained(p_P1: np.ndarray, n_N: np.ndarray) -> np.ndarray:
        return p_P1 * (1 - p_P1) ** 2 * (p_P1 ** (n_N - 1) * (1 - p_P1) + (1 - p_P1) ** (n_N - 1) * p_P1)

    return _most_valuable(success_rate, gained, num_generations, num_generations_min, num_generations_max)


def capability_rollouts(
    success_rate: np.ndarray,
    mean_success_rate: float,
    num_generations: int,
    num_generations_min: int,
    num_generations_max: int,
) -> np.ndarray:
    r"""
    Rollouts of the greatest total value, where \\( n \\) of a prompt are worth
    \\( \left( 1 - e^{-n / (\tau p (1 - p))} \right) Beta(p; \alpha, \beta) \\), with
    \\( \alpha = 1 + 5 F, \beta = 7 - \alpha \\) and \\( F \\) the run's mean failure rate: while the policy fails
    often, prompts that it mostly solves are worth most, and later the hard ones (CoBA-RL,
    https://huggingface.co/papers/2602.03048).

    Differs from its released code, which has other tables for \\( p < 0.05 \\) and \\( p > 0.99 \\) and another
    exponent: here \\( p \\) is taken to lie in [0.01, 0.99], and \\( \tau = 4 G \\), with which a prompt of
    \\( p = 1/2 \\) has had most of its worth after \\( G \\) rollouts. Until anything is known every prompt gets
    \\( G \\). Sum, bounds, other arguments, return value and errors are as in [`minimum_variance_rollouts`].

    Args:
        mean_success_rate (`float`): of all prompts that the run has sampled, \\( 1 - F \\); NaN = none.

    Example:

    ```python
    >>> capability_rollouts([0.9, 0.5, 0.1, 0.02], 0.2, 8, 4, 12)
    array([12, 12,  4,  4])
    >>> capability_rollouts([0.9, 0.5, 0.1, 0.02], 0.9, 8, 4, 12)
    array([ 4, 12, 12,  4])

    ```
    """
    alpha = 1 + 5 * (1 - (0.5 if np.isnan(mean_success_rate) else mean_success_rate))

    def gained(p_P1: np.ndarray, n_N: np.ndarray) -> np.ndarray:
        p_P1 = p_P1.clip(0.01, 0.99)
        rate_P1 = 1 / (4 * num_generations * p_P1 * (1 - p_P1))
        saturation_PN = np.exp(-(n_N - 1) * rate_P1) - np.exp(-n_N * rate_P1)
        return saturation_PN * p_P1 ** (alpha - 1) * (1 - p_P1) ** (6 - alpha)

    return _most_valuable(success_rate, gained, num_generations, num_generations_min, num_generations_max)


def pilot_rollouts(num_prompts: int, num_generations_min: int, num_processes: int = 1) -> np.ndarray:
    """
    The first part of a batch's rollouts: of each prompt the minimum, and of the first ones another where the processes
    could not share them evenly.

    Args:
        num_prompts (`int`): prompts of the batch.
        num_generations_min (`int`): fewest rollouts of a prompt.
        num_processes (`int`, *optional*, defaults to `1`): processes that sample as many rows each.

    Returns:
        `np.ndarray` of shape `(B,)` and dtype `int64`.

    Example:

    ```python
    >>> pilot_rollouts(num_prompts=3, num_generations_min=4, num_processes=8)
    array([6, 5, 5])

    ```
    """
    total = -(-num_prompts * num_generations_min // num_processes) * num_processes
    return total // num_prompts + (np.arange(num_prompts) < total % num_prompts)


def commit_rollouts(
    success_rate: np.ndarray, sampled: np.ndarray, num_generations: int, num_generations_max: int
) -> np.ndarray:
    r"""
    Rollouts in all after a pilot: the rest goes, in equal parts, to prompts that the pilot has not always solved (its
    rewards differ, or nothing was right yet), and to the others what these cannot take. After Pilot-Commit
    (https://huggingface.co/papers/2605.26606), which differs: it puts prompts off or drops them, and its batches vary.

    Args:
        success_rate (`np.ndarray` of shape `(B,)`): share of the pilot that is right, NaN = not known.
        sampled (`np.ndarray` of shape `(B,)`): [`pilot_rollouts`].
        num_generations (`int`): mean number of rollouts per prompt, \\( G \\).
        num_generations_max (`int`): most rollouts of a prompt.

    Returns:
        `np.ndarray` of shape `(B,)` and dtype `int64`: no less than `sampled`, \\( B \cdot G \\) in all.

    Raises:
        `ValueError`: if a bound or a success rate is out of range.

    Example:

    ```python
    >>> commit_rollouts([1.0, 0.5, 0.0, 1.0], np.array([4, 4, 4, 4]), 8, 16)
    array([ 4, 12, 12,  4])
    >>> commit_rollouts([1.0, 0.5, 1.0, 1.0], np.array([4, 4, 4, 4]), 8, 16)
    array([ 6, 16,  5,  5])

    ```
    """

    def is_open(p_P1: np.ndarray, n_N: np.ndarray) -> np.ndarray:
        return np.broadcast_to(p_P1 < 1, (len(p_P1), len(n_N))).astype(float)

    return _most_valuable(success_rate, is_open, num_generations, sampled, num_generations_max)


def split_rounds(rest: int, num_rounds: int, num_processes: int = 1) -> list[int]:
    """
    Rows of each of the rounds that follow a first one, about as many in each, which the processes can share evenly.

    Args:
        rest (`int`): rows of all of them, a multiple of `num_processes`.
        num_rounds (`int`): rounds, of which those that would be empty are left out.
        num_processes (`int`, *optional*, defaults to `1`): processes that sample as many rows each.

    Example:

    ```python
    >>> split_rounds(rest=64, num_rounds=3, num_processes=2)
    [22, 22, 20]

    ```
    """
    shares = rest // num_processes
    each = [shares // num_rounds + (number < shares % num_rounds) for number in range(num_rounds)]
    return [num_processes * share for share in each if share]


def refine_rollouts(
    variance: np.ndarray, mean_reward: np.ndarray, sampled: np.ndarray, active: np.ndarray, rows: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    What the next round gives each prompt: equal parts to that half of the active prompts whose rewards have varied
    most so far, and what these cannot take to the others, in the same order (VIGOR,
    https://huggingface.co/papers/2607.22002). Prompts that tie, as all do that were never solved or always, come
    hardest first: the paper does not say, and it gives least to the never solved.

    Args:
        variance (`np.ndarray` of shape `(B,)`): of the rewards of each prompt in this batch, NaN = not known.
        mean_reward (`np.ndarray` of shape `(B,)`): their mean.
        sampled (`np.ndarray` of shape `(B,)`): rollouts so far.
        active (`np.ndarray` of shape `(B,)`): whether the prompt was among those that the round before was for.
        rows (`int`): rollouts of the round.
        most (`int`): most rollouts of a prompt, over all rounds.

    Returns:
        `tuple` of two `np.ndarray` of shape `(B,)`: rollouts of each prompt in the round, `rows` in all, and whether
        the prompt is among the half.

    Example:

    ```python
    >>> given, active = refine_rollouts(
    ...     variance=np.array([0.0, 0.25, 0.0, 0.25]),
    ...     mean_reward=np.array([1.0, 0.5, 0.0, 0.5]),
    ...     sampled=np.array([2, 2, 2, 2]),
    ...     active=np.array([True, True, True, True]),
    ...     rows=8,
    ...     most=30,
    ... )
    >>> given
    array([0, 4, 0, 4])

    ```
    """
    order = np.lexsort((np.nan_to_num(mean_reward), -np.nan_to_num(variance), ~active))
    half = order[: -(-int(active.sum()) // 2)]
    room, given = most - sampled, np.zeros_like(sampled)
    for prompts in (half, order[len(half) :]):
        # One rollout each until there are no more, or no room.
        while rows and len(prompts := prompts[given[prompts] < room[prompts]]):
            turn = prompts[:rows]
            given[turn] += 1
            rows -= len(turn)
    is_active = np.zeros_like(active)
    is_active[half] = True
    return given, is_active


def _most_valuable(
    success_rate: np.ndarray,
    value_of_nth: Callable[[np.ndarray, np.ndarray], np.ndarray],
    num_generations: int,
    num_generations_min: int | np.ndarray,
    num_generations_max: int,
) -> np.ndarray:
    """The rollouts that are worth most; each further one of a prompt is worth less than that before, or as much."""
    check_bounds(num_generations, int(np.min(num_generations_min)), num_generations_max)
    rate_P = np.asarray(success_rate, dtype=np.float64)
    known_P = ~np.isnan(rate_P)
    if rate_P.ndim != 1 or not ((rate_P[known_P] >= 0) & (rate_P[known_P] <= 1)).all():
        raise ValueError("success_rate must have shape (B,) and lie in [0, 1], NaN = not known.")
    rate_P = np.where(known_P, rate_P, rate_P[known_P].mean() if known_P.any() else 0.5)
    least_P = np.broadcast_to(num_generations_min, rate_P.shape)
    further_N = np.arange(least_P.min() + 1, num_generations_max + 1)
    value_PN = np.where(further_N > least_P[:, None], value_of_nth(rate_P[:, None], further_N), -np.inf)
    # Rollouts of equal value go round: the next of every prompt comes before the one after that of any.
    nth_PN, prompt_PN = np.broadcast_arrays(further_N, np.arange(len(rate_P))[:, None])
    best_first = np.lexsort((prompt_PN.ravel(), nth_PN.ravel(), -value_PN.ravel()))
    remaining = len(rate_P) * num_generations - least_P.sum()
    chosen = prompt_PN.ravel()[best_first[:remaining]]
    return least_P + np.bincount(chosen, minlength=len(rate_P))


def equal_rollouts(stats: PromptStats, bounds: Bounds) -> np.ndarray:
    """As in GRPO: the same for all. What is decided by first rewards comes later."""
    return np.full(len(stats.difficulty), bounds.num_generations)


# By the name of the setting `rollout_allocation`: budgets that are given before a batch is sampled.
RULES: dict[str, Rule] = {
    "uniform": equal_rollouts,
    "rank": lambda stats, bounds: allocate_rollouts(stats.difficulty, *bounds),
    "variance": lambda stats, bounds: minimum_variance_rollouts(stats.success_rate, *bounds),
    "knapsack": lambda stats, bounds: knapsack_rollouts(stats.success_rate, *bounds),
    "coba": lambda stats, bounds: capability_rollouts(stats.success_rate, stats.mean_success_rate, *bounds),
}
# Those that go on from the first rewards of the batch.
ROUND_RULES: dict[str, Rule] = {"pilot": equal_rollouts, "vigor": equal_rollouts}
# Rounds of "vigor" after the first.
VIGOR_ROUNDS = 3


def load_rule(name: str) -> Rule:
    """
    The rule of that name, or a user's own by its dotted path, which is checked whenever it is called.

    Args:
        name (`str`): as in `rollout_allocation`.

    Returns:
        `Callable`: of [`PromptStats`] and [`Bounds`].

    Raises:
        `ValueError`: if there is no such rule, or it takes something else.
    """
    if rule := {**RULES, **ROUND_RULES}.get(name):
        return rule
    try:
        rule = dotted_path.load(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"rollout_allocation is {name!r}, and there is no such rule ({error}). Set it to one of "
            f"{[*RULES, *ROUND_RULES]}, or to the dotted path of a function, such as 'my_package.rules.my_rule'."
        ) from error
    try:
        inspect.signature(rule).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"rollout_allocation is {name!r}, which takes other arguments ({error}). A rule takes two: what is known "
            "of the prompts (`stats.success_rate`, `stats.difficulty`, ...), and the bounds (mean, fewest, most)."
        ) from error

    def checked(stats: PromptStats, bounds: Bounds) -> np.ndarray:
        budgets = np.asarray(rule(stats, bounds))
        shape, (mean, low, high) = stats.difficulty.shape, bounds
        total = shape[0] * mean
        if budgets.shape != shape or not np.issubdtype(budgets.dtype, np.integer):
            problem = f"an array of shape {budgets.shape} and dtype {budgets.dtype}, not {shape} integers"
        elif budgets.sum() != total:
            problem = f"{budgets.sum()} rollouts in all, not {total}"
        elif budgets.min() < low or budgets.max() > high:
            problem = f"budgets from {budgets.min()} to {budgets.max()}, not within [{low}, {high}]"
        else:
            return budgets
        raise ValueError(
            f"rollout_allocation is {name!r}, which returned {problem}, for {shape[0]} prompts x num_generations "
            f"({mean}). Mend the rule."
        )

    return checked
