"""Budget rules other than Algorithm 1, and what they are told."""

import re
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import length_reward, vowel_reward
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import DifficultyTracker, group_advantages, read_rollouts
from e3_trl.method.budget_rules import (
    Bounds,
    capability_rollouts,
    commit_rollouts,
    knapsack_rollouts,
    load_rule,
    minimum_variance_rollouts,
    pilot_rollouts,
    refine_rollouts,
    split_rounds,
)
from e3_trl.method.difficulty import PromptStats


NAN = float("nan")
SUCCESS_RULES = [minimum_variance_rollouts, knapsack_rollouts]
rates = st.lists(st.one_of(st.floats(0, 1), st.just(NAN), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40)
bounds = st.tuples(st.integers(2, 8), st.integers(0, 8), st.integers(0, 24))


@pytest.mark.parametrize("rule", SUCCESS_RULES)
@given(rates, bounds, st.randoms())
def test_sum_and_bounds_hold_always_and_the_order_of_prompts_does_not_matter(rule, rates, bounds, random):
    minimum, up, further = bounds
    arguments = minimum + up, minimum, minimum + up + further
    budgets = rule(rates, *arguments)
    assert budgets.dtype == np.int64
    assert budgets.sum() == len(rates) * arguments[0]
    assert (budgets.min() >= minimum, budgets.max() <= arguments[2]) == (True, True)
    order = list(range(len(rates)))
    random.shuffle(order)
    shuffled = rule([rates[place] for place in order], *arguments)
    # Equal prompts may take turns with the last rollout.
    assert np.abs(shuffled - budgets[order]).max() <= 1
    assert sorted(shuffled) == sorted(budgets)


def best_by_trying_all(value, rates, num_generations, minimum, maximum) -> float:
    """The greatest total value of budgets with the right sum."""
    totals = {0: 0.0}
    for rate in rates:
        found = defaultdict(lambda: -np.inf)
        for used, total in totals.items():
            for n in range(minimum, maximum + 1):
                found[used + n] = max(found[used + n], total + value(rate, n))
        totals = found
    return totals[len(rates) * num_generations]


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (minimum_variance_rollouts, lambda p, n: -p * (1 - p) / n),
        (knapsack_rollouts, lambda p, n: p * (1 - p) ** 2 * (1 - p**n - (1 - p) ** n)),
    ],
)
@given(rates=st.lists(st.floats(0, 1), min_size=2, max_size=6), bounds=bounds)
def test_no_other_budgets_are_worth_more(rule, value, rates, bounds):
    minimum, up, further = bounds
    arguments = minimum + up, minimum, minimum + up + further
    budgets = rule(rates, *arguments)
    reached = sum(value(p, n) for p, n in zip(rates, budgets.tolist(), strict=True))
    assert reached == pytest.approx(best_by_trying_all(value, rates, *arguments), abs=1e-12)


def test_minimum_variance_is_proportional_to_the_standard_deviation():
    rates = np.array([0.5, 0.2, 0.1, 0.05])
    deviation = np.sqrt(rates * (1 - rates))
    budgets = minimum_variance_rollouts(rates, 200, 2, 1000)
    assert np.allclose(budgets, 800 * deviation / deviation.sum(), atol=1)


@pytest.mark.parametrize("rule", SUCCESS_RULES)
def test_what_cannot_teach_gets_the_least_and_what_is_not_known_the_mean(rule):
    assert rule([0.0, 1.0, 0.3, 0.3], 8, 4, 12).tolist() == [4, 4, 12, 12]
    assert rule([0.0, 0.0, 1.0], 8, 4, 12).tolist() == [8, 8, 8]  # nothing to choose between
    assert rule([NAN, NAN, NAN], 8, 4, 12).tolist() == [8, 8, 8]
    known = rule([0.1, 0.3, 0.2], 8, 4, 12)
    assert rule([0.1, 0.3, NAN], 8, 4, 12).tolist() == known.tolist()
    with pytest.raises(ValueError, match=r"success_rate must.*\[0, 1\]"):
        rule([1.5], 8, 4, 12)
    with pytest.raises(ValueError, match="num_generations_min is 1"):
        rule([0.5], 8, 1, 12)


