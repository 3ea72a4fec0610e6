"""recipes/train.py as a user calls it."""

import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import yaml
from conftest import make_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from e3_trl import read_rollouts
from e3_trl.commands import train
from e3_trl.grpo import checks
from e3_trl.runs import figures, page
from e3_trl.runs.dashboards import DashboardCallback


ROOT = Path(__file__).parents[2]


def write_recipe(folder, model_path, **settings) -> str:
    """Write data and a recipe to `folder`."""
    folder.mkdir(exist_ok=True)
    make_dataset().to_json(folder / "train.jsonl")
    (folder / "data").mkdir()
    make_dataset().to_parquet(folder / "data" / "train.parquet")
    make_dataset(8).to_parquet(folder / "data" / "validation.parquet")
    (folder / "data" / "report.json").write_text('{"not": "data"}')
    fields = {
        "model_name_or_path": model_path,
        "dtype": "float32",
        "dataset_name": str(folder / "train.jsonl"),
        "reward_funcs": ["tests.conftest.vowel_reward"],
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "max_completion_length": 8,
        "max_steps": 6,
        "num_generations": 4,
        "num_generations_max": 8,
        "num_generations_min": 2,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 16,
        "report_to": "none",
        "use_cpu": True,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields | settings))
    return str(path)


@pytest.fixture
def recipe(model_path, tmp_path):
    def write(**settings) -> str:
        return write_recipe(tmp_path, model_path, **settings)

    return write


def history(folder):
    return json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def launched(model_path, tmp_path_factory):
    """A run by `accelerate launch` that has a bit of everything, since one takes long."""
    folder = tmp_path_factory.mktemp("launched")
    evaluation = {"dataset_test_split": "validation", "eval_strategy": "steps", "eval_steps": 7}
    evaluation |= {"num_generations_eval": 1, "per_device_eval_batch_size": 4}
    dashboards = {"report_to": ["trackio", "tensorboard"], "project": "e3", "run_name": "first"}
    data = {"dataset_name": str(folder / "data")}
    saved = {"save_strategy": "steps", "save_steps": 2}
    saved["log_completions"] = True
    path = write_recipe(folder, model_path, logging_steps=2, **evaluation, **dashboards, **data, **saved)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "recipes/train.py"]
    command += ["--config", path, "--max_steps", "8", "--annealing_start", "0.5"]
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_trains_and_saves(launched):
    assert [entry["step"] for entry in history(launched) if "loss" in entry] == [2, 4, 6, 8]
    AutoModelForCausalLM.from_pretrained(launched / "run")
    assert len((launched / "run" / "rollouts.jsonl").read_text().splitlines()) == 8 * 4


@pytest.mark.slow
def test_the_page_of_the_run_is_written_at_its_end(launched):
    """With the texts of its prompts, what it warned of, and the completions that were logged."""
    html = (launched / "run" / "report.html").read_text()
    assert "It warned of nothing." in html
    (rows,) = re.findall(r'id="rows-0">(.*?)</script>', html)
    rows = json.loads(rows)["rows"]
    assert len(rows["id"]) == len(set(rows["id"])) > 8
    assert all(text.startswith("say ") for text in rows["text"])
    (completions,) = re.findall(r'id="completions-0">(.*?)</script>', html)
    assert json.loads(completions)


def test_a_page_that_cannot_be_written_costs_nothing(make_trainer, monkeypatch, caplog):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(page, "write_page", fail)
    trainer = make_trainer()
    train.write_page_of(trainer)
    (message,) = [message for message in caplog.messages if "was not written" in message]
    assert "report.html was not written: OSError('no space left'). All else was; `e3-trl report` writes it." in message


@pytest.mark.slow
def test_resumes(launched, recipe, tmp_path):
    shutil.copytree(launched / "run", tmp_path / "run")
    train.run(["--config", recipe(max_steps=10), "--resume_from_checkpoint", "true"])
    assert [entry["step"] for entry in history(tmp_path) if "loss" in entry] == [2, 4, 6, 8, 10]


def test_a_folder_without_a_checkpoint_is_named(recipe, tmp_path):
    with pytest.raises(SystemExit) as ended:
        train.run(["--config", recipe(), "--resume_from_checkpoint", "true"])
    assert f"{tmp_path / 'run'} (output_dir) holds no complete checkpoint" in ended.value.code
    assert ended.value.code.endswith("checkpoint. Unset it to start a new run.\n(E3_TRACEBACK=1 shows where.)")


