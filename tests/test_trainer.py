"""The properties of E3 through `trainer.train()`."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import (
    length_reward,
    logged,
    make_chat_dataset,
    make_dataset,
    sometimes_none_reward,
    trained_rows,
    vowel_reward,
)
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOTrainer

from e3_trl import (
    E3GRPOTrainer,
    FastGRPOTrainer,
    RolloutBudgetSchedule,
    TemperatureSchedule,
    allocate_rollouts,
    read_rollouts,
)
from e3_trl.grpo.evaluation import SampledAhead
from e3_trl.method.advantages import group_advantages


def record_rewards(trainer) -> list[torch.Tensor]:
    """The rewards of the first reward function, call by call."""
    recorded, calculate = [], trainer._calculate_rewards

    def spy(*args):
        rewards = calculate(*args)
        recorded.append(rewards[:, 0])
        return rewards

    trainer._calculate_rewards = spy
    return recorded


def generation_batches(trainer) -> list[list[dict]]:
    """The rows of rollouts.jsonl by generation batch (4 prompts each)."""
    rows = read_rollouts(trainer.args.output_dir)
    return [rows[start : start + 4] for start in range(0, len(rows), 4)]


# --- rollout budgets


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 4},
        {"num_iterations": 2},
        {"dataloader_num_workers": 2},
    ],
)
def test_budgets_follow_algorithm_1_within_bounds_that_widen(make_trainer, settings):
    trainer = make_trainer(num_train_epochs=3, max_steps=-1, num_generations_step=1, **settings)
    trainer.train()
    schedule = RolloutBudgetSchedule(4, num_generations_min=2, num_generations_max=8, num_generations_step=1)
    batches = generation_batches(trainer)
    assert len(batches) == 3 * 4, "three passes over 16 prompts, 4 a batch"
    rollouts, correct = np.zeros(16), np.zeros(16)
    for index, batch in enumerate(batches):
        epoch = index // 4
        if index % 4 == 0 and epoch > 0:
            mean = correct / rollouts
            rank = np.array([(mean > m).sum() + ((mean == m).sum() + 1) / 2 for m in mean])
        difficulty = [rank[row["prompt_id"]] / 16 if epoch > 0 else None for row in batch]
        assert [row["difficulty"] for row in batch] == pytest.approx(difficulty)
        expected = [4] * 4 if epoch == 0 else allocate_rollouts(difficulty, 4, *schedule.bounds(epoch)).tolist()
        assert [row["rollouts"] for row in batch] == expected
        assert sum(expected) == 16
        for row in batch:
            rollouts[row["prompt_id"]] += row["rollouts"]
            correct[row["prompt_id"]] += row["correct"]
    assert max(row["rollouts"] for batch in batches for row in batch) > 4, "budgets did differ"
    np.testing.assert_array_equal(trainer.difficulty_tracker.num_rollouts, rollouts)
    np.testing.assert_array_equal(trainer.difficulty_tracker.reward_sum, correct)


def test_every_completion_is_compared_with_its_own_prompts(make_trainer):
    """TRL takes rows in blocks of num_generations, which are not groups once budgets differ."""
    trainer = make_trainer(num_generations_step=2, scale_rewards="none")
    seen, recorded = [], record_rewards(trainer)
    rows_of = trainer._generate_and_score_completions

    def spy(inputs):
        prompts = [example["prompt"] for example in inputs]
        output = rows_of(inputs)
        seen.append((prompts, recorded[-1].tolist(), output["advantages"].tolist(), list(trainer._logs["advantages"])))
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    uneven = 0
    for prompts, rewards, advantages, logged_advantages in seen:
        groups = defaultdict(list)
        for prompt, reward in zip(prompts, rewards, strict=True):
            groups[prompt].append(reward)
        uneven += len(set(map(len, groups.values()))) > 1
        expected = [r - sum(groups[p]) / len(groups[p]) for p, r in zip(prompts, rewards, strict=True)]
        assert advantages == pytest.approx(expected, abs=1e-6)
        assert logged_advantages == advantages
    assert uneven > 4


def test_metrics_describe_the_batch(make_trainer):
    trainer = make_trainer()
    trainer.train()
    for name, of_batch in {
        "rollouts/min": lambda batch: min(row["rollouts"] for row in batch),
        "rollouts/max": lambda batch: max(row["rollouts"] for row in batch),
        "rollouts/all_wrong": lambda batch: sum(row["correct"] == 0 for row in batch) / 4,
        "rollouts/all_correct": lambda batch: sum(row["correct"] == row["rollouts"] for row in batch) / 4,
        "frac_reward_zero_std": lambda batch: (
            sum(row["rollouts"] for row in batch if row["correct"] in (0, row["rollouts"])) / 16
        ),
        "temperature": lambda batch: batch[0]["temperature"],
    }.items():
        assert logged(trainer, name) == pytest.approx([of_batch(b) for b in generation_batches(trainer)]), name
    tokens = sum(row["tokens"] for row in read_rollouts(trainer.args.output_dir))
    prompt_tokens = trainer.state.num_input_tokens_seen - tokens
    lengths = [len(ids) for ids in trainer.processing_class(list(make_dataset()["prompt"]))["input_ids"]]
    rollouts = Counter()
    for row in read_rollouts(trainer.args.output_dir):
        rollouts[row["prompt_id"]] += row["rollouts"]
    assert prompt_tokens == sum(lengths[prompt] * count for prompt, count in rollouts.items())


def test_difficulty_comes_from_the_named_reward_function_only(make_trainer):
    settings = {"reward_funcs": [length_reward, vowel_reward], "reward_weights": [0.1, 1.0]}
    by_first = make_trainer(**settings)
    by_first.train()
    assert (by_first.difficulty_tracker.reward_sum % 1 > 0).any()
    by_name = make_trainer(**settings, difficulty_reward_func="vowel_reward")
    by_name.train()
    assert (by_name.difficulty_tracker.reward_sum % 1 == 0).all()


def test_starting_difficulty_splits_the_first_pass_within_bounds_one_step_wide(make_trainer):
    """It once changed nothing: the first pass was uniform, and after it all prompts have been sampled."""
    dataset = make_dataset().add_column("level", [i / 15 for i in range(16)])
    settings = {"num_generations_step": 1, "max_steps": 4}
    trainer = make_trainer(train_dataset=dataset, difficulty_column="level", **settings)
    np.testing.assert_allclose(trainer.difficulty_tracker.difficulty, np.arange(1, 17) / 16)
    trainer.train()
    for batch in generation_batches(trainer):
        assert [row["difficulty"] for row in batch] == [(row["prompt_id"] + 1) / 16 for row in batch]
        expected = allocate_rollouts([row["difficulty"] for row in batch], 4, 3, 5)
        assert [row["rollouts"] for row in batch] == expected.tolist()
    assert {row["rollouts"] for row in read_rollouts(trainer.args.output_dir)} == {3, 4, 5}


def test_reward_functions_see_the_columns_of_the_dataset_alone(make_trainer):
    seen = set()

    def reward(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    trainer = make_trainer(reward_funcs=reward, max_steps=1)
    trainer.train()
    assert seen == {"prompts", "completion_ids", "threshold", "trainer_state", "log_extra", "log_metric"}


# --- temperature


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_temperature_follows_equations_4_and_5_at_every_logging_interval(make_trainer, logging_steps):
    trainer = make_trainer(logging_steps=logging_steps, learning_rate=2e-2)
    entropies = []
    compute_loss = trainer._compute_loss

    def spy(model, inputs):
        loss = compute_loss(model, inputs)
        entropies.append(trainer._metrics["train"]["entropy"][-1])
        return loss

    trainer._compute_loss = spy
    trainer.train()
    schedule = TemperatureSchedule(vocab_size=trainer.model.config.vocab_size, max_steps=12)
    temperatures, targets = [], []
    for entropy in entropies:
        temperatures.append(schedule.temperature)
        schedule.step(entropy)
        targets.append(schedule.target_entropy)
    assert [batch[0]["temperature"] for batch in generation_batches(trainer)] == temperatures
    assert len(set(temperatures)) > 8
    assert targets[-1] == pytest.approx(0.9 * targets[0])
    windows = range(0, 12, logging_steps)
    means = [np.mean(targets[start : start + logging_steps]) for start in windows]
    assert logged(trainer, "target_entropy") == pytest.approx(means)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 8},
        {"num_iterations": 2},
    ],
)
def test_temperature_changes_only_between_generation_batches(make_trainer, settings):
    trainer = make_trainer(max_steps=12, **settings)
    used = []
    compute_loss = trainer._compute_loss

    def spy(model, inputs):
        used.append((trainer.num_generation_batches, trainer.temperature))
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    per_batch = defaultdict(set)
    for batch, temperature in used:
        per_batch[batch].add(temperature)
    sampled = [batch[0]["temperature"] for batch in generation_batches(trainer)]
    assert [per_batch[index + 1] for index in range(len(sampled))] == [{temperature} for temperature in sampled]
    assert len(set(sampled)) > 1


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("micro_batch", "is_interrupted"), [(16, False), (4, False), (4, True)])
def test_target_is_the_token_weighted_entropy_of_the_first_batch(make_trainer, micro_batch, is_interrupted):
    """A mean of the micro-batches' means weighs short completions too much."""
    trainer = make_trainer(
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=16 // micro_batch,
        max_steps=1,
        mask_truncated_completions=True,
        max_completion_length=24,
    )
    if is_interrupted:
        callback = TrainerCallback()
        callback.on_substep_end = interrupt
        trainer.add_callback(callback)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(callback)
    trainer.train()
    reference = make_trainer().model
    total, num_tokens, means = 0.0, 0, []
    for batch in trained_rows(trainer._buffered_inputs):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].size(1)
        with torch.no_grad():
            logits = reference(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
        entropies = torch.distributions.Categorical(logits=logits).entropy() * batch["completion_mask"]
        total += entropies.sum().item()
        num_tokens += batch["completion_mask"].sum().item()
        means.append(entropies.sum().item() / max(batch["completion_mask"].sum().item(), 1))
    assert trainer.temperature_schedule.initial_entropy == pytest.approx(total / num_tokens, rel=1e-5)
    if micro_batch == 4:
        assert np.mean(means) != pytest.approx(total / num_tokens, rel=1e-5)


# --- what GRPOTrainer does must stay as it is


REFERENCE_SETTINGS = [
    {},
    {"scale_rewards": "batch", "loss_type": "grpo"},
    {"scale_rewards": "none", "loss_type": "dr_grpo"},
    {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.3]},
    {"beta": 0.05, "num_iterations": 2},
    {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("settings", REFERENCE_SETTINGS)
@pytest.mark.slow
def test_both_trainers_equal_grpo_to_the_last_bit(make_trainer, settings):
    """E3's with its two parts off."""
    funcs = [vowel_reward, length_reward] if "reward_weights" in settings else sometimes_none_reward
    settings = {"max_steps": 10, "reward_funcs": funcs} | settings
    grpo = make_trainer(GRPOTrainer, **settings)
    grpo.train()
    e3_off = {"rollout_allocation": "uniform", "temperature_schedule": "constant"}
    for trainer_class, off in ((FastGRPOTrainer, {}), (E3GRPOTrainer, e3_off)):
        trainer = make_trainer(trainer_class, micro_batching="none", **settings, **off)
        trainer.train()
        for name in ("loss", "reward", "entropy", "grad_norm", "frac_reward_zero_std", "completions/mean_length"):
            assert logged(trainer, name) == logged(grpo, name), name
        assert len(logged(trainer, "loss")) == 10
        for mine, trls in zip(trainer.model.parameters(), grpo.model.parameters(), strict=True):
            assert torch.equal(mine, trls)


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")),
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {
            "reward_funcs": [vowel_reward, sometimes_none_reward],
            "reward_weights": [1.0, 0.5],
            "multi_objective_aggregation": "normalize_then_sum",
        },
        {"reward_funcs": sometimes_none_reward},
        {"mask_truncated_completions": True},
        {"beta": 0.1},
        {"bf16": True, "beta": 0.1},
        {"entropy_coef": 1e-3},
        {"use_adaptive_entropy": True},
        {"importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5},
        {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4), "beta": 0.1},
        {"remove_unused_columns": True, "reward_funcs": length_reward},
        {"gradient_checkpointing": True},
        {"log_completions": True},
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
@pytest.mark.slow
def test_trains_with_what_grpo_offers(make_trainer, settings):
    trainer = make_trainer(max_steps=9, num_generations_step=2, **settings)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert all(np.isfinite(logged(trainer, "loss")))
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert len({row["rollouts"] for row in read_rollouts(trainer.args.output_dir)}) > 1, "budgets did differ"
    assert len(set(logged(trainer, "temperature"))) > 4, "the temperature did move"


def test_conversational_prompts(make_trainer):
    trainer = make_trainer(train_dataset=make_chat_dataset())
    trainer.train()
    assert trainer.difficulty_tracker.num_rollouts.sum() == 12 * 16


def test_a_reward_function_may_write_into_its_rows(make_trainer):
    lengths = []

    def reward(prompts, completions, threshold, **kwargs):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt += completion
        lengths.extend(map(len, prompts))
        return vowel_reward(completions, threshold)

    trainer = make_trainer(train_dataset=make_chat_dataset(), reward_funcs=reward, max_steps=2)
    trainer.train()
    assert lengths == [2] * 32


def test_streams_train_with_uniform_budgets(make_trainer):
    trainer = make_trainer(train_dataset=make_dataset().to_iterable_dataset(), rollout_allocation="uniform")
    trainer.train()
    assert len(set(logged(trainer, "temperature"))) > 4


def test_gradient_agrees_with_a_plain_reference(make_trainer):
    """Eq. 1-2 written out for groups of different sizes at a temperature other than 1."""
    trainer = make_trainer(loss_type="grpo", max_steps=7, num_generations_step=2, max_grad_norm=0.0)
    trainer.train()
    model, temperature, batch = trainer.model, trainer.temperature, None
    sampler = iter(trainer.passes.sampler)
    ids = [next(sampler) for _ in range(16)]
    model.train()
    recorded = record_rewards(trainer)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] | {"e3_prompt_id": i} for i in ids])
    assert len(set(Counter(ids).values())) > 1
    assert abs(temperature - 1) > 0.05

    advantages = group_advantages(recorded[-1], torch.tensor(ids))
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, -length - 1 : -1] / temperature
    log_probs = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(log_probs - log_probs.detach())
    per_token = -ratio * advantages.unsqueeze(1) * batch["completion_mask"]
    reference_loss = (per_token.sum(1) / batch["completion_mask"].sum(1)).mean()
    model.zero_grad()
    reference_loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(model, batch).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert expected.norm() > 1e-3
    assert (gradient - expected).norm() / expected.norm() < 1e-5


