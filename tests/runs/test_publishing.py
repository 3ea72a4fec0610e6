"""A run goes to a Hub (tests/hub_server.py) and comes back from it; what goes wrong is named, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.hf_api
import pytest
import torch
import yaml
from conftest import build_trainer, make_dataset
from hub_server import READ, WRITE, Hub
from huggingface_hub import ModelCard, constants
from trl import ModelConfig

from e3_trl import E3GRPOConfig, cli
from e3_trl.commands import train
from e3_trl.commands.prepare_data import push as push_dataset
from e3_trl.runs.publishing import HubError, complete_model_card, publish
from e3_trl.scrub import without_secrets


ROOT = Path(__file__).parents[2]
REPO = "me/run"
SECRET = "not-for-others"
HF_TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """This process takes `hub` for the Hub, and nobody is logged in."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def run(hub, tmp_path, *command):
    """Run it in a process of its own, where nobody is logged in."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def write_recipe(tmp_path, token, model_path) -> str:
    make_dataset().to_json(tmp_path / "train.jsonl")
    fields = {
        "model_init_kwargs": {"token": SECRET},
        "model_name_or_path": model_path,
        "dataset_name": str(tmp_path / "train.jsonl"),
        "reward_funcs": ["tests.conftest.vowel_reward"],
        "bf16": False,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "max_completion_length": 8,
        "max_steps": 4,
        "num_generations": 4,
        "num_generations_max": 8,
        "num_generations_min": 2,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 16,
        "hub_token": token,
        "push_to_hub": True,
        "report_to": "none",
        "save_steps": 2,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return str(tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def trained(model_path, tmp_path_factory):
    """The folder of a finished run of 2 steps."""
    trainer = build_trainer(model_path, tmp_path_factory.mktemp("trained") / "run", max_steps=2)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card("run")
    return trainer.args.output_dir


@pytest.fixture
def folder(trained, tmp_path):
    """The same, for the test alone."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.slow
def test_a_training_is_pushed_and_loaded_back(hub, model_path, tmp_path):
    recipe = write_recipe(tmp_path, WRITE, model_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text(SECRET)
    logs = ("--report_to", "tensorboard", "--log_completions", "true")
    done = run(hub, tmp_path, "recipes/train.py", "--config", recipe, *logs)
    assert done.returncode == 0, done.stderr
    files = hub.repos[REPO]
    assert files.keys() >= {
        "README.md", "config.json", "figures/entropy.png", "figures/temperature.png", "model.safetensors",
        "report.json", "rollouts.jsonl", "tokenizer.json", "training_args.json",
    }  # fmt: skip
    for name in ("checkpoint-*", "runs/*", "completions/*", "notes.txt", "training_args.bin"):
        assert not any(fnmatch(path, name) for path in files), "pushed by transformers at a save, or at the end"
        assert [*(tmp_path / "run").glob(name)]
    settings = json.loads(files["training_args.json"])
    assert settings["temperature_schedule"] == "entropy"
    assert settings["max_steps"] == 4
    for secret in (WRITE, SECRET):
        assert secret.encode() not in b"".join(files.values())
    assert json.loads(files["report.json"])["step"] == 4
    # transformers also pushes at every save, without the figures; the last push is ours.
    assert [message for _, message, _ in hub.commits][-1] == "End of training"

    card = ModelCard(files["README.md"].decode())
    assert set(card.data.tags) >= {"e3", "trl", "grpo"}
    assert card.data.library_name == "transformers"
    for text in (
        "`temperature_schedule` | `entropy`",
        "| `reward` |",
        "figures/entropy.png",
        "liao2025enhancing",
        REPO,
    ):
        assert text in card.text

    load = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        f"t = T.from_pretrained('{REPO}'); m = M.from_pretrained('{REPO}'); i = t('say a0:', return_tensors='pt');"
        "print(m.generate(**i, min_new_tokens=3, max_new_tokens=3).shape[1] - i['input_ids'].shape[1])"
    )
    done = run(hub, tmp_path, "-c", load)
    assert done.stdout.strip() == "3", done.stderr


