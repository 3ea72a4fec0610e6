"""PREPO: the prompts that it chooses, and what its weights do to the gradient."""

import math

import numpy as np
import pytest
import torch
from conftest import logged, make_dataset
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from e3_trl import E3GRPOConfig, read_rollouts
from e3_trl.method.prepo import entropy_weights, prompt_perplexity, select_by_perplexity


# Prompts of different lengths: 4 of 20 are sampled in each of three steps of a pass.
LONG = make_dataset(60).map(
    lambda row: {"prompt": row["prompt"] + " again" * (row["threshold"] * 2), "start": row["threshold"] / 3}
)
SELECTION = {
    "prompt_selection_ratio": 0.2,
    "num_generations": 6,
    "num_generations_max": 8,
    "difficulty_column": "start",
    "per_device_train_batch_size": 24,
    "train_dataset": LONG,
}


def test_perplexity_is_that_of_the_tokens_that_count():
    logps = torch.log(torch.tensor([[0.5, 0.125, 0.9], [0.2, 0.9, 0.9], [0.5, 0.5, 0.5]]))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert prompt_perplexity(logps, mask).tolist() == pytest.approx([4.0, 5.0, 1.0])


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=30), st.data())
def test_a_window_of_ranks_moves_from_easy_to_hard(perplexity, data):
    num_selected = data.draw(st.integers(1, len(perplexity)))
    windows = [select_by_perplexity(np.array(perplexity), num_selected, progress) for progress in (0, 0.3, 0.6, 1)]
    assert sorted(np.array(perplexity)[windows[0]]) == sorted(perplexity)[:num_selected]
    assert sorted(np.array(perplexity)[windows[-1]]) == sorted(perplexity)[len(perplexity) - num_selected :]
    means = [np.mean(np.array(perplexity)[window]) for window in windows]
    assert all(a <= b + 1e-9 * b for a, b in zip(means, means[1:], strict=False))
    assert all(len(set(window)) == num_selected for window in windows)


def test_the_window_begins_where_the_formula_says():
    assert select_by_perplexity(np.arange(10.0), 3, 0.5).tolist() == [3, 4, 5], "floor(0.5 * 7) = 3"


def test_weights_are_entropies_relative_to_the_mean():
    assert entropy_weights(torch.tensor([1.0, 2.0, 3.0, torch.nan])).tolist() == [0.5, 1.0, 1.5, 1.0]
    assert entropy_weights(torch.zeros(2)).tolist() == [1.0, 1.0]


def reference_perplexity(model_path, prompt: str) -> float:
    tokenizer, model = AutoTokenizer.from_pretrained(model_path), AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids).loss.item())


@pytest.mark.slow
@pytest.mark.parametrize("temperature_schedule", ["constant", "entropy"])
def test_prompts_are_chosen_by_perplexity_under_the_current_policy(make_trainer, model_path, temperature_schedule):
    # Without learning, the policy of every step is the one that was loaded. The temperature does not matter.
    trainer = make_trainer(
        **SELECTION, learning_rate=0.0, temperature=1.3, temperature_schedule=temperature_schedule, max_steps=9
    )
    trainer.train()
    perplexity = np.array([reference_perplexity(model_path, prompt) for prompt in LONG["prompt"]])
    rows = list(read_rollouts(trainer.args.output_dir))
    sampler = trainer.passes.sampler
    for step in range(1, 10):
        sampler.epoch = (step - 1) // 3
        position = (step - 1) % 3
        candidates = np.array(list(dict.fromkeys(list(sampler)[24 * position : 24 * (position + 1)])))
        assert len(candidates) == 20
        by_perplexity = candidates[np.argsort(perplexity[candidates])]
        first = math.floor((step - 1) / 9 * 16)
        chosen = [row["prompt_id"] for row in rows if row["step"] == step]
        # In the candidates' order: in that of perplexity, the last process would have the longest work.
        assert chosen == [prompt for prompt in candidates if prompt in by_perplexity[first : first + 4]]
        assert sum(row["rollouts"] for row in rows if row["step"] == step) == 24
        entry = trainer.state.log_history[step - 1]
        assert entry["prompt_perplexity/candidates"] == pytest.approx(perplexity[candidates].mean(), rel=1e-4)
        assert entry["prompt_perplexity/selected"] == pytest.approx(perplexity[chosen].mean(), rel=1e-4)
    assert trainer.state.epoch == 3, "three steps a pass"
    assert len({row["rollouts"] for row in rows}) > 1, "budgets differ among the chosen"


def test_perplexity_follows_the_policy(make_trainer):
    trainer = make_trainer(**SELECTION, max_steps=9, learning_rate=3e-2)
    trainer.train()
    assert len(set(np.round(logged(trainer, "prompt_perplexity/candidates"), 2))) == 9


