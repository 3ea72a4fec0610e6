"""reasoning-gym's problems and scorers: what is made, what is scored, and every command with them."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import logged
from transformers import AutoModelForCausalLM

from e3_trl import reasoning_gym_dataset, reasoning_gym_partial_reward, reasoning_gym_reward
from e3_trl.commands import evaluate, prepare_data, train
from e3_trl.evaluation.problems import load_problems
from e3_trl.rewards import load_reward_func, reasoning_gym
from e3_trl.rewards.worker_pool import WorkerPool


pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.slow

# A solution is no part of these problems; of three of them an example is in the metadata.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def own_answer(entry: str) -> str:
    content = json.loads(entry)
    metadata = content["metadata"]
    examples = {
        "graph_color": lambda: json.dumps(metadata["possible_answer"]),
        "propositional_logic": lambda: metadata["example_answer"],
        "rubiks_cube": lambda: metadata["example_correct_answer"],
    }
    return examples.get(content["task"], lambda: content["answer"])()


def questions(dataset) -> set[str]:
    return {prompt[0]["content"] for prompt in dataset["prompt"]}


def test_every_tasks_own_answer_is_right_after_json():
    from reasoning_gym.factory import DATASETS

    tasks = sorted(DATASETS.keys() - {"composite", "boxnet", "rush_hour"})
    data = reasoning_gym_dataset(tasks, size=3 * len(tasks), test_size=0)
    assert len(set(data["task"])) == len(tasks)
    assert len(data) == 3 * len(tasks)
    rewards = reasoning_gym_reward([f"<answer>{own_answer(entry)}</answer>" for entry in data["entry"]], data["entry"])
    assert [task for task, reward in zip(data["task"], rewards, strict=True) if reward != 1] == []
    without = {task for task, solution in zip(data["task"], data["solution"], strict=True) if not solution}
    assert without == WITHOUT_ANSWER & set(tasks)
    # And nothing is right whatever is said.
    assert not any(reasoning_gym_reward(["<answer>[[[</answer>"] * len(data), data["entry"]))


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        ("coin_flip", "0"),
        ("complex_arithmetic", "nan"),
        ("game_of_life_halting", "perhaps"),
        ("puzzle24", "3 * 8 * 1 * 1"),
    ],
)
def test_what_a_scorer_takes_for_right_and_is_not(task, wrong):
    entries = reasoning_gym_dataset(task, size=10, test_size=0)["entry"]
    entries = [entry for entry in entries if not re.fullmatch(r"[01]\.?0*", own_answer(entry))]
    assert len(entries) > 4
    assert not any(reasoning_gym_partial_reward([wrong] * len(entries), entries))


def test_which_part_of_a_completion_is_scored_and_how():
    (entry,) = reasoning_gym_dataset("chain_sum", size=1, test_size=0)["entry"]
    right = own_answer(entry)
    completions = [
        right,
        f"  {right}\n",
        f"Well. Answer: 1. No, Answer: {right}",
        f"Answer: 1 <answer>2</answer> <answer>\n{right}\n</answer> Answer: 3",
        f"It is {right} of course, as everybody knows",
        f"<answer>{right}</answer> <answer>1</answer>",
        "",
    ]
    assert reasoning_gym_reward(completions, [entry] * 7) == [1, 1, 1, 1, 0, 0, 0]
    chat = [[{"role": "assistant", "content": text}] for text in [right, None]]
    assert reasoning_gym_reward(chat, [entry] * 2) == [1, 0]
    partial = reasoning_gym_partial_reward(completions, [entry] * 7)
    assert partial[0] == 1
    assert 0 < partial[4] < 1
    told = {}
    reasoning_gym_reward(completions[:3], [entry] * 3, log_extra=told.__setitem__, log_metric=told.__setitem__)
    assert told == {"answer": [right] * 3, "rewards/reasoning_gym_reward/unchecked": 0}
    assert reasoning_gym_reward(["1", "1"], ["no entry", '{"task": "gone", "settings": {}}']) == [None, None]


def test_scorers_that_fail_hang_or_leave_give_0(monkeypatch):
    pool = WorkerPool(timeout=2, size=2, script=reasoning_gym.WORKER, package=reasoning_gym.PACKAGE)
    monkeypatch.setattr(reasoning_gym, "_POOL", pool)
    data = reasoning_gym_dataset(["countdown", "prime_factorization", "spiral_matrix"], size=3, test_size=0)
    entry = dict(zip(data["task"], data["entry"], strict=True))
    began = time.monotonic()
    answers = {"9**9**9**9**9": "countdown", "garbage": "prime_factorization", "exit()": "spiral_matrix"}
    rows = [
        *((answer, entry[task]) for answer, task in answers.items()),
        (own_answer(data["entry"][0]), data["entry"][0]),
    ]
    metrics = {}
    rewards = reasoning_gym_reward(*zip(*rows, strict=True), log_metric=metrics.__setitem__)
    pool.close()
    assert rewards == [0, 0, 0, 1]
    assert metrics["rewards/reasoning_gym_reward/unchecked"] == 0.5, "the one that hangs and the one that leaves"
    assert time.monotonic() - began < 60


def test_the_settings_of_a_problem_are_those_of_its_scorer():
    """Two decimal places leave a tolerance of 0.01, and six, which is the default, do not."""
    settings = {"min_num_decimal_places": 2, "max_num_decimal_places": 2}
    (entry,) = reasoning_gym_dataset("decimal_arithmetic", size=1, test_size=0, **settings)["entry"]
    near = str(round(float(own_answer(entry)) + 0.005, 3))
    assert reasoning_gym_reward([near], [entry]) == [1]
    changed = json.dumps(json.loads(entry) | {"settings": {"min_num_decimal_places": 6, "max_num_decimal_places": 6}})
    assert reasoning_gym_reward([near], [changed]) == [0]


def test_the_same_problems_in_every_process(monkeypatch):
    """ransom_note goes through a set, list_functions draws from Python's own generator."""
    made = []
    for seed in "12":
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        made.append(reasoning_gym_dataset(["ransom_note", "list_functions"], size=8, test_size=2)["entry"][:])
    assert made[0] == made[1]


