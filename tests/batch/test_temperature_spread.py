"""A temperature for each prompt by its difficulty: in sampling, in the loss, in what is logged."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import logged, make_dataset, trained_rows
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from e3_trl import read_rollouts
from e3_trl.method.temperature import spread_temperatures


KNOWN = {"difficulty_column": "difficulty", "train_dataset": make_dataset().add_column("difficulty", [0.0, 0.9] * 8)}


@given(st.lists(st.floats(0.01, 1), min_size=1), st.floats(0.2, 1.8), st.floats(0, 1.9))
def test_harder_is_hotter_and_within_the_clamps(difficulty, temperature, spread):
    difficulty = np.sort(difficulty)
    temperatures = spread_temperatures(difficulty, temperature, spread, 0.1, 2.0)
    assert (np.diff(temperatures) >= 0).all()
    assert (temperatures.min() >= 0.1, temperatures.max() <= 2.0) == (True, True)
    assert spread_temperatures(np.array([np.nan, 0.5]), temperature, spread, 0.1, 2.0) == pytest.approx(temperature)


def test_after_a_pass_over_a_part_of_the_prompts_the_hardest_known_is_hotter_than_an_unknown_one(make_trainer):
    """Its rank among the sampled was divided by the size of the dataset, so all that were known got cooler."""
    settings = {"prompt_selection_ratio": 0.25, "max_steps": 3, "train_dataset": make_dataset(48)}
    trainer = make_trainer(**settings, temperature_schedule="constant", temperature_spread=0.5)
    trainer.train()
    tracker, prompts = trainer.difficulty_tracker, np.arange(48)
    tracker.update()
    known = tracker.num_rollouts > 0
    assert known.sum() == 3 * 4
    temperatures = trainer.temperature_of(SimpleNamespace(indexed=True), prompts)
    assert set(temperatures[~known]) == {1.0}
    assert temperatures[known].min() < 1 < temperatures[known].max()
    assert temperatures[known].mean() == pytest.approx(1, abs=0.5 / (2 * 12) + 1e-9)
    means = tracker.mean_reward[known]
    assert means[temperatures[known].argmax()] == means.min()


def record_rows(trainer) -> list[dict]:
    """The rows of each generation batch, as they are trained on."""
    rows, prepare = [], trainer._prepare_inputs

    def spy(inputs):
        number = trainer.num_generation_batches
        micro_batch = prepare(inputs)
        if trainer.num_generation_batches > number:
            for part in trained_rows(trainer._buffered_inputs):
                columns = {name: value for name, value in part.items() if torch.is_tensor(value) and value.ndim}
                rows.extend(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return micro_batch

    trainer._prepare_inputs = spy
    return rows


def plain_logps(model, row) -> torch.Tensor:
    """Log-probs of a row's completion at its temperature, written down from their definition."""
    completion = row["completion_ids"][row["completion_mask"].bool()]
    ids = torch.cat([row["prompt_ids"][row["prompt_mask"].bool()], completion])[None]
    with torch.no_grad():
        logps = (model(ids).logits[0, :-1] / row["temperature"]).log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[-len(completion) :, 0]


FOUR_MICRO_STEPS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("settings", "peft_config"),
    [
        ({}, None),
        (FOUR_MICRO_STEPS, LoraConfig(target_modules="all-linear", r=4)),
        ({**FOUR_MICRO_STEPS, "micro_batching": "none", "num_iterations": 2}, None),
        ({**FOUR_MICRO_STEPS, "micro_batching": "tokens", "steps_per_generation": 8}, None),
    ],
    ids=str,
)
def test_log_probs_are_those_of_each_rows_own_temperature(make_trainer, model_path, settings, peft_config):
    """Of the policy, the old policy and the reference model, in whatever order and parts the rows are computed."""
    trainer = make_trainer(
        **KNOWN,
        **settings,
        peft_config=peft_config,
        temperature=0.8,
        temperature_schedule="constant",
        temperature_spread=1.0,
        learning_rate=0.0,
        beta=0.1,
        max_steps=4,
    )
    rows = record_rows(trainer)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(model_path)
    assert {round(row["temperature"].item(), 3) for row in rows} == {0.625, 1.025}  # of ranks 4.5 and 12.5 of 16
    for row in rows:
        for name in {"ref_per_token_logps", "old_per_token_logps"} & row.keys():
            given = row[name][row["completion_mask"].bool()]
            assert torch.allclose(given, plain_logps(model, row), atol=1e-4), name
    assert any("old_per_token_logps" in row for row in rows) == (len(settings) == 4)
    # The policy is the reference model, so its log-probs are the same, if they have the same temperature.
    assert logged(trainer, "kl") == pytest.approx([0.0] * 4, abs=1e-6)
    assert logged(trainer, "clip_ratio/region_mean") == [0.0] * 4