# --- evaluation


def test_evaluation_is_fixed_in_group_size_and_temperature(make_trainer):
    """Evaluation once changed the training temperature, and counted towards difficulty."""
    settings = {"max_steps": 8, "learning_rate": 2e-2}
    plain = make_trainer(**settings)
    plain.train()
    trainer = make_trainer(
        eval_dataset=make_dataset(6),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        eval_temperature=0.7,
        **settings,
    )
    prompts = []
    generate = trainer._generate

    def spy(batch):
        if not trainer.model.training:
            prompts.append((trainer.temperature, trainer.generation_config.temperature, tuple(batch)))
        return generate(batch)

    trainer._generate = spy
    trainer.train()
    assert {temperature for temperature, _, _ in prompts} == {sampled for _, sampled, _ in prompts} == {0.7}
    assert all(set(Counter(batch).values()) == {2} for _, _, batch in prompts)
    assert logged(trainer, "eval_temperature") == pytest.approx([0.7] * 4)
    assert trainer.difficulty_tracker.num_rollouts.sum() == 8 * 16
    assert len(set(logged(trainer, "temperature"))) > 4
    assert trainer.temperature == trainer.temperature_schedule.temperature != 0.7
    assert len(logged(plain, "temperature")) == len(logged(trainer, "temperature"))