def test_splits_and_seeds_share_no_question_and_the_test_set_stays():
    of = lambda **arguments: reasoning_gym_dataset("number_sorting", **arguments)  # noqa: E731
    train, test = of(size=200, test_size=50), of(size=7, test_size=50, split="test")
    assert len(questions(train)) == len(train) == 200
    assert len(questions(test)) == len(test) == 50
    assert questions(test) == questions(of(size=9, test_size=50, split="test"))
    assert not questions(train) & questions(test)
    for seed in (1, 100):
        assert not questions(train) & questions(of(size=200, seed=seed))
    # A task of few problems, where two draws would meet.
    few = {"size": 30, "test_size": 20, **SUMS, "max_digits": 1}
    one, other = (reasoning_gym_dataset("chain_sum", split=split, **few) for split in ("train", "test"))
    assert len(questions(one) | questions(other)) == 50


def test_fewer_problems_than_were_asked_for_is_said(caplog):
    data = reasoning_gym_dataset("count_bits", size=40, test_size=3, min_n=1, max_n=8)
    assert len(questions(data)) == len(data) <= 5
    assert (
        f"The task 'count_bits' gives {len(data)} different problems for the train split, and 40 were" in caplog.text
    )
    with pytest.raises(ValueError, match="test_size 40 .* nothing is left for the train split. Raise that one"):
        reasoning_gym_dataset("count_bits", size=40, test_size=40, min_n=1, max_n=8)


def test_a_mixture_has_the_shares_of_its_weights_and_the_instruction():
    tasks = {
        "number_sorting": {"weight": 2, "min_numbers": 3, "max_numbers": 3},
        "chain_sum": {"weight": 1},
        "gcd": None,
    }
    data = reasoning_gym_dataset(tasks, size=40, test_size=0, instruction="Be brief.")
    assert {task: data["task"][:].count(task) for task in tasks} == {"number_sorting": 20, "chain_sum": 10, "gcd": 10}
    assert data["task"][:10] != ["number_sorting"] * 10, "mixed"
    assert all(prompt[0]["content"].endswith("\n\nBe brief.") for prompt in data["prompt"])
    entries = [json.loads(entry) for entry in data["entry"]]
    assert {entry["answer"].count(",") for entry in entries if entry["task"] == "number_sorting"} == {2}
    assert reasoning_gym_dataset("gcd, lcm", size=4)["task"][:].count("lcm") == 2