@torch.no_grad()
def next_token_probs(trainer, model, prompt, temperature) -> torch.Tensor:
    ids = torch.tensor(trainer.processing_class(prompt)["input_ids"])[None]
    return (model(ids).logits[0, -1] / temperature).softmax(-1)


def test_each_row_is_sampled_at_its_own_temperature_and_the_others_at_the_trainers(make_trainer, monkeypatch):
    """Also where groups are sampled in rounds, and where a prompt has no difficulty yet."""
    dataset = make_dataset().add_column("difficulty", [None, 0.1, 0.9, 0.5] * 4)
    trainer = make_trainer(
        train_dataset=dataset,
        difficulty_column="difficulty",
        dynamic_sampling=True,
        max_resample_rounds=2,
        temperature_spread=1.5,
        temperature_target_entropy=0.5,
        max_completion_length=1,
        max_steps=3,
        eval_dataset=dataset.select(range(4)),
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=2,
    )
    drawn, rounds, multinomial = [], [], torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, *a, **k: drawn.append(probs) or multinomial(probs, *a, **k)
    )
    sample_round = trainer.sample_round

    def spy(newest, prompts):
        ids = [list(dataset["prompt"]).index(prompt) for prompt in prompts]
        model_state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        rounds.append(
            (len(drawn), prompts[:], trainer.difficulty_tracker.difficulty[ids], trainer.temperature, model_state)
        )
        return sample_round(newest, prompts)

    trainer.sample_round = spy
    trainer.train()
    assert len(rounds) > 3
    model = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path)
    for index, prompts, difficulty, temperature, model_state in rounds:
        model.load_state_dict(model_state)
        of_rows = spread_temperatures(difficulty, temperature, 1.5, 0.1, 2.0)
        for row, prompt in enumerate(prompts):
            expected = next_token_probs(trainer, model, prompt, of_rows[row])
            assert torch.allclose(drawn[index][row], expected, atol=1e-5)
    assert np.isnan(rounds[0][2]).any()
    logs = read_rollouts(trainer.args.output_dir)
    assert {row["temperature"] for row in logs if row["difficulty"] is None} <= {
        temperature for *_, temperature, _ in rounds
    }
    assert len({row["temperature"] for row in logs if row["step"] == 1}) == 4
    # An evaluation, here before the last step, has one temperature.
    evaluated = min(set(range(len(drawn))) - {index for index, *_ in rounds})
    model.load_state_dict(next(state for index, *_, state in rounds if index > evaluated))
    for prompt in dataset["prompt"][:4]:  # in whatever order
        expected = next_token_probs(trainer, model, prompt, 1.0)
        assert sum(torch.allclose(row, expected, atol=1e-5) for row in drawn[evaluated]) == 2


def test_a_reward_function_that_asks_the_policy_gets_it_as_it_is(make_trainer, model_path):
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.arange(4, 12)[None]
    answers = []

    @torch.no_grad()
    def ask_policy(completions, **kwargs):
        answers.append(trainer.model.base_model(ids).last_hidden_state)
        return [float(len(text) % 2) for text in completions]

    settings = {"temperature_spread": 1.5, "learning_rate": 0.0, "max_steps": 2}
    trainer = make_trainer(**KNOWN, **settings, reward_funcs=ask_policy)
    trainer.train()
    assert len(answers) == 2
    for answer in answers:
        assert torch.allclose(answer, plain.base_model(ids).last_hidden_state, atol=1e-5)