def test_evaluation_logs_pass_at_k_of_the_correctness_reward(make_trainer):
    def third_reward(prompts, completions, **kwargs):
        """Right on one of the three samples of every other prompt, and a prompt too many would be seen."""
        seen: dict[str, int] = {}
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, 0) + 1
        copies = {prompt: iter(range(count)) for prompt, count in seen.items()}
        return [float(int(prompt[5:-1]) % 2 == 0 and next(copies[prompt]) == 0) for prompt in prompts]

    trainer = make_trainer(
        reward_funcs=[length_reward, third_reward],
        difficulty_reward_func="third_reward",
        eval_dataset=make_dataset(5),
        per_device_eval_batch_size=6,
        num_generations_eval=3,
        eval_strategy="steps",
        eval_steps=4,
        max_steps=8,
    )
    trainer.train()
    # Prompts 0, 2 and 4 of five are right once in three samples.
    assert logged(trainer, "eval_pass@1") == pytest.approx([3 / 5 / 3] * 2)
    assert logged(trainer, "eval_pass@3") == pytest.approx([3 / 5] * 2)


def test_completions_sampled_ahead_are_taken_once_or_not_at_all():
    ahead = SampledAhead([[1], [2], [1]])
    assert ahead.is_waiting
    ahead.add([[[5], [6], [7]], [[0.5], [0.6], [0.7]], None])
    assert not ahead.is_waiting
    assert ahead.take([[1], [3]]) is ahead.take([[2], [2]]) is None
    assert ahead.take([[1], [1]]) == [[[5], [7]], [[0.5], [0.7]], None]
    assert ahead.take([[1]]) is None


def test_evaluation_with_one_sample_per_prompt(make_trainer):
    metrics = make_trainer(
        eval_dataset=make_dataset(8), per_device_eval_batch_size=4, num_generations_eval=1
    ).evaluate()
    assert metrics["eval_pass@1"] == pytest.approx(metrics["eval_rewards/vowel_reward/mean"])
    assert 0 < metrics["eval_pass@1"] < 1


def test_evaluation_temperature_is_the_configured_one_by_default(make_trainer):
    trainer = make_trainer(eval_dataset=make_dataset(4), per_device_eval_batch_size=4, temperature=0.8)
    trainer.temperature = 1.3
    trainer.evaluate()
    assert trainer.temperature == 1.3
    assert logged(trainer, "eval_temperature") == [0.8]
