"""recipes/train.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_dataset
from transformers import AutoModelForCausalLM

from e3_trl.commands import train


ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(model_path, tmp_path):
    """Write a recipe with these settings and return the command that trains it."""
    make_dataset().to_json(tmp_path / "train.jsonl")
    (tmp_path / "data").mkdir()
    make_dataset().to_parquet(tmp_path / "data" / "train.parquet")
    make_dataset(8).to_parquet(tmp_path / "data" / "validation.parquet")
    (tmp_path / "data" / "report.json").write_text('{"not": "data"}')

    def write(**settings):
        fields = {
            "model_name_or_path": model_path,
            "dtype": "float32",
            "dataset_name": str(tmp_path / "train.jsonl"),
            "reward_funcs": ["tests.conftest.vowel_reward"],
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "max_completion_length": 8,
            "max_steps": 6,
            "num_generations": 4,
            "num_generations_max": 8,
            "num_generations_min": 2,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 16,
            "report_to": "none",
            "use_cpu": True,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields | settings))
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
        return [*launch, "recipes/train.py", "--config", str(path)]

    return write


def run(command, *arguments):
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def history(tmp_path):
    return json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]


def test_trains_saves_and_resumes(recipe, tmp_path):
    command = recipe(save_strategy="steps", save_steps=2)
    done = run(command, "--max_steps", "4", "--annealing_start", "0.5")
    assert done.returncode == 0, done.stderr
    assert len(history(tmp_path)) == 5
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert len((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()) == 16
    done = run(command, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in history(tmp_path) if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_trains_lora_on_prepared_data_with_validation(recipe, tmp_path):
    command = recipe(
        dataset_name=str(tmp_path / "data"),
        dataset_test_split="validation",
        eval_steps=3,
        eval_strategy="steps",
        lora_r=4,
        num_generations_eval=1,
        per_device_eval_batch_size=4,
        use_peft=True,
    )
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert [entry["step"] for entry in history(tmp_path) if "eval_pass@1" in entry] == [3, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generation": 4}, r"num_generation\b"),
        ({"eval_strategy": "steps"}, "dataset_test_split is 'test', but the dataset has only .'train'."),
        (
            {"reward_funcs": ["tests.conftest.no_such_reward"]},
            "There is no reward function 'tests.conftest.no_such_reward'.*reward_funcs",
        ),
        ({"reward_funcs": ["vowels"]}, "There is no reward function 'vowels'.*Choose one of"),
        ({"dataset_name": "no_such_file.parquet"}, "dataset_name is 'no_such_file.parquet'"),
        ({"dataset_name": "setup.cfg"}, "dataset_name is 'setup.cfg'. Give a .parquet, .json or .jsonl file"),
        ({"dataset_name": None}, "dataset_name is not set. Name a dataset"),
        ({"model_name_or_path": None}, "model_name_or_path is not set. Name a model"),
        ({"num_generations_min": 5}, "num_generations_min is 5"),
    ],
    ids=str,
)
def test_a_mistake_in_the_recipe_is_named(recipe, monkeypatch, settings, message):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ValueError, match=message):
        train.main(*train.make_parser().parse_args_and_config(recipe(**settings)[-2:]))


def test_a_run_that_a_scheduler_ends_saves_and_says_so(recipe, tmp_path, capsys):
    command = recipe(reward_funcs=["tests.conftest.reward_of_a_terminated_run"], save_strategy="no")
    with pytest.raises(SystemExit) as ended:
        train.main(*train.make_parser().parse_args_and_config(command[-2:]))
    assert ended.value.code == 143
    assert "SIGTERM: saved checkpoint-3" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-3" / "e3_state.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists(), "it is not over"
