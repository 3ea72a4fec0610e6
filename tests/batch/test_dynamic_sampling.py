"""DAPO's dynamic sampling: the groups that it keeps, and that training takes them for what they are."""

import numpy as np
import pytest
import torch
from conftest import logged, make_dataset, vowel_reward
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import group_advantages, read_rollouts
from e3_trl.method.dynamic_sampling import DynamicSampling


@given(st.lists(st.integers(2, 5), min_size=1, max_size=6), st.integers(0, 2**20), st.integers(1, 6))
def test_slots_keep_their_sizes_and_take_only_informative_groups(sizes, seed, rounds):
    rng = np.random.default_rng(seed)
    first = np.repeat(np.arange(len(sizes)), sizes)
    sampling = DynamicSampling(first, num_prompts=40, seed=[seed])
    rewards = []
    for _ in range(rounds):
        rewards.append(rng.integers(0, 2, size=len(first)).astype(float))
        sampling.observe(rewards[-1])
        if sampling.is_full or sampling.draw() is None:
            break
    else:
        sampling.prompt_ids.pop()  # drawn and not sampled
    rows = sampling.rows
    assert len(set(rows)) == len(rows) == len(first)
    assert all(size in sizes for size in sampling.sizes)
    kept, all_rewards = np.concatenate(sampling.prompt_ids)[rows], np.concatenate(rewards)[rows]
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    informative = 0
    for slot, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        group = slice(start, start + size)
        assert len(set(kept[group])) == 1
        if len(set(all_rewards[group])) > 1:
            informative += 1
        else:
            assert (kept[group] == slot).all(), "an unfilled slot keeps its own group"
    assert len(set(kept[starts])) == len(sizes), "no prompt twice"
    assert sampling.is_full == (informative == len(sizes))


def test_unscorable_rows_tell_nothing():
    sampling = DynamicSampling(np.repeat([0, 1], 2), num_prompts=9, seed=[0])
    sampling.observe(np.array([np.nan, 1.0, np.nan, np.nan]))
    assert not sampling.is_full


def test_it_stops_when_prompts_run_out():
    sampling = DynamicSampling(np.repeat([0, 1, 2], 2), num_prompts=4, seed=[0])
    sampling.observe(np.array([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]))
    assert sampling.draw() is None, "two are kept, three are needed, four there are"


def split_reward(completions, threshold, **kwargs):
    """No prompt of threshold 0 has an informative group; every other has, unless chance is against it."""
    rewards = vowel_reward(completions, threshold)
    return [0.0 if t == 0 else reward for reward, t in zip(rewards, threshold, strict=True)]


def train(make_trainer, **overrides):
    settings = {"dynamic_sampling": True, "reward_funcs": split_reward, "train_dataset": make_dataset(64)}
    trainer = make_trainer(**settings | overrides)
    batches = []
    compute_loss = trainer._compute_loss

    def spy(model, inputs):
        batches.append({name: inputs[name].clone() for name in ("prompt_ids", "completion_ids", "advantages")})
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    return trainer, batches


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["uniform", "rank"])
def test_training_takes_the_groups_that_differ(make_trainer, allocation):
    trainer, batches = train(make_trainer, rollout_allocation=allocation, num_generations=8, num_generations_max=8)
    tokenizer, seen = trainer.processing_class, set()
    thresholds = dict(zip(*(trainer.train_dataset[name] for name in ("prompt", "threshold")), strict=True))
    for batch in batches:
        prompts = tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        prompts = [prompt.replace(" ", "") for prompt in prompts]
        texts = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        by_text = {name.replace(" ", ""): value for name, value in thresholds.items()}
        rewards = torch.tensor(split_reward(texts, [by_text[prompt] for prompt in prompts]))
        ids = torch.tensor([sorted(by_text).index(prompt) for prompt in prompts])
        # The rewards, recomputed from what is trained on, give the advantages that it is trained with.
        assert torch.allclose(batch["advantages"], group_advantages(rewards, ids), atol=1e-5)
        seen |= {by_text[prompt] for prompt in prompts}
        assert (batch["advantages"] != 0).any()
    assert seen == {1, 2, 3}, "prompts without an informative group were replaced"
    sampled, discarded = logged(trainer, "rollouts/sampled"), logged(trainer, "rollouts/discarded")
    assert [a - b for a, b in zip(sampled, discarded, strict=True)] == [16.0] * 12
    assert max(discarded) > 0
    assert logged(trainer, "frac_reward_zero_std") == [0.0] * 12
    # What was thrown away is paid for, and known of: it counts in the file and towards difficulty.
    rows = read_rollouts(trainer.args.output_dir)
    assert sum(row["rollouts"] for row in rows) == sum(sampled) == trainer.difficulty_tracker.num_rollouts.sum()