@pytest.fixture
def recipe(model_path, tmp_path):
    def write(**settings) -> str:
        fields = {
            "model_name_or_path": model_path,
            "dtype": "float32",
            "dataset_name": "reasoning_gym:chain_sum",
            "dataset_config": {"size": 16, "test_size": 4, **SUMS},
            "reward_funcs": ["reasoning_gym_reward"],
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "max_completion_length": 4,
            "max_steps": 2,
            "num_generations": 4,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 16,
            "report_to": "none",
            "save_strategy": "no",
            "trainer": "fast_grpo",
            "use_cpu": True,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields | settings))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": "reasoning_gym:number_sort"}, "names the task 'number_sort'.*Did you mean 'number_sorting'"),
        ({"dataset_name": "reasoning_gym:composite"}, "names the task 'composite', and reasoning_gym has none"),
        ({"dataset_name": "reasoning_gym"}, "dataset_name is 'reasoning_gym', and dataset_config has no tasks. Name"),
        ({"dataset_config": {"tasks": "gcd"}}, "dataset_config has tasks. Name them in one of"),
        ({"dataset_config": {"min_term": 2}}, "sets 'min_term', and the task 'chain_sum' has no.*mean 'min_terms'"),
        ({"dataset_config": {"min_terms": 0}}, "sets {'min_terms': 0} for the task 'chain_sum', which takes other"),
        ({"dataset_config": {"min_terms": "two"}}, "sets {'min_terms': 'two'} for the task 'chain_sum', which takes"),
        ({"dataset_config": "main"}, "dataset_config is 'main'. Set it to a mapping"),
        ({"dataset_config": "{size: 5"}, "dataset_config is '{size: 5'. Set it to a mapping"),
        ({"dataset_config": {"size": 0}}, "size is 0 .dataset_config.. Set it to 1 or more"),
        ({"dataset_config": {"seed": "a"}}, "seed is 'a' .dataset_config.. Set it to 0 or more"),
        ({"dataset_config": {"test_size": -1}}, "test_size is -1 .dataset_config.. Set it to 0 or more"),
        ({"dataset_config": {"instruction": 3}}, "instruction is 3 .dataset_config.. Set it to a text"),
        (
            {"dataset_name": "reasoning_gym", "dataset_config": {"tasks": {"gcd": {"weight": 0}}}},
            "weight is 0 for the task 'gcd' .dataset_config.. Set it above 0",
        ),
        (
            {"dataset_name": "reasoning_gym", "dataset_config": {"tasks": {"gcd": 3}}},
            "tasks is {'gcd': 3} .dataset_config.. Set it to names of tasks",
        ),
        (
            {"dataset_name": "reasoning_gym:gcd,lcm", "dataset_config": {"min_numbers": 3}},
            r"sets \['min_numbers'\], and there are the tasks \['gcd', 'lcm'\]. Set them for one",
        ),
        ({"dataset_streaming": True}, "dataset_streaming is True, and reasoning_gym's problems are no stream"),
        ({"dataset_config": {"test_size": 0}, "eval_strategy": "steps"}, "dataset_test_split is 'test', but the dat"),
    ],
    ids=str,
)
def test_a_mistake_in_the_recipe_is_named_before_a_model_is_loaded(recipe, monkeypatch, settings, message):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(SystemExit, match=f"^ValueError: .*{message}"):
        train.run(["--config", recipe(**settings)])


def test_without_the_package_it_says_how_to_install_it(recipe, monkeypatch):
    monkeypatch.setattr(reasoning_gym, "PACKAGE", "reasoning_gym_that_is_not_there")
    for call in (
        lambda: reasoning_gym_dataset("gcd"),
        lambda: load_reward_func("reasoning_gym_reward"),
        lambda: reasoning_gym_reward(["1"], ["{}"]),
    ):
        with pytest.raises(ValueError, match=r"reasoning-gym is not installed.*pip install 'e3-trl\[reasoning_gym\]'"):
            call()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--dataset_name", "reasoning_gym:count_bits", "--dataset_config", '{"size": 16, "test_size": 4, "seed": 3}'],
        [
            "--dataset_name",
            "reasoning_gym",
            "--dataset_config",
            "{size: 16, test_size: 4, tasks: {count_bits: {}, gcd: {}}}",
        ],
    ],
    ids=["yaml", "json", "mixture"],
)
def test_a_recipes_data_are_those_it_describes(recipe, arguments):
    script_args, *_ = train.make_parser("fast_grpo").parse_args_and_config(["--config", recipe(), *arguments])
    data = train.load_data(script_args)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 16, "test": 4}
    assert set(data["train"]["task"]) == set(re.findall("count_bits|gcd", " ".join(arguments))) or {"chain_sum"}
    assert not questions(data["train"]) & questions(data["test"])


