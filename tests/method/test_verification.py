"""How much of an old completion stands: against the distributions that it is about."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3_trl.method.verification import accepted_tokens


distributions = st.lists(st.floats(0.01, 1), min_size=2, max_size=6)


def pair(first: list[float], second: list[float]) -> tuple[np.ndarray, np.ndarray]:
    size = min(len(first), len(second))
    return tuple(np.array(weights[:size]) / sum(weights[:size]) for weights in (first, second))


def verified(old: np.ndarray, new: np.ndarray, lenience: float = 1.0) -> np.ndarray:
    """Distribution of a token that was drawn from `old`, is verified by `new`, and else drawn from `new`."""
    accepted = np.minimum(old, lenience * new)
    return accepted + (1 - accepted.sum()) * new


@pytest.mark.parametrize("lenience", [1.0, 1.6])
def test_a_token_is_accepted_as_often_as_the_distributions_say(lenience):
    old, new = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.25, 0.15, 0.4])
    rng = np.random.default_rng(0)
    tokens = rng.choice(4, size=(20_000, 3), p=old)
    uniforms = rng.random(tokens.shape)
    old_logps, new_logps = np.log(old)[tokens], np.log(new)[tokens]
    numbers = np.array([accepted_tokens(*row, lenience) for row in zip(new_logps, old_logps, uniforms, strict=True)])
    rate = np.minimum(old, lenience * new).sum()
    assert [(numbers > place).mean() for place in range(3)] == pytest.approx([rate, rate**2, rate**3], abs=0.01)
    first = np.where(numbers > 0, tokens[:, 0], rng.choice(4, size=len(tokens), p=new))
    assert np.bincount(first) / len(first) == pytest.approx(verified(old, new, lenience), abs=0.01)


@given(distributions, distributions)
def test_the_error_at_a_token_is_within_its_bound(first, second):
    old, new = pair(first, second)
    difference = np.abs(old - new).sum() / 2
    error = np.abs(verified(old, new) - new).sum() / 2
    assert error <= difference * (1 - difference) + 1e-12


def test_what_is_as_likely_as_before_or_likelier_stands_whole():
    logps = np.log([0.5, 0.1, 0.9])
    almost_one = np.full(3, np.nextafter(1, 0))
    assert accepted_tokens(logps, logps, almost_one) == 3
    assert accepted_tokens(logps + 0.01, logps, almost_one) == 3


def test_the_first_rejected_token_takes_those_after_it_along():
    old, uniforms = np.zeros(4), np.full(4, 0.5)
    assert accepted_tokens(np.log([0.6, 0.4, 0.9, 0.9]), old, uniforms) == 1
    assert accepted_tokens(np.log([0.6, 0.4, 0.9, 0.9]), old, uniforms, lenience=2.0) == 4
    assert accepted_tokens(np.log([0.6, 0.9]), np.array([0.0, np.nan]), np.zeros(2)) == 1, "not known"
    assert accepted_tokens(np.empty(0), np.empty(0), np.empty(0)) == 0