def test_rounds_are_limited(make_trainer):
    def hopeless(completions, **kwargs):
        return [0.0] * len(completions)

    trainer, _ = train(make_trainer, reward_funcs=hopeless, max_resample_rounds=3, max_steps=2)
    assert logged(trainer, "rollouts/sampled") == [64.0, 64.0]
    assert logged(trainer, "frac_reward_zero_std") == [1.0, 1.0]


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_prompts(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 6, "dynamic_sampling": True, "reward_funcs": split_reward}
    settings["train_dataset"] = make_dataset(64)
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    resumed = make_trainer(output_dir="resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    rows = [row for row in read_rollouts(whole.args.output_dir) if row["step"] > 6]
    assert read_rollouts(resumed.args.output_dir) == rows
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_unscorable_completions_do_not_make_a_group_differ(make_trainer):
    def right_or_unscorable(completions, **kwargs):
        return [None if index % 4 == 0 else 1.0 for index in range(len(completions))]

    trainer, _ = train(make_trainer, reward_funcs=right_or_unscorable, max_resample_rounds=2, max_steps=1)
    assert logged(trainer, "rollouts/sampled") == [48.0]


@pytest.mark.parametrize(("scale", "weights", "teaches"), [(-2, [1.0, 0.5], True), (-1, [1.0, 1.0], False)])
def test_a_group_is_informative_if_its_advantages_differ(make_trainer, scale, weights, teaches):
    """It was by the sums of rewards: with each function normalised first these are not what is compared."""

    def opposed(completions, threshold, **kwargs):
        return [scale * reward for reward in vowel_reward(completions, threshold)]

    trainer, batches = train(
        make_trainer,
        reward_funcs=[vowel_reward, opposed],
        reward_weights=weights,
        multi_objective_aggregation="normalize_then_sum",
        max_resample_rounds=2,
        max_steps=3,
    )
    sampled = logged(trainer, "rollouts/sampled")
    if teaches:
        assert sum(sampled) < 3 * 48
        assert all((batch["advantages"].abs() > 0.5).sum() >= 12 for batch in batches)
    else:
        assert sampled == [48.0] * 3
        assert all(batch["advantages"].abs().max() < 1e-2 for batch in batches)


def test_rewards_see_the_columns_of_the_dataset_and_log_the_rows_that_are_kept(make_trainer):
    def strict_reward(prompts, completions, completion_ids, threshold, trainer_state, log_extra, log_metric):
        log_extra("of_prompt", list(prompts))
        return split_reward(completions, threshold)

    settings = {"reward_funcs": strict_reward, "log_completions": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer, _ = train(
        make_trainer, eval_dataset=make_dataset(2), per_device_eval_batch_size=4, max_steps=4, **settings
    )
    assert max(logged(trainer, "rollouts/discarded")) > 0
    assert len(trainer._logs["prompt"]) == 16
    assert list(trainer._logs["extra"]["of_prompt"]) == list(trainer._logs["prompt"])


def test_a_prompt_that_is_there_twice_is_trained_on_as_two_groups(make_trainer):
    rounds = []

    def first_group_of_the_second_round(completions, **kwargs):
        rounds.append(None)
        return [1.0, 0.0, 1.0, 0.0, *[0.0] * 12] if len(rounds) % 2 == 0 else [0.0] * 16

    settings = {
        "train_dataset": make_dataset(5),
        "max_resample_rounds": 1,
        "rollout_allocation": "uniform",
        "max_steps": 6,
    }
    _, batches = train(make_trainer, reward_funcs=first_group_of_the_second_round, **settings)
    assert any(len(batch["prompt_ids"].unique(dim=0)) < 4 for batch in batches)
    assert [int((batch["advantages"] != 0).sum()) for batch in batches] == [4] * 6
