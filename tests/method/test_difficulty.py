import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from e3_trl import DifficultyTracker


def test_ranks_by_cumulative_mean_with_shared_ties():
    tracker = DifficultyTracker(5)
    tracker.observe([0, 0, 1, 2], [1.0, 1.0, 0.0, 0.0])
    tracker.observe([0, 1, 3, 3], [0.0, 0.0, 1.0, 1.0])
    assert np.isnan(tracker.difficulty).all(), "ranks change only in update()"
    tracker.update()
    # means 2/3, 0, 0, 1, never sampled: ranks 2, 3.5, 3.5, 1, none
    np.testing.assert_allclose(tracker.difficulty, [2 / 4, 3.5 / 4, 3.5 / 4, 1 / 4, np.nan])


def test_counts_are_cumulative_over_the_run():
    tracker = DifficultyTracker(2)
    for reward in (1.0, 0.0, 0.0):
        tracker.observe([1], [reward])
        tracker.update()
    assert tracker.num_rollouts.tolist() == [0, 3]
    assert tracker.mean_reward[1] == pytest.approx(1 / 3)


def test_unscorable_rollouts_do_not_count():
    tracker = DifficultyTracker(1)
    tracker.observe([0, 0], [float("nan"), 1.0])
    assert (tracker.num_rollouts[0], tracker.reward_sum[0]) == (1, 1.0)


def test_starting_difficulty_stands_until_a_prompt_is_sampled():
    tracker = DifficultyTracker(3, initial_difficulty=[1.0, 0.2, float("nan")])
    np.testing.assert_allclose(tracker.difficulty, [2 / 2, 1 / 2, np.nan])
    tracker.observe([1], [0.0])
    tracker.observe([0], [1.0])
    tracker.update()
    np.testing.assert_allclose(tracker.difficulty, [1 / 2, 2 / 2, np.nan])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.5, 1.0])), max_size=60), st.permutations(range(10))
)
def test_renaming_prompts_renames_their_difficulty(rollouts, new_id):
    plain, renamed = DifficultyTracker(10), DifficultyTracker(10)
    for prompt, reward in rollouts:
        plain.observe([prompt], [reward])
        renamed.observe([new_id[prompt]], [reward])
    plain.update()
    renamed.update()
    np.testing.assert_array_equal(plain.difficulty, renamed.difficulty[list(new_id)])


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-3, 3)), min_size=1, max_size=60))
def test_harder_means_a_lower_mean_reward(rollouts):
    tracker = DifficultyTracker(10)
    tracker.observe(*zip(*rollouts, strict=True))
    tracker.update()
    sampled = tracker.num_rollouts > 0
    difficulty, mean = tracker.difficulty[sampled], tracker.mean_reward[sampled]
    assert ((difficulty > 0) & (difficulty <= 1)).all()
    assert np.isnan(tracker.difficulty[~sampled]).all()
    for i in range(len(mean)):
        assert (difficulty[i] > difficulty)[mean > mean[i] + 1e-6].all()
        assert (difficulty[i] == difficulty)[mean == mean[i]].all()


@given(
    st.integers(0, 7),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6),
    st.floats(0.01, 1),
    st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 10.0), (0.1, 0.7)]),
)
@example(6, [(1, 0), (0, 1), (1, 2)], 0.7, (0.0, 1.0))
def test_equal_means_share_a_rank_however_old_and_many_their_rollouts(num_right, passes, decay, worth):
    """Decayed counts are rounded: of 3/4 of 8 and of 12 rollouts one once was harder than the other."""
    tracker = DifficultyTracker(4, decay=decay)
    of_eight = np.array([worth[place < num_right] for place in range(8)])
    tracker.observe([2, 3], [worth[0] - 1, worth[1] + 1])
    for number, counts in enumerate([(1, 1), *passes]):
        for prompt, times in enumerate(counts):
            # In whatever order they come.
            tracker.observe(np.full(8 * times, prompt), np.roll(np.tile(of_eight, times), number + prompt))
        tracker.update()
        assert tracker.difficulty.tolist() == [2.5 / 4, 2.5 / 4, 1, 1 / 4]


def test_state_goes_on_where_it_was_saved():
    tracker, restored = DifficultyTracker(3), DifficultyTracker(3)
    tracker.observe([0, 1], [1.0, 0.0])
    tracker.update()
    tracker.observe([2], [1.0])
    restored.load_state_dict(tracker.state_dict())
    np.testing.assert_array_equal(restored.difficulty, tracker.difficulty)
    restored.update()
    tracker.update()
    np.testing.assert_array_equal(restored.difficulty, tracker.difficulty)


def test_state_of_another_dataset_is_refused():
    with pytest.raises(ValueError, match="num_rollouts"):
        DifficultyTracker(3).load_state_dict(DifficultyTracker(4).state_dict())


def test_starting_difficulty_of_another_length_is_refused():
    with pytest.raises(ValueError, match="initial_difficulty"):
        DifficultyTracker(3, initial_difficulty=[0.5])
