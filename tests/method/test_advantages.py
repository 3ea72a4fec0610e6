from pathlib import Path

import pytest
import torch
from conftest import batches_after, length_reward, logged, vowel_reward
from hypothesis import given, settings
from hypothesis import strategies as st

from e3_trl import group_advantages
from e3_trl.method.advantages import aggregate_advantages
from e3_trl.method.length_bias import length_bias


NAN = float("nan")


def reference(rewards, group_ids, scale_rewards):
    """Eq. 2, one completion after another."""
    scored = [r for r in rewards if r == r]
    advantages = []
    for reward, group_id in zip(rewards, group_ids, strict=True):
        group = [r for r, g in zip(rewards, group_ids, strict=True) if g == group_id and r == r]
        compared = scored if scale_rewards == "batch" else group
        if reward != reward or (scale_rewards != "none" and len(compared) < 2):
            advantages.append(0.0)
            continue
        advantage = reward - sum(group) / len(group)
        if scale_rewards != "none":
            mean = sum(compared) / len(compared)
            std = (sum((r - mean) ** 2 for r in compared) / (len(compared) - 1)) ** 0.5
            advantage /= std + 1e-4
        advantages.append(advantage)
    return advantages


def test_hand_computed_group():
    """Rewards 1, 0, 0, 1 of one prompt: mean 1/2, unbiased std sqrt(1/3)."""
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long))
    expected = 0.5 / (3**-0.5 + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([expected, -expected, -expected, expected]))


rewards_and_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 1.0, NAN]), st.integers(0, 5)), min_size=1, max_size=40
)


@given(rewards_and_groups, st.sampled_from(["group", "batch", "none"]))
def test_any_group_sizes_in_any_order_agree_with_the_definition(rows, scale_rewards):
    rewards, group_ids = zip(*rows, strict=True)
    advantages = group_advantages(torch.tensor(rewards), torch.tensor(group_ids), scale_rewards)
    expected = torch.tensor(reference(rewards, group_ids, scale_rewards))
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)


@given(rewards_and_groups, st.randoms())
def test_rows_may_be_permuted(rows, random):
    rewards, group_ids = (torch.tensor(column) for column in zip(*rows, strict=True))
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    permuted = group_advantages(rewards[order], group_ids[order])
    torch.testing.assert_close(permuted, group_advantages(rewards, group_ids)[order], rtol=1e-4, atol=1e-5)


def test_rewards_may_be_whole_numbers():
    groups = torch.tensor([0, 0, 1, 1, 1])
    for rewards in (torch.tensor([1, 0, 3, 0, 0]), torch.tensor([True, False, True, False, False])):
        assert torch.equal(group_advantages(rewards, groups), group_advantages(rewards.float(), groups))


def test_equal_rewards_teach_nothing():
    advantages = group_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([1, 1, 2, 2, 2]))
    assert advantages.tolist() == [0.0] * 5


def test_functions_are_weighted_before_or_after_normalizing():
    rewards = torch.tensor([[1.0, 10.0], [0.0, 20.0], [1.0, NAN], [0.0, NAN], [NAN, NAN]])
    weights, group_ids = torch.tensor([1.0, 0.5]), torch.tensor([0, 0, 1, 1, 1])
    summed, _ = aggregate_advantages(rewards, weights, group_ids, "none", "sum_then_normalize")
    # sums 6, 10 | 1, 0, none
    torch.testing.assert_close(summed, torch.tensor([-2.0, 2.0, 0.5, -0.5, 0.0]))
    normalized, _ = aggregate_advantages(rewards, weights, group_ids, "none", "normalize_then_sum")
    # in their groups: (+z, -z) and (-z, +z) with z = sqrt(1/2), so sums z/2, -z/2 | z, -z, none; then over the batch
    half = 0.5**0.5 / 2
    expected = torch.tensor([half, -half, 2 * half, -2 * half])
    expected = expected / (expected.std() + 1e-4)
    torch.testing.assert_close(normalized, torch.cat([expected, torch.zeros(1)]), rtol=1e-3, atol=1e-3)


def test_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="scale_rewards"):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.long), "median")