def test_a_recipe_trains_and_evaluates(recipe, tmp_path):
    path = recipe(eval_strategy="steps", eval_steps=2, num_generations_eval=1, per_device_eval_batch_size=4)
    train.run(["--config", path])
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [row["rewards/reasoning_gym_reward/unchecked"] for row in history if "loss" in row] == [0, 0]
    assert [row["step"] for row in history if "eval_pass@1" in row] == [2]
    assert "reasoning_gym:" not in (tmp_path / "run" / "README.md").read_text(), "no dataset on the Hub"


def first_digit(completion: str) -> str:
    """Of which the tiny model writes more than whole answers."""
    return (re.findall("[1-4]", completion) or ["0"])[0]


def test_e3_learns_a_tasks_difficulty_through_training(make_trainer, monkeypatch):
    monkeypatch.setattr(reasoning_gym, "extract_answer", first_digit)
    data = reasoning_gym_dataset("count_bits", size=16, min_n=1, max_n=200)
    trainer = make_trainer(
        train_dataset=data, reward_funcs=[reasoning_gym_reward], max_steps=8, max_completion_length=16
    )
    trainer.train()
    means = logged(trainer, "rewards/reasoning_gym_reward/mean")
    assert len(means) == 8
    assert 0 < np.mean(means) < 1


@pytest.fixture
def sampling(model_path, tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr(reasoning_gym, "extract_answer", first_digit)
    return {
        "num_samples": 4,
        "max_completion_length": 30,
        "reward_func": "reasoning_gym_reward",
        "dataset_config": {
            "size": 16,
            "test_size": 6,
            "tasks": {"count_bits": {"max_n": 200}, "chain_sum": SUMS | {"min_digits": 1, "max_digits": 1}},
        },
        "dtype": "float32",
        "use_vllm": False,
        "output_dir": str(tmp_path / "output"),
    }


def test_evaluate_reports_by_task_on_the_test_split(sampling, model_path, tmp_path):
    settings = sampling | {"model_name_or_path": [model_path], "benchmarks": ["reasoning_gym"]}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    evaluate.run(["--config", str(tmp_path / "evaluate.yaml")])
    report = json.loads((tmp_path / "output" / "report.json").read_text())["benchmarks"]
    assert list(report) in (["count_bits", "chain_sum", "average"], ["chain_sum", "count_bits", "average"])
    assert [report[task]["problems"] for task in ("count_bits", "chain_sum")] == [3, 3]
    assert report["average"]["pass@k"]["4"]["mean"] > 0
    config = dict(sampling["dataset_config"])
    test = reasoning_gym_dataset(config.pop("tasks"), split="test", **config)
    problems = load_problems("reasoning_gym", config=sampling["dataset_config"])
    assert [prompt[0]["content"] for prompt in problems["prompt"]] == [row[0]["content"] for row in test["prompt"]]
    assert problems["source"].tolist() == test["task"][:]


def test_prepare_data_samples_difficulty_and_what_it_writes_trains(sampling, model_path, tmp_path, recipe):
    settings = sampling | {"model_name_or_path": model_path, "dataset_name": ["reasoning_gym"]}
    settings |= {"test_sets": ["reasoning_gym"], "validation_per_source": 2}
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(settings))
    prepare_data.run(["--config", str(tmp_path / "prepare.yaml")])
    rows = pd.concat(pd.read_parquet(tmp_path / "output" / f"{name}.parquet") for name in ("train", "validation"))
    assert len(rows) == 16
    assert set(rows["source"]) == {"count_bits", "chain_sum"}
    assert rows["difficulty"].between(0, 1).all()
    assert rows["difficulty"].nunique() > 1
    assert not rows["solution"].str.contains("$", regex=False).any(), "answers stand as they are"
    folder = {"dataset_name": str(tmp_path / "output"), "dataset_config": None}
    train.run(["--config", recipe(**folder)])
    assert Path(tmp_path / "run" / "model.safetensors").exists()
