"""Change the class name and it trains: what TRL's users do with GRPOTrainer, with E3GRPOTrainer in its place."""

import hashlib
import inspect
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import trl
from conftest import logged, make_chat_dataset, make_dataset, trained_rows, vowel_reward
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

from e3_trl import E3GRPOConfig, E3GRPOTrainer, RolloutBudgetSchedule, TemperatureSchedule, read_rollouts
from e3_trl.batch.rollout_func import check_rollouts, misplaced_row
from e3_trl.runs.checkpoint import dataset_fingerprint


ROOT = Path(__file__).parents[1]
UNIFORM = {"rollout_allocation": "uniform", "temperature_schedule": "constant", "micro_batching": "none"}


def batches_of(trainer) -> list[list[dict]]:
    """The rows of rollouts.jsonl by generation batch, where each optimizer step has one."""
    return [list(rows) for _, rows in groupby(read_rollouts(trainer.args.output_dir), key=lambda row: row["step"])]


# --- defaults


@pytest.mark.parametrize(("size", "low", "high"), [(2, 2, 3), (3, 2, 4), (4, 2, 6), (8, 4, 12), (16, 8, 24)])
def test_limits_of_the_budgets_follow_the_group_size(tmp_path, size, low, high):
    config = E3GRPOConfig(
        str(tmp_path), num_generations=size, per_device_train_batch_size=size, use_cpu=True, bf16=False
    )
    assert (config.num_generations_min, config.num_generations_max) == (low, high)
    assert config.make_budget_schedule() == RolloutBudgetSchedule(size, low, high)
    assert RolloutBudgetSchedule(size).bounds(99) == (low, high)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.slow
def test_any_group_size_trains_with_the_defaults(make_trainer, size):
    settings = {"num_generations_min": None, "num_generations_max": None, "max_steps": 8}
    trainer = make_trainer(num_generations=size, per_device_train_batch_size=4 * size, **settings)
    trainer.train()
    budgets = {row["rollouts"] for row in read_rollouts(trainer.args.output_dir)}
    assert budgets == ({2} if size == 2 else budgets)
    assert max(2, size // 2) <= min(budgets) <= max(budgets) <= size + size // 2
    assert len(budgets) > 1 or size == 2


# --- data


LEVELS = make_dataset().add_column("level", [i / 15 for i in range(16)])


def make_prompts(rows):
    return {
        "prompt": [f"say {threshold}:" for threshold in rows["threshold"]],
        "threshold": rows["threshold"],
    }


def drop_columns(rows):
    return {"prompt": rows["prompt"], "threshold": rows["threshold"]}


@pytest.mark.parametrize(
    "dataset",
    [
        LEVELS.remove_columns("prompt").with_transform(make_prompts),
        LEVELS.with_transform(drop_columns),
    ],
    ids=["makes the prompt", "drops columns"],
)
@pytest.mark.slow
def test_a_dataset_with_a_transform_trains_as_in_trl(make_trainer, dataset):
    """A column of ids in the dataset did not come through the one, and the other was refused."""
    mine = make_trainer(train_dataset=dataset, max_steps=5, **UNIFORM)
    mine.train()
    trls = make_trainer(GRPOTrainer, GRPOConfig, train_dataset=dataset, max_steps=5)
    trls.train()
    assert logged(mine, "loss") == logged(trls, "loss")
    ranked = make_trainer(train_dataset=dataset, difficulty_column="level", max_steps=4)
    ranked.train()
    assert {row["difficulty"] * 16 - row["prompt_id"] for row in read_rollouts(ranked.args.output_dir)} == {1}
    for name in ("dynamic_sampling", "entropy_weighting"):
        make_trainer(train_dataset=dataset, max_steps=1, **{name: True}).train()


def test_the_id_of_a_prompt_is_seen_by_nobody_else(make_trainer):
    seen = set()

    def reward(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    def collate(rows):
        seen.update(name for row in rows for name in row)
        return [dict(row) for row in rows]

    trainer = make_trainer(reward_funcs=reward, max_steps=1, dynamic_sampling=True)
    trainer.data_collator = collate
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: seen.update(kwargs) or forward(*args, **kwargs)
    trainer.train()
    assert {"prompt", "input_ids", "threshold"} <= seen
    assert not [name for name in seen if "e3" in name]
    assert trainer.difficulty_tracker.num_rollouts.sum() == 16 * 11
    assert trainer.train_dataset.column_names == ["prompt", "threshold"]


def test_a_stream_is_counted_logged_and_drawn_like_a_dataset(make_trainer):
    """Streams left the road early: no telemetry, no `rollouts/*`, and no count of their batches."""
    trainer = make_trainer(
        train_dataset=make_dataset().to_iterable_dataset(),
        rollout_allocation="uniform",
        entropy_weighting=False,
        length_bias_coef=0.01,
        eval_dataset=make_dataset(4),
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
    )
    trainer.train()
    assert trainer.num_generation_batches == 6
    batches = batches_of(trainer)
    ids = [row["prompt_id"] for batch in batches for row in batch]
    assert ids == list(range(24)), "a number for each group of the run"
    assert {row["difficulty"] for batch in batches for row in batch} == {None}
    wrong = [sum(row["correct"] == 0 for row in batch) / 4 for batch in batches]
    assert logged(trainer, "rollouts/all_wrong") == pytest.approx(wrong)
    assert len(set(logged(trainer, "temperature"))) > 3


# --- images


def image_messages() -> Dataset:
    pictures = [Image.fromarray(np.full((4, 4, 3), shade, dtype=np.uint8)) for shade in (10, 200)]
    content = [
        [{"type": "image", "image": image, "text": None}, {"type": "text", "image": None, "text": "what?"}]
        for image in pictures
    ]
    features = datasets.Features(
        {
            "prompt": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List(
                        {"type": datasets.Value("string"), "image": datasets.Image(), "text": datasets.Value("string")}
                    ),
                }
            )
        }
    )
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": parts}] for parts in content]}, features=features
    )