@pytest.mark.slow
def test_the_whole_of_it_composes(make_trainer):
    trainer = make_trainer(
        **SELECTION,
        entropy_weighting=True,
        dynamic_sampling=True,
        max_resample_rounds=2,
        length_bias_coef=0.001,
        temperature_schedule="constant",
    )
    trainer.train()
    assert len(logged(trainer, "entropy_weight/max")) == 12
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0, abs=10)


@pytest.mark.slow
def test_all_of_the_prompts_is_the_trainer_without_it(make_trainer):
    histories = []
    for name, settings in {"without": {}, "with": {"prompt_selection_ratio": 1.0}}.items():
        trainer = make_trainer(output_dir=name, **settings)
        trainer.train()
        histories.append(logged(trainer, "loss"))
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "per_device_train_batch_size": 8},
        {"beta": 0.1},
        {"beta": 0.1, "peft_config": LoraConfig(target_modules="all-linear", init_lora_weights=False)},
        {"mask_truncated_completions": True},
        {"temperature": 0.6},
    ],
    ids=["on policy", "several steps a batch", "reference model", "LoRA", "truncated", "temperature"],
)
def test_weights_multiply_advantages(make_trainer, settings):
    """The same batch, since the first step samples from the same weights and seed, with weights and without."""
    batches = []
    for entropy_weighting in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            output_dir=str(entropy_weighting),
            max_steps=1,
            learning_rate=0.0,
            entropy_weighting=entropy_weighting,
            seed=3,
            **settings,
        )
        score = trainer._generate_and_score_completions
        batches.append([])

        def spy(inputs, score=score):
            batches[-1].append(score(inputs))
            return batches[-1][-1]

        trainer._generate_and_score_completions = spy
        trainer.train()
    plain, weighted = (batch[0] for batch in batches)
    assert torch.equal(plain["completion_ids"], weighted["completion_ids"])
    assert "entropy_weight/max" in trainer.state.log_history[0]

    ids = torch.cat([plain["prompt_ids"], plain["completion_ids"]], dim=1)
    mask = torch.cat([plain["prompt_mask"], plain["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -plain["completion_ids"].size(1) - 1 : -1]
    entropy = torch.distributions.Categorical(logits=logits / trainer.temperature).entropy()
    counts = plain["completion_mask"].sum(dim=1)
    mean_entropy = (entropy * plain["completion_mask"]).sum(dim=1) / counts
    mean_entropy[counts == 0] = torch.nan
    expected = torch.nan_to_num(mean_entropy / mean_entropy.nanmean(), nan=1.0)
    assert expected.max() > 1.01
    torch.testing.assert_close(weighted["advantages"], plain["advantages"] * expected, rtol=1e-5, atol=1e-6)
    assert plain["advantages"].abs().max() > 0


@pytest.mark.slow
def test_a_resumed_run_chooses_the_same_prompts(make_trainer):
    settings = SELECTION | {"entropy_weighting": True, "save_strategy": "steps", "save_steps": 5}
    settings["learning_rate"] = 1e-3
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    resumed = make_trainer(output_dir="resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5")
    for name in ("loss", "reward", "prompt_perplexity/selected", "entropy_weight/max"):
        assert logged(resumed, name) == logged(whole, name)
    chosen = [
        [(row["step"], row["prompt_id"], row["rollouts"]) for row in read_rollouts(trainer.args.output_dir)]
        for trainer in (whole, resumed)
    ]
    assert chosen[0][-len(chosen[1]) :] == chosen[1]


@pytest.mark.parametrize("ratio", [0.0, 1.5, 0.1])
def test_a_ratio_out_of_range_is_refused(tmp_path, ratio):
    with pytest.raises(
        ValueError, match=rf"prompt_selection_ratio is {ratio}.*1 / num_generations \(num_generations is 8\)"
    ):
        E3GRPOConfig(output_dir=str(tmp_path), prompt_selection_ratio=ratio, use_cpu=True, bf16=False)


def test_too_few_candidates_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"16 prompts, fewer than the 20 .* prompt_selection_ratio 0.2"):
        make_trainer(**SELECTION | {"train_dataset": make_dataset(), "difficulty_column": None})


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("prompt_selection_ratio", 0.5, "1.0"),
        ("entropy_weighting", True, "False"),
        ("rollout_allocation", "pilot", "rank"),
        ("temperature_spread", 0.5, "0.0"),
    ],
)
def test_streams_are_refused(make_trainer, name, value, remedy):
    with pytest.raises(ValueError, match=f"{name} is {value}.* text alone.* Set it to {remedy}"):
        make_trainer(
            train_dataset=make_dataset().to_iterable_dataset(),
            **{"rollout_allocation": "uniform", "annealing_start": None, name: value},
        )


def test_conversational_prompts(make_trainer):
    messages = [[{"role": "user", "content": prompt}] for prompt in LONG["prompt"]]
    dataset = Dataset.from_dict({"prompt": messages, "threshold": LONG["threshold"]})
    trainer = make_trainer(**SELECTION | {"train_dataset": dataset, "max_steps": 2, "difficulty_column": None})
    trainer.train()
    assert len(logged(trainer, "prompt_perplexity/selected")) == 2