def test_length_bias_takes_from_correct_completions_of_the_easiest_prompts_alone():
    groups = torch.tensor([5, 5, 8, 8, 2, 2, 3, 3])
    difficulty = torch.tensor([0.9, 0.9, 0.2, 0.2, float("nan"), float("nan"), 0.4, 0.4])
    correct = torch.tensor([True, False, True, False, True, True, True, True])
    lengths = torch.tensor([1000, 1000, 1000, 500, 1000, 1000, 4000, 250])
    half = length_bias(correct, lengths, groups, difficulty, coef=0.001, fraction=0.5)
    assert half.tolist() == pytest.approx([0, 0, 0.5, 0, 0, 0, 0.8, 0.2])
    assert length_bias(correct, lengths, groups, difficulty, 0.001, 0.25).tolist() == pytest.approx(
        [0, 0, 0.5, *[0] * 5]
    )
    everything = length_bias(correct, lengths, groups, difficulty, 0.001, 1.0)
    assert everything[4:6].tolist() == [0, 0], "a prompt that was never sampled is not known to be easy"
    assert not length_bias(correct, lengths, groups, difficulty, 0.001, 0.0).any()


def test_prompts_that_tie_share_what_is_left_of_the_fraction():
    """Ties went to the prompt that stands first in the dataset."""
    difficulty = torch.tensor([0.4, 0.1, 0.4, 0.4, 0.9, NAN, NAN, NAN])
    groups, correct, lengths = torch.arange(8), torch.ones(8, dtype=torch.bool), torch.full((8,), 1000)
    # One of 8 prompts is easier than the three that tie; a prompt of weight 1 loses 1/2.
    for quota, weight in {0: 0, 1: 0, 2: 1 / 3, 3: 2 / 3, 4: 1, 8: 1}.items():
        losses = length_bias(correct, lengths, groups, difficulty, 0.001, quota / 8)
        hardest = float(quota > 4) / 2
        expected = [weight / 2, float(quota > 0) / 2, weight / 2, weight / 2, hardest, 0, 0, 0]
        assert losses.tolist() == pytest.approx(expected)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.25, 0.5, 0.75, NAN]), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.integers(1, 4000)), max_size=16),
    st.floats(0, 1),
    st.randoms(),
)
def test_length_bias_depends_neither_on_the_order_of_rows_nor_on_ids(prompts, rows, fraction, random):
    # Each prompt has a correct completion, and some have more.
    rows = [(prompt, True, 1000) for prompt in range(len(prompts))] + [row for row in rows if row[0] < len(prompts)]
    groups, correct, lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
    difficulty = torch.tensor(prompts)[groups]
    losses = length_bias(correct, lengths, groups, difficulty, 0.001, fraction)
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    labels = torch.tensor(random.sample(range(100), len(prompts)))[groups]
    permuted = length_bias(correct[order], lengths[order], labels[order], difficulty[order], 0.001, fraction)
    assert torch.equal(permuted, losses[order])
    # In all, the fraction is spent on prompts whose difficulty is known, wherever ties fall.
    known = sum(value == value for value in prompts)
    quota = min(round(fraction * len(prompts)), known)
    assert losses[: len(prompts)].sum().item() == pytest.approx(quota / 2)