@pytest.mark.slow
def test_images_inside_messages_have_the_same_fingerprint_in_another_process(monkeypatch):
    """A memory address was in it, so that no run with images could be resumed."""
    program = ["import datasets, numpy as np", "from datasets import Dataset", "from PIL import Image"]
    program += ["from e3_trl.runs.checkpoint import dataset_fingerprint", inspect.getsource(image_messages)]
    program += ["print(dataset_fingerprint(image_messages()))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kwargs: pytest.fail("an image was decoded"))
    assert dataset_fingerprint(image_messages()) == done.stdout.strip()
    assert dataset_fingerprint(image_messages()) != dataset_fingerprint(image_messages().select([1, 0]))


def test_the_fingerprint_of_text_is_that_of_older_checkpoints():
    rows = {"prompt": list(make_dataset(3)["prompt"])}
    assert dataset_fingerprint(make_dataset(3)) == hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --- environments, rollout functions, reward models


class Environment:
    """Makes its own prompts, and knows whether they were answered."""

    def reset(self, **kwargs) -> str:
        return "say a:"

    def guess(self, word: str) -> str:
        """
        Guess a word.

        Args:
            word: the word.
        """
        return word

    def get_reward(self) -> float:
        return float(id(self) % 2)


@pytest.fixture
def tool_tokenizer(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_an_environment_that_owns_its_data_trains_for_several_passes(make_trainer, tool_tokenizer):
    """The second pass was an AttributeError: 'NoneType' object has no attribute 'rerank'."""
    with pytest.warns(UserWarning, match="is made by the environment has no index and nothing can be counted of it"):
        trainer = make_trainer(
            environment_factory=Environment,
            train_dataset=None,
            reward_funcs=None,
            processing_class=tool_tokenizer,
            difficulty_reward_func="Environment",
            max_steps=3,
        )
    trainer.train()
    assert trainer.num_generation_batches == trainer.state.epoch == 3
    assert [row["rollouts"] for row in read_rollouts(trainer.args.output_dir)] == [4] * 12
    assert len(logged(trainer, "rollouts/all_wrong")) == 3


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("stride", [1, 4])
def test_rows_of_a_rollout_function_for_other_prompts_are_noticed(make_trainer, stride):
    """TRL's documentation suggests `prompts[::num_generations]`, whose rows were taken for the wrong prompts."""

    def rollout(prompts, trainer):
        asked = [prompt for prompt in prompts[::stride] for _ in range(stride)]
        ids = trainer.processing_class(asked)["input_ids"]
        completions, logprobs = trainer._generate_single_turn(ids, None, {}, 1)
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs}

    trainer = make_trainer(rollout_func=rollout, num_generations_step=2, max_steps=8)
    if stride == 1:
        trainer.train()
        assert len({row["rollouts"] for row in read_rollouts(trainer.args.output_dir)}) > 1
        return
    with pytest.raises(ValueError, match="rollout_func returned 16 rows for 16 prompts, and row .* Return one comple"):
        trainer.train()
    assert trainer._batch is None, "the batch is dropped after an exception"
    assert trainer.state.global_step >= 4, "groups of equal size are right by chance"


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_tokens_that_the_model_did_not_write_are_not_counted(make_trainer):
    """Results of tools were, in the telemetry and by the length bias."""
    written = []

    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        completions, _ = trainer._generate_single_turn(ids, None, {}, 1)
        written.append(sum(map(len, completions)))
        return {
            "prompt_ids": ids,
            "completion_ids": [[5, 5, 5, *row] for row in completions],
            "logprobs": None,
            "env_mask": [[0] * 3 + [1] * len(row) for row in completions],
        }

    trainer = make_trainer(rollout_func=rollout, max_steps=3)
    trainer.train()
    assert [sum(row["tokens"] for row in batch) for batch in batches_of(trainer)] == written


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("allocation", ["uniform", "rank"])
def test_a_rollout_function_may_have_one_prompt_for_all(make_trainer, allocation):
    """A dataset of task ids, whose environment writes the prompt; and log-probs without vLLM."""

    def rollout(prompts, trainer):
        ids = trainer.processing_class(["say a:"] * len(prompts))["input_ids"]
        completions, _ = trainer._generate_single_turn(ids, None, {}, 1)
        logprobs = [[-1.0] * len(row) for row in completions]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs}

    trainer = make_trainer(
        rollout_func=rollout, rollout_allocation=allocation, vllm_importance_sampling_correction=False, max_steps=5
    )
    trainer.train()
    assert len(logged(trainer, "sampling/sampling_logp_difference/mean")) == 5


