from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import pass_at_k
from e3_trl.evaluation.metrics import bootstrap_means, evaluation_report, pass_at_k_table, validation_metrics


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_is_the_share_of_draws_with_a_correct_sample(arguments):
    num_samples, num_correct, k = arguments
    draws = list(combinations([i < num_correct for i in range(num_samples)], k))
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_many_samples_do_not_overflow():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(("arguments", "name"), [((4, 5, 1), "num_correct"), ((4, 1, 5), "k"), ((4, 1, 0), "k")])
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        pass_at_k(*arguments)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=6))
def test_a_table_holds_pass_at_k_of_each_problem(rewards):
    expected = [[pass_at_k(4, sum(reward > 0.5 for reward in row), k) for k in (1, 3)] for row in rewards]
    np.testing.assert_allclose(pass_at_k_table(rewards, [1, 3]), expected)


def test_a_problem_with_an_unscorable_sample_counts_nowhere():
    rewards = np.array([[1.0, 1.0], [0.0, np.nan], [1.0, 0.0]])
    assert np.isnan(pass_at_k_table(rewards, [1])[1]).all()
    assert validation_metrics(rewards) == {"pass@1": 0.75, "pass@2": 1.0}
    assert np.isnan(validation_metrics([[np.nan]])["pass@1"])
    report = evaluation_report(*({"b": array[None]} for array in (rewards, np.ones((3, 2)), np.zeros((3, 2)))))
    assert (report["b"]["problems"], report["b"]["unscorable"]) == (2, 1)
    assert report["b"]["pass@k"]["1"]["mean"] == 0.75
    with pytest.raises(ValueError, match="No problem of b could be scored"):
        evaluation_report({"b": np.full((1, 3, 2), np.nan)}, {"b": np.ones((1, 3, 2))}, {"b": np.ones((1, 3, 2))})


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for repetition in range(300):
        solved = rng.random((100, 1)) < 0.3
        low, high = np.percentile(bootstrap_means(solved, num_resamples=500, seed=repetition), [2.5, 97.5])
        held += low <= 0.3 <= high
        widths.append(high - low)
    assert 0.91 <= held / 300 <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 100) ** 0.5, rel=0.05)

    rewards = (np.arange(100) < 30).reshape(1, 100, 1)
    value = evaluation_report({"b": rewards}, {"b": rewards}, {"b": rewards})["b"]["pass@k"]["1"]
    assert [value[key] for key in ("low", "mean", "high")] == pytest.approx([0.21, 0.3, 0.39], abs=0.011)


def test_runs_are_averaged_and_their_spread_told():
    rewards = {"easy": np.array([[[1, 1], [1, 1]], [[1, 1], [1, 0]]]), "hard": np.array([[[1, 0]], [[0, 0]]])}
    tokens = {"easy": np.full((2, 2, 2), 10), "hard": np.full((2, 1, 2), 30)}
    truncated = {"easy": np.zeros((2, 2, 2)), "hard": np.array([[[True, False]], [[True, True]]])}
    report = evaluation_report(rewards, tokens, truncated)
    assert report["easy"]["pass@k"]["1"]["runs"] == [1.0, 0.75]
    assert report["easy"]["pass@k"]["1"]["spread"] == pytest.approx(0.25 / 2**0.5)
    assert report["hard"]["pass@k"]["2"]["mean"] == 0.5
    assert (report["hard"]["truncated"], report["average"]["tokens"]) == (0.75, 20)
    # Benchmarks weigh the same, whatever their size.
    assert report["average"]["pass@k"]["1"]["runs"] == [0.75, 0.375]
    assert report["average"]["problems"] == 3
    one_run = evaluation_report(*({"easy": part["easy"][:1]} for part in (rewards, tokens, truncated)))
    assert one_run["average"]["pass@k"]["1"]["spread"] is None
