import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import TemperatureSchedule
from e3_trl.method.temperature import EntropyWindow


def test_hand_computed_trajectory():
    """|V| = 10: ln|V| + ln ln|V| = 2.302585 + 0.834032 = 3.136618."""
    schedule = TemperatureSchedule(vocab_size=10)
    assert schedule.target_entropy is None
    table = [
        # entropy, temperature afterwards
        (0.5, 1.0),  # sets the target
        (0.5, 1.0),  # on target
        (0.25, 1 + math.log(2) / 3.136618),  # 1.220985: half the entropy, higher
        (1.0, 1.220985 * (1 - 1.220985 * math.log(2) / 3.136618)),  # twice, lower
    ]
    for entropy, temperature in table:
        assert schedule.step(entropy) == pytest.approx(temperature, abs=2e-6)
        assert schedule.temperature == pytest.approx(temperature, abs=2e-6)
    assert schedule.target_entropy == 0.5


def test_annealing_follows_equation_5():
    schedule = TemperatureSchedule(vocab_size=10, target_entropy=2.0, max_steps=10)
    expected = {
        1: 2.0,
        6: 2.0,  # t_anneal = floor(0.6 * 10)
        7: 2.0 * (0.9 + 0.1 * (1 + math.cos(math.pi / 4)) / 2),
        8: 2.0 * 0.95,  # half way
        10: 2.0 * 0.9,  # eta
        11: 2.0 * 0.9,  # and no further
    }
    for step in range(1, 12):
        schedule.step(2.0)
        if step in expected:
            assert schedule.target_entropy == pytest.approx(expected[step], rel=1e-12), step


@pytest.mark.parametrize("settings", [{"max_steps": None}, {"max_steps": 10, "annealing_start": None}])
def test_target_stays_without_annealing(settings):
    schedule = TemperatureSchedule(vocab_size=10, target_entropy=2.0, **settings)
    for _ in range(10):
        schedule.step(2.0)
    assert schedule.target_entropy == 2.0


def test_annealing_from_the_last_step_on_never_begins():
    schedule = TemperatureSchedule(vocab_size=10, target_entropy=2.0, max_steps=3, annealing_start=1.0)
    for _ in range(4):
        schedule.step(2.0)
    assert schedule.target_entropy == 2.0


def test_target_is_the_mean_of_the_warmup():
    schedule = TemperatureSchedule(vocab_size=10, warmup_steps=2)
    assert schedule.step(0.4) == 1.0
    assert schedule.target_entropy is None
    assert schedule.step(0.6) == 1.0
    assert schedule.target_entropy == 0.5
    assert schedule.step(0.4) > 1.0


def test_arguments_keep_their_order():
    schedule = TemperatureSchedule(10, 1.1, 0.5, 2, 8, 0.7, 0.8, 0.2, 1.9)
    assert (schedule.warmup_steps, schedule.max_steps, schedule.annealing_start) == (2, 8, 0.7)
    assert (schedule.annealing_factor, schedule.temperature_min, schedule.temperature_max) == (0.8, 0.2, 1.9)


def test_the_target_may_be_a_part_of_the_first_entropy():
    schedule = TemperatureSchedule(vocab_size=10, target_fraction=0.5, max_steps=10)
    schedule.step(0.4)
    assert schedule.target_entropy == 0.2
    assert schedule.step(0.2) == 1.0
    assert schedule.step(0.3, num_steps=6) < 1.0
    assert schedule.target_entropy == pytest.approx(0.2 * 0.95), "and annealed from there"


def test_a_given_target_acts_from_the_first_step():
    assert TemperatureSchedule(vocab_size=10, target_entropy=1.0).step(0.5) > 1.0


@pytest.mark.parametrize("entropy", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_entropy_leaves_everything_as_it_is(entropy):
    schedule = TemperatureSchedule(vocab_size=10, target_entropy=1.0)
    with pytest.warns(UserWarning, match="stays as it is"):
        assert schedule.step(entropy) == 1.0
    measuring = TemperatureSchedule(vocab_size=10)
    with pytest.warns(UserWarning, match="stays as it is"):
        measuring.step(entropy)
    assert measuring.target_entropy is None


@pytest.mark.parametrize(("entropy", "limit"), [(1e-9, 1.5), (1e9, 0.5)])
def test_temperature_is_clamped_with_a_warning(entropy, limit):
    schedule = TemperatureSchedule(vocab_size=10, target_entropy=1.0, temperature_min=0.5, temperature_max=1.5)
    with pytest.warns(UserWarning, match="clamped"):
        assert schedule.step(entropy) == limit


@given(st.floats(0.2, 1.9), st.floats(0.05, 5.0), st.floats(0.05, 5.0), st.integers(3, 300_000))
@pytest.mark.filterwarnings("ignore:Temperature clamped")
def test_temperature_moves_against_the_entropy_and_stays_in_bounds(temperature, target, entropy, vocab_size):
    schedule = TemperatureSchedule(vocab_size, temperature, target_entropy=target)
    new = schedule.step(entropy)
    assert 0.1 <= new <= 2.0
    assert (new >= temperature) if entropy <= target else (new <= temperature)


def test_schedule_holds_the_entropy_of_a_distribution_that_sharpens():
    """A softmax over 50 logits that grow by 1% a step: the schedule holds its entropy within 5%."""

    def entropy(scale, temperature):
        weights = [math.exp(scale * (i % 7) / temperature) for i in range(50)]
        return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)

    schedule = TemperatureSchedule(vocab_size=50)
    scale, entropies = 0.5, []
    for _ in range(80):
        entropies.append(entropy(scale, schedule.temperature))
        schedule.step(entropies[-1])
        scale *= 1.01
    assert entropy(scale, 1.0) < 0.85 * entropies[0]
    assert max(abs(h / entropies[0] - 1) for h in entropies) < 0.05


def test_state_goes_on_where_it_was_saved():
    settings = {"vocab_size": 10, "warmup_steps": 2, "max_steps": 8}
    schedule = TemperatureSchedule(**settings)
    for step, entropy in enumerate([0.5, 0.6, 0.3, 0.7, 0.2, 0.4, 0.5, 0.6]):
        restored = TemperatureSchedule(**settings)
        restored.load_state_dict(schedule.state_dict())
        assert restored.step(entropy) == schedule.step(entropy), step
        assert restored.target_entropy == schedule.target_entropy


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"vocab_size": 2}, "vocab_size"),
        ({"target_entropy": 0.0}, "target_entropy"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"target_fraction": 0.0}, "target_fraction"),
        ({"annealing_start": 1.5}, "annealing_start"),
        ({"annealing_factor": 0.0}, "annealing_factor"),
        ({"temperature": 3.0}, "temperature_max"),
        ({"temperature": 0.05}, "temperature_min"),
        ({"temperature_min": 0.0}, "temperature_min"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        TemperatureSchedule(**{"vocab_size": 10, **settings})


def test_window_is_weighted_by_tokens():
    window = EntropyWindow()
    window.add(1.0, 30)
    window.add(4.0, 10)
    window.add(0.0, 0)  # a micro-batch without a token to train on
    assert window.mean == 1.75
    window.reset()
    assert (window.mean, window.num_tokens, window.num_steps) == (0.0, 0, 0)
