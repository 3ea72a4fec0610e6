from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import pass_at_k


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
