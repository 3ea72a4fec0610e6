import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import RolloutBudgetSchedule, allocate_rollouts


NAN = float("nan")


@pytest.mark.parametrize(
    ("difficulty", "bounds", "expected"),
    [
        # rem = 4 * 4 = 16, shares 1.6 3.2 4.8 6.4 -> 1 3 4 6, two left over, both to the hardest
        ([0.25, 0.5, 0.75, 1.0], (8, 4, 12), [5, 7, 8, 12]),
        # the same prompts in another order get the same budgets
        ([1.0, 0.25, 0.75, 0.5], (8, 4, 12), [12, 5, 8, 7]),
        # shares 0.2 and 7.8: capped at 4, what is over goes down the ranks
        ([0.02, 0.78], (8, 4, 12), [4, 12]),
        # equal prompts differ by what step 3 has left over: 4, which fits into the first
        ([0.02, 0.02, 0.96], (8, 4, 12), [8, 4, 12]),
        # bounds of the first pass leave nothing to distribute
        ([0.1, 0.9], (8, 8, 8), [8, 8]),
        # all equal, all unknown
        ([0.1] * 8, (8, 4, 12), [8] * 8),
        ([NAN] * 3, (8, 4, 12), [8] * 3),
        # an unknown prompt counts as its batch's mean, 0.6: shares 2.67 4 5.33
        ([0.4, NAN, 0.8], (8, 4, 12), [6, 8, 10]),
    ],
)
def test_hand_computed_budgets(difficulty, bounds, expected):
    assert allocate_rollouts(difficulty, *bounds).tolist() == expected


def test_maximum_holds_where_the_released_code_breaks_it():
    """60 easy and 4 hard prompts: the released code gave one of the hard ones 52 rollouts."""
    budgets = allocate_rollouts([0.01] * 60 + [1.0] * 4, 8, 4, 12)
    assert budgets.max() == 12
    assert budgets.sum() == 64 * 8


difficulties = st.lists(st.one_of(st.floats(1e-6, 1.0), st.just(NAN)), min_size=1, max_size=70)
bounds = st.tuples(st.integers(2, 8), st.integers(0, 8), st.integers(0, 24))


@given(difficulties, bounds)
def test_sum_bounds_and_order_hold_always(difficulty, bounds):
    minimum, up, further = bounds
    num_generations, maximum = minimum + up, minimum + up + further
    budgets = allocate_rollouts(difficulty, num_generations, minimum, maximum)
    assert budgets.dtype == np.int64
    assert budgets.sum() == len(difficulty) * num_generations
    assert budgets.min() >= minimum
    assert budgets.max() <= maximum
    known = np.array(difficulty)
    known = np.where(np.isnan(known), np.nanmean(known) if not np.isnan(known).all() else 1.0, known)
    ordered = budgets[np.argsort(known, kind="stable")]
    for harder, easier in zip(ordered[1:], ordered[:-1], strict=True):
        # Prompts of equal difficulty may differ by the remainder that step 3 hands out.
        assert harder >= easier or len(set(known)) < len(known)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=30, unique=True), st.randoms())
def test_budgets_follow_their_prompts_when_the_batch_is_permuted(difficulty, random):
    order = random.sample(range(len(difficulty)), len(difficulty))
    budgets = allocate_rollouts(difficulty, 8, 4, 12)
    assert allocate_rollouts([difficulty[i] for i in order], 8, 4, 12).tolist() == budgets[order].tolist()


@given(st.integers(1, 200), st.floats(1e-6, 1.0))
def test_equal_difficulty_gives_everyone_the_mean(num_prompts, difficulty):
    """Rounding of k / sum(k) once gave the first of them more."""
    assert set(allocate_rollouts([difficulty] * num_prompts, 8, 4, 12)) == {8}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([0.5], 8, 1, 12), "num_generations_min"),
        (([0.5], 8, 9, 12), "num_generations_min"),
        (([0.5], 8, 4, 7), "num_generations_max"),
        (([0.0], 8, 4, 12), "difficulty"),
        (([1.1], 8, 4, 12), "difficulty"),
        (([[0.5]], 8, 4, 12), "difficulty"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        allocate_rollouts(*arguments)


def test_bounds_widen_pass_by_pass_up_to_their_limits():
    schedule = RolloutBudgetSchedule(8, num_generations_min=3, num_generations_max=11, num_generations_step=2)
    assert [schedule.bounds(num_passes) for num_passes in range(4)] == [(8, 8), (6, 10), (4, 11), (3, 11)]


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="num_generations_step"):
        RolloutBudgetSchedule(8, num_generations_step=-1)