def test_a_rollout_function_may_make_tokens_of_its_own():
    own = [[1], [1], [2], [2]]
    assert misplaced_row(own, [[7, 1], [7, 1], [7, 2], [7, 2]]) is None
    assert misplaced_row(own, [[7, 1], [7, 1], [7, 1], [7, 2]]) == 2
    assert misplaced_row(own, [[2], [2], [1], [1]]) == 0, "swapped"
    assert misplaced_row(own, [[5]] * 4) is None, "one prompt for all"
    assert misplaced_row(own, [[1]] * 4) == 2, "that of the first alone"
    with pytest.raises(ValueError, match="returned 3 rows for 4 prompts, and row 3"):
        check_rollouts(own, own[:3])


@pytest.fixture
def writes(monkeypatch):
    """Length of each row's prompt after something was written into the prompts of all rows, as tools do."""
    lengths = []

    def call_tools(self, prompts, prompt_ids, completion_ids, completions, logprobs, *args):
        for prompt in prompts:
            prompt.append({"role": "tool", "content": "a"})
        lengths.extend(map(len, prompts))
        return [[1] * len(ids) for ids in completion_ids], completions, completion_ids, logprobs, 0, 0, []

    monkeypatch.setattr(GRPOTrainer, "_tool_call_loop", call_tools)
    return lengths


def guess(word: str) -> str:
    """
    Guess a word.

    Args:
        word: the word.
    """
    return word