def test_no_pushed_file_holds_a_secret(hub, here, make_trainer, tmp_path):
    """Only the names of arguments that end in `_token` were left out, and the pickle of the arguments was pushed."""
    trainer = make_trainer(
        max_steps=1,
        hub_token=SECRET,
        model_init_kwargs={"token": SECRET, "proxies": {"https": f"http://me:{SECRET}@proxy:80"}},
        chat_template_kwargs={"notes": [HF_TOKEN], "max_tokens": 64},
        difficulty_reward_func="vowel_reward",
        vllm_server_base_url=f"https://me:{SECRET}@server",
        run_name=f"https://host/?token={SECRET}",
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card("run")
    folder = tmp_path / "run"
    with open(folder / "README.md", "a") as card:
        card.write(f"The data were https://me:{SECRET}@host/{HF_TOKEN}.\n")
    pickled = (folder / "training_args.bin").read_bytes()
    # As a run of before would have written them, or somebody's script.
    for name, place in (("training_args.json", "model_init_kwargs"), ("report.json", "settings")):
        content = json.loads((folder / name).read_text())
        assert SECRET not in str(content)
        content[place] |= {"token": SECRET, "note": HF_TOKEN}
        (folder / name).write_text(json.dumps(content))
    for name in ("_earlier", "earlier"):
        (folder / name).mkdir()
        (folder / name / "training_args.json").write_text(SECRET)

    publish(folder, REPO, WRITE)
    files = hub.repos[REPO]
    for secret in (SECRET, HF_TOKEN):
        assert [path for path, content in files.items() if secret.encode() in content] == []
        assert secret.encode() not in pickled
    assert "training_args.bin" not in files
    assert not any("earlier" in path for path in files)
    settings = json.loads(files["training_args.json"])
    assert settings["model_init_kwargs"]["proxies"] == {"https": "http://[removed]@proxy:80"}
    assert settings["chat_template_kwargs"] == {"notes": ["[removed]"], "max_tokens": 64}
    assert "The data were https://[removed]@host/[removed]." in files["README.md"].decode()
    args = torch.load(folder / "training_args.bin", weights_only=False)
    assert args.hub_token is None
    assert (args.difficulty_reward_func, args.save_strategy) == ("vowel_reward", trainer.args.save_strategy)


@pytest.mark.slow
def test_what_is_pushed_is_listed(hub, here, make_trainer, monkeypatch):
    """All files but some were pushed: with TensorBoard's, which holds all arguments, a token was."""
    trainer = make_trainer(
        max_steps=1, report_to="tensorboard", log_completions=True, model_init_kwargs={"token": SECRET}
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card("run")
    folder = Path(trainer.args.output_dir)
    assert [path for path in folder.rglob("events*") if SECRET.encode() in path.read_bytes()] == []
    for name in ("notes.txt", "modeling_own.py", "sub/model.safetensors", "figures/figure [1].png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    sent = {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "report.json", "rollouts.jsonl", "tokenizer.json", "tokenizer_config.json",
        "trainer_state.json", "training_args.json", *(f"figures/{path.name}" for path in folder.glob("figures/*")),
    }  # fmt: skip
    publish(folder, REPO, WRITE)
    assert hub.repos[REPO].keys() == sent
    monkeypatch.setenv("HF_TOKEN", WRITE)
    cli.main(["push", str(folder), REPO, "--completions"])
    (added,) = hub.repos[REPO].keys() - sent
    assert fnmatch(added, "completions/*.parquet")


def test_what_names_a_secret_and_what_does_not():
    secrets = [
        "token", "hf_token", "HF_TOKEN", "use_auth_token", "accessToken", "auth", "api_key", "apiKey", "X-Api-Key",
        "password", "db_password", "secret", "client_secret", "aws_secret_access_key", "Authorization", "credentials",
    ]  # fmt: skip
    harmless = [
        "max_tokens", "pad_token_id", "eos_token_ids", "tokenizer", "num_tokens", "key", "monkey", "secretary",
        "author_name", "passwordless", "add_special_tokens",
    ]  # fmt: skip
    harmless += [field.name for field in fields(E3GRPOConfig) if field.name != "hub_token"]
    deep = {"a": [{"b": (dict.fromkeys(secrets + harmless, "x"),)}]}
    assert without_secrets(deep) == {"a": [{"b": (dict.fromkeys(harmless, "x"),)}]}
    for text in ("outputs/hf_run", "ssh", "a@b.org", "https://host/path@2?page=3", "hf_", "see https://host, a@b.org"):
        assert without_secrets(text) == text


def test_no_token_is_noticed_before_anything_is_read(here):
    training_args = E3GRPOConfig("run", push_to_hub=True, use_cpu=True, bf16=False)
    with pytest.raises(HubError, match="hf auth login"):
        train.main(train.E3ScriptArguments(dataset_name="none.parquet"), training_args, ModelConfig("no_model"))


@pytest.mark.slow
def test_an_upload_that_breaks_off_loses_nothing(hub, here, model_path, tmp_path, monkeypatch):
    # Enough for the saves, which transformers pushes in the background and without a word if that fails, and the end.
    hub.failures = 9 * [("POST", "/commit/", "drop")]
    with pytest.raises(HubError, match="(?s)complete on disk.*e3-trl push <output_dir>"):
        train.run(["--config", write_recipe(tmp_path, WRITE, model_path)])
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert hub.commits == []
    hub.failures.clear()
    sent = len(hub.uploads)
    (tmp_path / "report.json").write_text('{"benchmarks": {"AIME 2024": {"pass@k": {"1": 0.25}}}}')
    monkeypatch.setenv("HF_TOKEN", WRITE)
    cli.main(["push", str(tmp_path / "run"), "--evaluation", str(tmp_path)])
    assert "| AIME 2024 | 25.00 | 1 |" in hub.repos[REPO]["README.md"].decode()
    assert json.loads(hub.repos[REPO]["report.json"])["step"] == 4
    assert "model.safetensors" in hub.repos[REPO]
    assert len(hub.uploads) == sent  # what had come over was not sent again


@pytest.mark.parametrize(
    ("token", "remedy"),
    [(None, "hf auth login"), ("hf_wrong", "hf auth login"), (READ, "token that can write there")],
    ids=["no token", "wrong token", "token that may only read"],
)
def test_a_token_that_will_not_do_is_named(hub, here, folder, token, remedy):
    hub.repos[REPO] = {}  # it is there already, so that not creating it is what fails
    with pytest.raises(HubError, match=f"(?s)cannot be written to.*{remedy}"):
        publish(folder, REPO, token)
    assert hub.commits == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (("POST", "/preupload/", 403), "token that can write there"),
        (("PUT", "/large/", 403), "token that can write there"),
        (("POST", "/commit/", 500), "Check the connection"),
        (("POST", "/commit/", 400), "status 400, .* the metadata of README.md"),
        (("POST", "/commit/", 404), r"status 404, .* the branch \(hub_revision\)"),
        (("POST", "/commit/", "drop"), "Check the connection"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_second_push_completes_a_first_that_failed(hub, here, folder, failure, message):
    hub.failures = [failure]
    with pytest.raises(HubError, match=message):
        publish(folder, REPO, WRITE)
    assert hub.commits == []
    publish(folder, REPO, WRITE)
    assert hub.repos[REPO]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_dropped_connection_is_tried_again(hub, here, folder):
    hub.failures = [("PUT", "/large/", "drop")]
    publish(folder, REPO, WRITE)
    assert hub.failures == []
    assert hub.repos[REPO]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_an_unfinished_folder_is_refused_before_the_hub_is_asked(here, tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        publish(tmp_path, REPO, WRITE)


def test_a_card_that_is_for_no_repository_names_its_folder(trained):
    assert f'model="{trained}", device_map' in (Path(trained) / "README.md").read_text()


def test_the_card_shows_results_once(folder):
    report = json.loads((folder / "report.json").read_text())
    report["benchmarks"] = {"AIME 2024": {"pass@k": {"16": 0.75, "1": 0.3125}}}
    (folder / "report.json").write_text(json.dumps(report))
    for _ in range(2):
        complete_model_card(folder, REPO)
    text = (folder / "README.md").read_text()
    assert "| benchmark | pass@1 (%) | pass@16 (%) | mean of runs |\n| --- |" in text
    assert "| AIME 2024 | 31.25 | 75.00 | 1 |" in text
    assert text.count("### Settings") == text.count("AIME 2024") == 1
    assert f'model="{REPO}"' in text
    assert "huggingface.co/None" not in text


def test_a_dataset_is_pushed_and_an_upload_that_fails_is_explained(hub, here, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE)
    make_dataset().to_parquet(tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text("---\npretty_name: data\n---\n")
    (tmp_path / "completions.jsonl").write_text("not for the Hub")
    hub.failures = [("PUT", "/large/", 403)]
    with pytest.raises(SystemExit, match="could not be pushed.*(?s:.)*run the same command again"):
        push_dataset(tmp_path, "me/data")
    push_dataset(tmp_path, "me/data")
    assert hub.repos["me/data"].keys() == {"README.md", "train.parquet"}