@given(rates, bounds, st.floats(0, 1) | st.just(NAN))
def test_by_capability_sum_and_bounds_hold_and_a_good_policy_gets_harder_prompts(rates, bounds, mean):
    minimum, up, further = bounds
    limits = minimum + up, minimum, minimum + up + further
    budgets = capability_rollouts(rates, mean, *limits)
    assert budgets.sum() == len(rates) * limits[0]
    assert (budgets.min() >= minimum, budgets.max() <= limits[2]) == (True, True)
    weak, strong = (capability_rollouts([0.9, 0.1], known, 8, 4, 12) for known in (0.1, 0.9))
    assert (weak.tolist(), strong.tolist()) == ([12, 4], [4, 12])
    assert capability_rollouts([NAN] * 3, NAN, 8, 4, 12).tolist() == [8, 8, 8]


@given(rates, bounds, st.integers(1, 16))
def test_a_pilot_and_what_follows_it(rates, bounds, num_processes):
    """Both parts can be shared evenly where the batch can, and the rest is for those that were not always right."""
    minimum, up, further = bounds
    num_generations, maximum = minimum + up, minimum + up + further
    num_processes = np.gcd(num_processes, len(rates) * num_generations)
    pilots = pilot_rollouts(len(rates), minimum, num_processes)
    assert pilots.sum() % num_processes == 0
    assert (pilots.min() >= minimum, pilots.sum() - len(rates) * minimum < num_processes) == (True, True)
    budgets = commit_rollouts(rates, pilots, num_generations, maximum)
    assert budgets.sum() == len(rates) * num_generations
    assert ((budgets >= pilots) & (budgets <= maximum)).all()
    is_open = ~(np.array(rates) >= 1)
    if (budgets > pilots)[~is_open].any() and not np.isnan(rates).any():
        assert (budgets[is_open] == maximum).all(), "nothing for what is learnt while the others have room"
    grown = budgets[is_open & (budgets > pilots) & (budgets < maximum)]
    assert len(grown) == 0 or np.isnan(rates).any() or np.ptp(grown) <= 1


