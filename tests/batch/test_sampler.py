from collections import Counter

import numpy as np
import pytest
from trl.trainer.utils import RepeatSampler

from e3_trl import DifficultyTracker, RolloutBudgetSampler, RolloutBudgetSchedule


STREAM = {"data_source": range(23), "mini_repeat_count": 4, "batch_size": 5, "repeat_count": 3, "seed": 3}
SCHEDULE = RolloutBudgetSchedule(4, num_generations_min=2, num_generations_max=7, num_generations_step=1)


def make_sampler(schedule=SCHEDULE, **stream):
    return RolloutBudgetSampler(DifficultyTracker(23), schedule, **(STREAM | stream))


def observe_all(sampler):
    """Prompt i is solved i times out of 22."""
    ids = np.repeat(np.arange(23), 22)
    sampler.difficulty.observe(ids, np.tile(np.arange(22), 23) < ids)


@pytest.mark.parametrize("shuffle", [True, False])
def test_without_a_schedule_the_stream_is_trls_in_every_pass(shuffle):
    sampler, trl_sampler = make_sampler(None, shuffle=shuffle), RepeatSampler(**STREAM, shuffle=shuffle)
    assert len(sampler) == len(trl_sampler)
    for epoch in range(3):
        sampler.begin_pass(epoch)
        assert list(sampler) == list(trl_sampler)


def test_the_first_pass_is_uniform():
    assert list(make_sampler()) == list(RepeatSampler(**STREAM))


def test_rows_per_generation_batch_never_change():
    sampler = make_sampler()
    observe_all(sampler)
    for epoch in (1, 2, 5):
        sampler.begin_pass(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 4 * 5 * 4 * 3
        for start in range(0, len(rows), 60):
            batch = rows[start : start + 60]
            assert batch[:20] == batch[20:40] == batch[40:], "the batch is repeated whole"
            counts = Counter(batch[:20])
            assert len(counts) == 5
            assert counts[min(counts)] == max(counts.values()), "the hardest prompt has the most rollouts"
            low, high = SCHEDULE.bounds(epoch)
            assert low <= min(counts.values()) < max(counts.values()) <= high


def test_ranks_change_only_when_a_pass_begins():
    sampler = make_sampler()
    sampler.begin_pass(1)
    uniform = list(sampler)
    observe_all(sampler)
    assert list(sampler) == uniform
    sampler.begin_pass(1)
    assert list(sampler) == uniform
    sampler.begin_pass(2)
    assert list(sampler) != uniform


def test_the_order_follows_from_the_epoch_alone():
    sampler, resumed = make_sampler(), make_sampler()
    for epoch in range(3):
        sampler.begin_pass(epoch)
        list(sampler)
    resumed.begin_pass(2)
    assert list(resumed) == list(sampler) == list(sampler)


def test_place_names_pass_position_and_bounds():
    sampler = make_sampler()
    sampler.begin_pass(2)
    assert sampler.state_to_save(num_batches=11) == {
        "pass": 2,
        "position": 3,
        "num_generations_min": 2,
        "num_generations_max": 6,
    }