@pytest.mark.filterwarnings("ignore:You are using")
@pytest.mark.parametrize("kind", ["tools", "environment_factory", "rollout_func"])
def test_a_prompt_that_is_written_into_is_its_rows_own(make_trainer, tool_tokenizer, writes, kind):
    """Copies of a prompt are one object while they are tokenised, where nothing writes into them."""

    def rollout(prompts, trainer):
        ids, images, fields = trainer._tokenize_prompts(prompts)
        completions, _ = trainer._generate_single_turn(ids, images, fields, 1)
        trainer._tool_call_loop(prompts, ids, completions, completions, None)
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    writer = {"tools": [guess], "environment_factory": Environment, "rollout_func": rollout}[kind]
    trainer = make_trainer(
        **{kind: writer}, train_dataset=make_chat_dataset(), processing_class=tool_tokenizer, max_steps=2
    )
    trainer.train()
    assert writes == [2] * 32


@pytest.fixture
def reward_model(model_path, tmp_path) -> str:
    path = str(tmp_path / "judge")
    config = Qwen2Config.from_pretrained(model_path, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(path)
    return path


def test_a_reward_model_can_be_the_correctness_signal(make_trainer, reward_model):
    trainer = make_trainer(
        reward_funcs=[vowel_reward, reward_model], difficulty_reward_func="judge", max_steps=2, model_init_kwargs={}
    )
    trainer.train()
    sums = trainer.difficulty_tracker.reward_sum
    assert (sums % 1 != 0).any(), "not the 0 and 1 of the first"
    with pytest.raises(ValueError, match=r"difficulty_reward_func is 'jury'.*\['vowel_reward', 'judge'\]"):
        make_trainer(reward_funcs=[vowel_reward, reward_model], difficulty_reward_func="jury")


def test_rewards_that_a_subclass_makes_without_super_are_named(make_trainer):
    class Mine(E3GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            return torch.ones(len(prompts), 1)

    class Halved(E3GRPOTrainer):
        def score_round(self, *args):
            return super().score_round(*args) / 2

    with pytest.raises(RuntimeError, match="_calculate_rewards is overridden without a call of super"):
        make_trainer(Mine, max_steps=1).train()
    trainer = make_trainer(Halved, max_steps=1)
    trainer.train()
    assert set(trainer.difficulty_tracker.reward_sum % 1) == {0.0, 0.5}, "what is changed in score_round is counted"


# --- batches and steps that do not line up


@pytest.mark.parametrize(("accumulation", "per_generation"), [(3, 4), (4, 3), (3, 2), (2, 5)])
@pytest.mark.slow
def test_the_temperature_follows_each_generation_batch_where_steps_do_not_line_up(
    make_trainer, accumulation, per_generation
):
    """With 3 and 4 it changed after every third generation batch."""
    trainer = make_trainer(
        train_dataset=make_dataset(200),  # within one pass
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        max_steps=14,
        learning_rate=3e-2,
    )
    used, compute_loss = [], trainer._compute_loss

    def spy(model, inputs):
        temperature = trainer.temperature
        loss = compute_loss(model, inputs)
        entropy = trainer._metrics["train"]["entropy"][-1]
        tokens = sum(rows["completion_mask"].sum().item() for rows in trained_rows([inputs]))
        used.append((trainer.num_generation_batches - 1, temperature, entropy, tokens))
        return loss

    trainer._compute_loss = spy
    trainer.train()
    assert len(used) == 14 * accumulation
    schedule = TemperatureSchedule(trainer.model.config.vocab_size, max_steps=14)
    entropy_sum = num_tokens = num_steps = 0
    for micro_step, (batch, temperature, entropy, tokens) in enumerate(used):
        assert batch == micro_step // per_generation
        assert temperature == pytest.approx(schedule.temperature, rel=1e-9)
        entropy_sum, num_tokens = entropy_sum + entropy * tokens, num_tokens + tokens
        num_steps += (micro_step + 1) % accumulation == 0
        if (micro_step + 1) % per_generation == 0 and num_steps:  # a batch ends, and the policy has changed
            schedule.step(entropy_sum / num_tokens, num_steps)
            entropy_sum = num_tokens = num_steps = 0
    assert len({temperature for _, temperature, *_ in used}) > 4