def test_divided_by_the_mean_as_in_maxrl():
    """Right answers of a group of 4 with one, of 3 with two, of 2 with none; the last reward is unscorable."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, NAN])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    advantages = group_advantages(rewards, groups, advantage_scale="mean")
    torch.testing.assert_close(advantages, torch.tensor([3.0, -1, -1, -1, 0.5, 0.5, -1, 0, 0, 0]))


@given(rewards_and_groups, st.sampled_from([0.01, 1.0, 250.0]))
def test_divided_by_the_mean_the_unit_of_a_reward_does_not_matter(rows, unit):
    rewards, groups = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = []
    for reward, group_id in rows:
        group = [r for r, g in rows if g == group_id and r == r]
        is_zero = reward != reward or not sum(group)
        expected.append(0.0 if is_zero else reward * len(group) / sum(group) - 1)
    found = group_advantages(rewards * unit, groups, advantage_scale="mean")
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_divided_by_the_mean_in_training(make_trainer):
    """Of two functions the weighted sum counts, and metrics of the deviation stay what they were."""
    settings = {"reward_funcs": [vowel_reward, length_reward], "reward_weights": [1.0, 0.5], "scale_rewards": "group"}
    with batches_after("compute_advantages") as batches:
        trainer = make_trainer(advantage_scale="mean", max_steps=6, **settings)
        trainer.train()
    for batch in batches:
        total = batch.rewards @ torch.tensor([1.0, 0.5])
        for group in set(batch.group_ids.tolist()):
            rows = torch.tensor(batch.group_ids == group)
            mean = total[rows].mean()
            torch.testing.assert_close(batch.advantages[rows], (total[rows] - mean) / mean, rtol=1e-4, atol=1e-5)
    assert len(batches) == 6
    assert all(0 <= share < 1 for share in logged(trainer, "frac_reward_zero_std"))


def test_divided_by_the_mean_a_negative_reward_is_named_and_loses_nothing(make_trainer):
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return [-1.0 if len(calls) > 3 and index == 0 else 1.0 for index in range(len(completions))]

    trainer = make_trainer(reward_funcs=reward, advantage_scale="mean", max_steps=8)
    with pytest.raises(RuntimeError, match="advantage_scale is 'mean', and a completion has the reward -1"):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_rewards": "none"}, "scale_rewards 'none'"),
        ({"scale_rewards": "batch"}, "scale_rewards 'batch'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "normalize_then_sum"),
    ],
)
def test_divided_by_the_mean_other_divisors_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=f"advantage_scale is 'mean' and .*{message}"):
        make_trainer(advantage_scale="mean", **settings)


def test_length_bias_reaches_the_advantages_but_not_difficulty(make_trainer):
    def reward(completions, **kwargs):
        return [1.0] * len(completions)

    settings = {"reward_funcs": reward, "max_steps": 8, "temperature_schedule": "constant", "micro_batching": "none"}
    plain = make_trainer(output_dir="plain", **settings)
    plain.train()
    biased = make_trainer(output_dir="biased", length_bias_coef=0.1, length_bias_fraction=1.0, **settings)
    biased.train()
    assert logged(plain, "loss") == [0.0] * 8
    # No prompt is known to be easy in the first pass of four steps; then its shorter completions are better ones.
    assert logged(biased, "loss")[:4] == [0.0] * 4
    assert logged(biased, "rewards/reward/mean") == [1.0] * 8
    assert (biased.difficulty_tracker.reward_sum == biased.difficulty_tracker.num_rollouts).all()
    batch = biased._buffered_inputs[0]
    lengths = batch["completion_mask"].sum(dim=1)
    for prompt in batch["prompt_ids"].unique(dim=0):
        group = (batch["prompt_ids"] == prompt).all(dim=1)
        by_length = batch["advantages"][group][lengths[group].argsort(stable=True)]
        assert (by_length.diff() <= 1e-6).all()
    assert len(lengths.unique()) > 1


@pytest.mark.parametrize("worth", [0.6, 1.0, 10.0])
def test_length_bias_is_a_part_of_the_reward(make_trainer, worth):
    """It was taken from it: right answers of 0.6 came to be worse than wrong ones, and 10 hardly moved."""

    def reward(completions, **kwargs):
        return [worth * (text[:1] > "m") for text in completions]

    trainer = make_trainer(
        reward_funcs=[length_reward, reward],
        difficulty_reward_func="reward",
        reward_weights=[0.0, 1.0],
        length_bias_coef=0.5,
        length_bias_fraction=1.0,
        scale_rewards="none",
        max_steps=8,
    )
    with batches_after("shape_rewards") as batches:
        trainer.train()
    moved = 0
    for number, batch in enumerate(batches):
        part = 1 / (1 + 0.5 * batch.lengths) if number >= 4 else torch.ones(16)  # of prompts that have been sampled
        expected = batch.rewards * torch.stack([torch.ones(16), part], dim=1)
        assert torch.allclose(batch.shaped_rewards, expected), "the function that tells right from wrong alone"
        moved += (batch.shaped_rewards != batch.rewards).sum().item()
        for group in set(batch.group_ids.tolist()):
            of_group, is_right = torch.tensor(batch.group_ids == group), batch.rewards[:, 1] > 0.5
            right, wrong = batch.advantages[of_group & is_right], batch.advantages[of_group & ~is_right]
            assert len(right) == 0 or len(wrong) == 0 or right.min() > wrong.max()
    assert moved > 10