@given(
    st.lists(st.tuples(st.floats(0, 1) | st.just(NAN), st.floats(-1, 1), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_a_round_goes_to_the_half_that_varies_most(prompts, rows, room):
    variance, mean, active = (np.array(column) for column in zip(*prompts, strict=True))
    sampled = np.arange(len(prompts)) % 3
    rows = min(rows, room * len(prompts))
    most = room + 2
    given_to, half = refine_rollouts(variance, mean, sampled, active, rows, most)
    assert given_to.sum() == rows
    assert ((given_to >= 0) & (sampled + given_to <= most)).all()
    assert half.sum() == -(-active.sum() // 2)
    assert active[half].all()
    known = np.nan_to_num(variance)
    assert not half.any() or known[half].min() >= known[active & ~half].max(initial=-1)
    with_room = half & (sampled + given_to < most)
    assert not with_room.any() or (given_to[~half] == 0).all() or given_to[half].sum() >= rows
    assert not with_room.any() or np.ptp(given_to[with_room]) <= 1


def test_prompts_that_tie_come_hardest_first():
    """One varies; of the others one was always solved, two never."""
    given_to, half = refine_rollouts(
        np.array([0.0, 0.0, 0.25, 0.0]), np.array([1.0, 0.0, 0.5, 0.0]), np.full(4, 2), np.full(4, True), 8, 8
    )
    assert given_to.tolist() == [0, 4, 4, 0]
    assert half.tolist() == [False, True, True, False]


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 8))
def test_rounds_can_be_shared_evenly(shares, num_rounds, num_processes):
    rounds = split_rounds(shares * num_processes, num_rounds, num_processes)
    assert sum(rounds) == shares * num_processes
    assert all(rows > 0 and rows % num_processes == 0 for rows in rounds)
    assert len(rounds) == min(num_rounds, shares)


def test_older_rollouts_count_less_and_a_prior_leaves_hope():
    tracker = DifficultyTracker(2, decay=0.5, prior=1.0)
    tracker.observe([0] * 4, [1.0] * 4)
    tracker.update()
    assert tracker.success_rate[0] == pytest.approx((4 + 1) / (4 + 2))
    assert np.isnan(tracker.success_rate[1])
    tracker.observe([0] * 4 + [1] * 4, [0.0] * 8)
    assert tracker.success_rate[0] == pytest.approx(5 / 6)  # until the next pass
    tracker.update()
    assert tracker.success_rate == pytest.approx([(2 + 1) / (2 + 4 + 2), 1 / 6])
    with pytest.raises(ValueError, match="decay is 0"):
        DifficultyTracker(2, decay=0)
    with pytest.raises(ValueError, match="prior is -1"):
        DifficultyTracker(2, prior=-1)


def too_many(stats, bounds):
    return np.full(len(stats.success_rate), bounds.num_generations_max + 1)


def not_whole(stats, bounds):
    return np.full(len(stats.success_rate), bounds.num_generations / 1)


def of_old(success_rate, num_generations, num_generations_min, num_generations_max):
    """What a rule was before it got statistics."""


@pytest.mark.parametrize("name", ["variance", "knapsack", "coba", "conftest.more_for_the_easy"])
@pytest.mark.slow
def test_budgets_follow_the_rule_and_the_success_rates_of_the_passes_before(make_trainer, name):
    trainer = make_trainer(rollout_allocation=name)
    trainer.train()
    rule, tracker = load_rule(name), DifficultyTracker(16)
    rows = read_rollouts(trainer.args.output_dir)
    for number in range(3):
        low, high = trainer.args.make_budget_schedule().bounds(number)
        for step in range(4 * number + 1, 4 * number + 5):
            batch = [row for row in rows if row["step"] == step]
            ids = np.array([row["prompt_id"] for row in batch])
            expected = rule(tracker.stats(ids), Bounds(4, low, high))
            assert [row["rollouts"] for row in batch] == expected.tolist()
        for row in rows[16 * number : 16 * number + 16]:
            rewards = [1.0] * row["correct"] + [0.0] * (row["rollouts"] - row["correct"])
            tracker.observe([row["prompt_id"]] * row["rollouts"], rewards)
        tracker.update()
    assert {row["rollouts"] for row in rows} > {4}


def test_the_rest_of_a_group_follows_its_pilot(make_trainer):
    """Two calls for a constant total from the first batch on; trained on are groups of both parts, with one mean."""
    trainer = make_trainer(rollout_allocation="pilot", micro_batching="none", learning_rate=0.0)
    calls, kept, windows = [], [], []
    calculate, score, prepare = trainer._calculate_rewards, trainer.score_round, trainer._prepare_inputs

    def spy(inputs, prompts, completions, completion_ids):  # TRL's call, for the rows that are trained on
        kept.append((list(prompts), trainer._batch.group_ids.tolist()))
        return calculate(inputs, prompts, completions, completion_ids)

    def scored(newest, prompts, completions, completion_ids):
        rewards = score(newest, prompts, completions, completion_ids)
        calls.append((list(prompts), list(completion_ids), rewards[:, 0].numpy()))
        return rewards

    def prepared(inputs):
        windows.append(prepare(inputs))
        return windows[-1]

    trainer._calculate_rewards, trainer.score_round, trainer._prepare_inputs = spy, scored, prepared
    trainer.train()
    rows, ids = read_rollouts(trainer.args.output_dir), {p: i for i, p in enumerate(trainer.train_dataset["prompt"])}
    assert len(calls) == 24
    for prompts, group_ids in kept:
        assert [ids[prompt] for prompt in prompts] == group_ids
        assert len(list(groupby(group_ids))) == 4, "the rows of a prompt are neighbours"
    budgets_seen = set()
    for step, (pilot, rest, window) in enumerate(zip(calls[::2], calls[1::2], windows, strict=True), start=1):
        batch = {row["prompt_id"]: row["rollouts"] for row in rows if row["step"] == step}
        of_pilot = np.array([ids[prompt] for prompt in pilot[0]]).reshape(4, 2)
        assert (of_pilot[:, 0] == of_pilot[:, 1]).all()
        assert list(batch) == of_pilot[:, 0].tolist()
        rate = pilot[2].reshape(4, 2).mean(axis=1)
        assert list(batch.values()) == commit_rollouts(rate, np.full(4, 2), 4, 8).tolist()
        prompts, completions = pilot[0] + rest[0], pilot[1] + rest[1]
        rewards = torch.tensor(np.r_[pilot[2], rest[2]])
        advantages = group_advantages(rewards, torch.tensor([ids[prompt] for prompt in prompts])).tolist()
        tokens = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        expected = sorted(zip(tokens, completions, advantages, strict=True))
        columns = [(window[f"{part}_ids"], window[f"{part}_mask"].bool()) for part in ("prompt", "completion")]
        parts = [[row[mask].tolist() for row, mask in zip(*column, strict=True)] for column in columns]
        trained = sorted(zip(*parts, window["advantages"].tolist(), strict=True))
        assert [row[:2] for row in trained] == [row[:2] for row in expected]
        assert [row[2] for row in trained] == pytest.approx([row[2] for row in expected], abs=1e-4)
        budgets_seen |= set(batch.values())
    assert len(budgets_seen) > 2
    assert trainer.difficulty_tracker.num_rollouts.sum() == 12 * 16


@pytest.mark.parametrize("reward", [vowel_reward, length_reward], ids=["0, 1", "continuous"])
@pytest.mark.slow
def test_four_rounds_follow_the_variance_of_rewards(make_trainer, reward):
    """Total and bounds as ever; each round is for half as many prompts, and no row is left out."""
    trainer = make_trainer(
        rollout_allocation="vigor",
        reward_funcs=reward,
        num_generations=8,
        num_generations_max=24,
        per_device_train_batch_size=32,
        max_steps=6,
    )
    calls, score = [], trainer.score_round

    def scored(newest, prompts, completions, completion_ids):
        rewards = score(newest, prompts, completions, completion_ids)
        calls.append((list(prompts), rewards[:, 0].tolist()))
        return rewards

    trainer.score_round = scored
    trainer.train()
    rows, ids = read_rollouts(trainer.args.output_dir), {p: i for i, p in enumerate(trainer.train_dataset["prompt"])}
    assert len(calls) == 4 * 6
    for step in range(6):
        batch = {row["prompt_id"]: row["rollouts"] for row in rows if row["batch"] == step}
        rewards, active = {prompt: [] for prompt in batch}, set(batch)
        for number, (prompts, values) in enumerate(calls[4 * step : 4 * step + 4]):
            asked = [ids[prompt] for prompt in prompts]
            if number == 0:
                assert sorted(asked) == sorted([*batch] * 2)
            else:
                assert len(asked) == 8
                chosen = [np.var(rewards[prompt], ddof=1) for prompt in set(asked)]
                passed_over = [np.var(rewards[prompt], ddof=1) for prompt in active - set(asked)]
                assert len(chosen) == {1: 2, 2: 1, 3: 1}[number]
                assert not passed_over or min(chosen) >= max(passed_over) - 1e-9
            active = set(asked)
            for prompt, value in zip(asked, values, strict=True):
                rewards[prompt].append(value)
        assert {prompt: len(values) for prompt, values in rewards.items()} == batch
        assert sum(batch.values()) == 32
        assert max(batch.values()) <= 24
    assert trainer.difficulty_tracker.num_rollouts.sum() == 6 * 32


def test_a_pilot_that_leaves_nothing_over_is_one_call(make_trainer):
    with pytest.warns(UserWarning, match="every prompt will get num_generations"):
        trainer = make_trainer(rollout_allocation="pilot", num_generations_min=4, max_steps=2)
    calls, sample = [], trainer.sample_round
    trainer.sample_round = lambda one, prompts: calls.append(len(prompts)) or sample(one, prompts)
    trainer.train()
    assert calls == [16, 16]


@pytest.mark.parametrize(
    ("name", "message"),
    [("too_many", "20 rollouts in all, not 16|budgets from 5"), ("not_whole", "dtype float64, not .* integers")],
)
def test_a_rule_that_breaks_a_guarantee_is_named_at_its_first_batch(make_trainer, name, message):
    trainer = make_trainer(rollout_allocation=f"test_budget_rules.{name}")
    with pytest.raises(ValueError, match=f"rollout_allocation is 'test_budget_rules.{name}'.*({message}).*Mend"):
        trainer.train()


def test_the_rule_that_the_documentation_shows_keeps_the_guarantees(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    (tmp_path / "my_rules.py").write_text(re.search(r"```python\n# my_rules.py\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    rule = load_rule("my_rules.more_for_the_unsolved")

    def budgets(*rates):
        return rule(PromptStats(*(np.array(rates),) * 3), Bounds(8, 4, 12))

    assert budgets(0.0, 0.0, 0.5, 1.0).tolist() == [12, 12, 4, 4]
    for rates in ([0.0] * 4, [NAN] * 3, [0.0, 1.0, NAN, 0.2, 0.0]):
        assert budgets(*rates).sum() == 8 * len(rates)


def test_what_a_rule_is_told():
    tracker = DifficultyTracker(4)
    tracker.observe([0, 0, 1, 1, 2, 2], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert np.isnan(tracker.stats(np.array([0])).mean_success_rate), "statistics are those of the last pass"
    tracker.update()
    stats = tracker.stats(np.array([3, 1]))
    assert stats.success_rate == pytest.approx([NAN, 0.5], nan_ok=True)
    assert stats.difficulty == pytest.approx([NAN, 2 / 3], nan_ok=True)
    assert stats.num_rollouts.tolist() == [0, 2]
    assert stats.mean_success_rate == 0.5
    restored = DifficultyTracker(4)
    restored.restore(tracker.state_to_save())
    assert restored.stats(np.array([1])).mean_success_rate == 0.5


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40),
    st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 10.0), (-3.0, 0.6)]),
    st.floats(0.1, 1),
    st.sampled_from([0.0, 1.0]),
)
def test_a_success_rate_is_the_share_of_right_rollouts_whatever_they_are_worth(rollouts, worth, decay, prior):
    """It once was the mean reward cut to [0, 1]: half of -1 and 1 counted as never, some of 0 and 10 as always."""
    plain, other = (DifficultyTracker(5, decay=decay, prior=prior) for _ in range(2))
    for number, (prompt, is_right) in enumerate(rollouts):
        plain.observe([prompt], [float(is_right)])
        other.observe([prompt], [worth[is_right]])
        if number % 10 == 9:
            plain.update()
            other.update()
    assert np.array_equal(plain.success_rate, other.success_rate, equal_nan=True)


@pytest.mark.parametrize("rule", ["rank", "variance", "knapsack", "coba"])
@pytest.mark.slow
def test_budgets_are_the_same_whatever_a_right_answer_is_worth(make_trainer, rule):
    rows = []
    for wrong, right in ((0, 1), (-1, 1), (0, 10)):

        def reward(completions, threshold, wrong=wrong, right=right, **kwargs):
            return [wrong + (right - wrong) * value for value in vowel_reward(completions, threshold)]

        trainer = make_trainer(
            output_dir=f"{wrong}-{right}",
            reward_funcs=reward,
            rollout_allocation=rule,
            learning_rate=0.0,
            temperature_schedule="constant",
        )
        trainer.train()
        rows.append(read_rollouts(trainer.args.output_dir))
    assert rows[0] == rows[1] == rows[2]
    assert len({row["rollouts"] for row in rows[0]}) > 1


def test_a_rule_of_before_is_told_what_it_gets_now():
    with pytest.raises(ValueError, match="of_old', which takes other arguments.*stats.success_rate"):
        load_rule("test_budget_rules.of_old")