@pytest.mark.slow
def test_dashboards_get_budgets_and_figures(launched):
    rows = [row for row in read_rollouts(launched / "run") if row["difficulty"] is not None]
    budgets = {6: [[] for _ in range(10)], 8: [[] for _ in range(10)]}  # of two steps each, by tenth of the difficulty
    for row in rows:
        budgets[6 if row["step"] < 7 else 8][math.ceil(10 * row["difficulty"] - 1e-9) - 1].append(row["rollouts"])
    expected = {step: [mean(tenth) if tenth else 0 for tenth in tenths] for step, tenths in budgets.items()}
    assert len(rows) == 16, "a pass of prompts with known difficulty"
    name = "train/rollouts/by_difficulty"

    (folder,) = (launched / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    histograms = {event.step: event.histogram_value for event in events.Histograms(name)}
    assert list(histograms) == [6, 8]
    for step, value in histograms.items():
        assert value.bucket == pytest.approx([0, *expected[step]])
    assert histograms[6].bucket_limit == pytest.approx(np.linspace(0, 1, 11))
    drawn = {f"figures/{path.stem}" for path in (launched / "run" / "figures").glob("*.png")}
    assert drawn >= {"figures/entropy", "figures/temperature", "figures/budgets"}
    assert set(events.Tags()["images"]) == drawn

    with sqlite3.connect(launched / "trackio" / "e3.db") as database:
        logged = [(step, json.loads(row)) for step, row in database.execute("SELECT step, metrics FROM metrics")]
    steps = [step for step, row in logged if "train/rollouts/max" in row]
    assert steps[:3] == [2, 4, 6], "the histograms have not shifted the metrics, as an evaluation does"
    arrived = {row["train/global_step"]: row[name]["values"] for _, row in logged if name in row}
    assert list(arrived) == [6, 8]
    for step, values in arrived.items():
        assert values == pytest.approx(expected[step])
    (images,) = [row for _, row in logged if "figures/entropy" in row]
    assert drawn <= set(images)
    for figure in drawn:
        assert (launched / "trackio" / "media" / images[figure]["file_path"]).stat().st_size > 10_000


def test_a_dashboard_that_is_not_installed_is_named_before_a_model_is_loaded(make_trainer, monkeypatch):
    monkeypatch.setattr(checks, "get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=r"report_to is \['wandb'\], and wandb is not installed. `pip install wandb`"):
        make_trainer(model="no/such/model", report_to="wandb")
    with pytest.raises(ValueError, match=r"report_to is \['mlflow'\], and mlflow is not installed. `pip install mlf"):
        make_trainer(model="no/such/model", report_to="mlflow")
    with pytest.raises(ValueError, match="tensorbord is not supported"):
        make_trainer(model="no/such/model", report_to="tensorbord")


def test_what_cannot_be_sent_costs_nothing(make_trainer, monkeypatch, caplog):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(figures, "draw_runs", fail)
    trainer = make_trainer(report_to="tensorboard", max_steps=8)
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, DashboardCallback)]
    monkeypatch.setattr(callback, "_send_budgets", fail)
    assert trainer.train().global_step == 8
    for what in ("the figures", "rollouts by difficulty"):
        message = f"Could not send {what} to tensorboard: OSError('No space left on device')"
        assert caplog.text.count(message) == 1, "once, not with each log"


@pytest.mark.slow
def test_trains_lora_on_prepared_data_with_validation(recipe, tmp_path):
    path = recipe(
        dataset_name=str(tmp_path / "data"),
        dataset_test_split="validation",
        eval_steps=3,
        eval_strategy="steps",
        lora_r=4,
        num_generations_eval=1,
        per_device_eval_batch_size=4,
        use_peft=True,
    )
    train.run(["--config", path])
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
        ({"load_in_4bit": True}, r"load_in_4bit is True.*pip install 'e3-trl\[quantization\]'"),
    ],
    ids=str,
)
def test_a_mistake_in_the_recipe_is_named(recipe, monkeypatch, settings, message):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(train, "is_bnb_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train.main(*train.make_parser().parse_args_and_config(["--config", recipe(**settings)]))


def test_a_run_that_a_scheduler_ends_saves_and_says_so(recipe, tmp_path, capsys):
    path = recipe(reward_funcs=["tests.conftest.reward_of_a_terminated_run"], save_strategy="no")
    with pytest.raises(SystemExit) as ended:
        train.main(*train.make_parser().parse_args_and_config(["--config", path]))
    assert ended.value.code == 143
    assert "SIGTERM: saved checkpoint-3" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-3" / "run_state.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists(), "it is not over"


def test_a_recipe_without_e3s_fields_trains_the_other_trainer(recipe, tmp_path):
    path = Path(recipe(trainer="fast_grpo", max_steps=2))
    path.write_text("".join(line for line in path.open() if not line.startswith("num_generations_m")))
    train.run(["--config", str(path)])
    assert [entry["step"] for entry in history(tmp_path) if "loss" in entry] == [1, 2]
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()
    assert "micro_batching" in json.loads((tmp_path / "run" / "report.json").read_text())["settings"]
    with pytest.raises(SystemExit, match="rollout_allocation"):
        train.run(["--config", str(path), "--rollout_allocation", "rank"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rerank_every", "9"], "rerank_every is 9, a setting that is gone. New ranks .* leave it out"),
        (["--vllm_request_seeds", "true"], "vllm_request_seeds is true, a setting that is gone.*leave it out"),
        (["--trainer", "grpo"], r"trainer is 'grpo'. Set it to one of \['e3', 'fast_grpo'\]"),
    ],
)
def test_a_setting_that_is_gone_says_what_became_of_it(recipe, arguments, message):
    path = Path(recipe())
    with pytest.raises(SystemExit, match=message):
        train.run(["--config", str(path), *arguments])
    path.write_text(path.read_text() + f"{arguments[0][2:]}: {arguments[1]}\n")
    with pytest.raises(SystemExit, match=message.replace("true", "True")):
        train.run(["--config", str(path)])
