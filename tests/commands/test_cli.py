"""`e3-trl`, from a wheel as from a clone; and what is loaded for what."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make_dataset, save_tiny_model
from hub_server import Hub
from transformers import AutoConfig

import e3_trl
from e3_trl import __version__, cli


ROOT = Path(__file__).parents[2]


def run(*command, cwd=ROOT, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


LOADED = [
    ("import e3_trl", ["numpy", "torch"]),
    ("from e3_trl import allocate_rollouts, pass_at_k, read_rollouts", ["pandas", "torch"]),
    ("from e3_trl import DifficultyTracker, TemperatureSchedule", ["torch"]),
    ("import e3_trl.commands.replay, e3_trl.commands.plot, e3_trl.commands.report", ["transformers", "trl"]),
    # until a recipe has been understood
    ("import e3_trl.commands.train", ["trl.trainer.grpo_trainer", "vllm"]),
]


@pytest.mark.slow
def test_what_is_not_needed_is_not_loaded():
    lines = ["import sys"]
    for statement, not_loaded in LOADED:
        lines += [statement, f"print([name for name in {not_loaded} if name in sys.modules])"]
    done = run(sys.executable, "-c", "\n".join(lines))
    found = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == ["[]"] * len(LOADED), done.stderr


def test_everything_that_is_public_can_be_had():
    assert set(e3_trl.__all__) <= set(dir(e3_trl))
    assert all(getattr(e3_trl, name) is not None for name in e3_trl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'E3Trainer'"):
        _ = e3_trl.E3Trainer


def test_commands_are_listed(capsys):
    for arguments in ([], ["--help"]):
        cli.main(arguments)
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in cli.COMMANDS)
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
    with pytest.raises(SystemExit, match="no command 'tain'(?s:.*)train"):
        cli.main(["tain"])


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "prepare-data", "plot", "report", "push", "replay", "memory"]
)
def test_each_command_says_what_it_takes(command, capsys):
    if command == "memory":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: e3-trl {command}" in capsys.readouterr().out


@pytest.fixture
def recipe(model_path, tmp_path):
    """Write a recipe with these settings, and what it names."""
    make_dataset().to_json(tmp_path / "train.jsonl")
    settings = {
        "model_name_or_path": model_path,
        "dtype": "float32",
        "dataset_name": "train.jsonl",
        "reward_funcs": ["my_rewards.length"],
        "bf16": False,
        "max_completion_length": 8,
        "max_steps": 2,
        "num_generations": 4,
        "output_dir": "run",
        "per_device_train_batch_size": 16,
        "report_to": "none",
        "use_cpu": True,
    }
    reward = ["import e3_trl", "", "def length(completions, **kwargs):", "    print(e3_trl.__file__)"]
    reward += ["    return [len(text) / 7 for text in completions]"]
    (tmp_path / "my_rewards.py").write_text("\n".join(reward))

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_generation": 4, "xyzzy": 1, "env": {}},
            "ValueError: num_generation is not a setting of trainer 'e3'. Did you mean num_generations\\? xyzzy is "
            "not a setting of trainer 'e3'. Leave it out",
        ),
        ({"dataset_name": "nowhere.jsonl"}, "ValueError: dataset_name is 'nowhere.jsonl', and there is no such file"),
        ({"num_generations_max": 3}, "ValueError: num_generations_max is 3"),
        ({"model_name_or_path": "./nowhere"}, "ValueError: model_name_or_path is .*there is no such folder"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message(recipe, changes, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--config", recipe(**changes)]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert re.match(f"(?s){message}", ended.value.code), ended.value.code
    assert ended.value.code.endswith("(E3_TRACEBACK=1 shows where.)")
    monkeypatch.setenv("E3_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError)):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --config RECIPE --lerning_rate=1", "lerning_rate is not .* trainer 'e3'. Did you mean learning_rate"),
        ("train --config RECIPE --xyzzy 1", "xyzzy is not a setting of trainer 'e3'. Leave it out; --help"),
        (
            "train --config RECIPE --trainer fast_grpo --temperature_schedule constant",
            "temperature_schedule is not a setting of trainer 'fast_grpo'. Set trainer to 'e3', or leave it out",
        ),
        (
            "evaluate --num_sample=2 --benchmark x.jsonl --sede 1",
            "sede is not a setting of e3-trl evaluate. Did you me",
        ),
        (
            "prepare-data --max_prompt_token=2 --datasets x",
            "datasets is not a setting of e3-trl prepare-data. Did you m",
        ),
    ],
)
def test_a_mistyped_setting_is_told_the_nearest(recipe, arguments, message):
    with pytest.raises(SystemExit, match=f"^ValueError: {message}"):
        cli.main(arguments.replace("RECIPE", recipe()).split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "is no such folder. Check the path") for name in ("../nowhere", "/nowhere", "a/b/c", "a/", "a b")),
        ("outputs/nowhere", r"folder here, and the Hub cannot be reached \(http://127.0.0.1:9: .*Give a folder, or"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate", "prepare-data", "prepare-data --tokenizer_name_or_path"])
def test_a_model_that_is_not_there_is_named_at_once(recipe, command, name, message, monkeypatch, tmp_path, model_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    command, field = (*command.split(), "--model_name_or_path")[:2]
    arguments = {
        "train": ["--config", recipe()],
        "evaluate": ["--benchmarks", "problems.jsonl"],
        "prepare-data": ["--dataset_name", "problems.jsonl", "--model_name_or_path", model_path],
    }[command]
    begin = time.monotonic()
    with pytest.raises(SystemExit, match=f"{field[2:]} is '{name}', (?s:.*){message}"):
        cli.main([command, *arguments, field, name])
    assert time.monotonic() - begin < 10


def test_a_name_that_the_hub_does_not_know_is_named(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(SystemExit, match="'me/nowhere', which is no folder here and no model on the Hub.*Check"):
            cli.main(["train", "--config", recipe(model_name_or_path="me/nowhere")])


def test_a_rank_says_what_it_alone_has_met(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("e3_trl.commands.LAUNCHER_ENDS_OTHERS", 0.5)
    said = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        begin = time.monotonic()
        with pytest.raises(SystemExit, match="num_generations_max is 3") as ended:
            cli.main(["train", "--config", recipe(num_generations_max=3)])
        said[rank] = ended.value.code, time.monotonic() - begin > 0.5
    assert said["1"] == (f"Rank 1: {said['0'][0]}", True), "after the launcher could have ended it"


@pytest.mark.slow
def test_a_mistake_on_two_ranks_is_said_once(recipe, tmp_path):
    config = yaml.safe_load((ROOT / "e3_trl" / "accelerate_configs" / "multi_gpu.yaml").read_text())
    config |= {"num_processes": 2, "main_process_port": 0, "mixed_precision": "no"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", recipe(model_name_or_path="./nowhere", ddp_backend="gloo")]
    command = [sys.executable, "-m", "e3_trl.cli", "train", "--accelerate_config", "two.yaml", *arguments]
    done = run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert done.stderr.count("model_name_or_path is './nowhere'") == 1
    assert "Traceback" not in done.stderr


def test_an_accelerate_configuration_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="accelerate_config is 'zero4'. Give a file, or one of cpu, .*zero3_8gpu"):
        cli.main(["train", "--accelerate_config", "zero4", "--config", "recipe.yaml"])


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("memory", "deepspeed", "deepspeed"), ("plot", "matplotlib", "figures")] + [("report", "itables", "figures")],
)
def test_a_package_that_is_not_installed_is_named(command, package, extra, monkeypatch):
    for name in (f"e3_trl.commands.{command}", "e3_trl.runs.figures", "e3_trl.runs.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    with pytest.raises(
        SystemExit, match=f"e3-trl {command} needs {package}. `pip install 'e3-trl.{extra}.'` brings it."
    ):
        cli.main([command, "--help"])


class Without:
    """An importer of an environment without a package."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_memory_of_a_recipe_of_ones_own(recipe, capsys):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    path = recipe(vllm_max_model_length=64)
    with pytest.raises(SystemExit, match="does not say what GPUs it is for. Give --gpu_memory"):
        cli.main(["memory", "--config", path])
    cli.main(["memory", "--config", path, "--gpu_memory", "40", "--num_gpus", "2"])
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    with pytest.raises(SystemExit, match="does not set vllm_max_model_length"):
        cli.main(["memory", "--config", recipe(), "--gpu_memory", "40"])


@pytest.mark.parametrize(("dtype", "as_much_as"), [("auto", "float32"), ("float16", "bfloat16")])
def test_memory_of_lora_in_any_data_type(recipe, dtype, as_much_as):
    """The checkpoint's is float32."""
    memory = pytest.importorskip(
        "e3_trl.commands.memory", reason="DeepSpeed is not installed: `make install` brings it"
    )
    weights = {}
    for name in (dtype, as_much_as, "float32"):
        path = Path(recipe(vllm_max_model_length=64, use_peft=True, dtype=name))
        weights[name] = memory.estimate(path, gpus=(40, 1, 1))["weights"]
    assert weights[dtype] == weights[as_much_as]
    assert (weights[dtype] == weights["float32"]) == (dtype == "auto")


def test_memory_counts_tied_embeddings_once(tmp_path):
    memory = pytest.importorskip(
        "e3_trl.commands.memory", reason="DeepSpeed is not installed: `make install` brings it"
    )
    config = AutoConfig.from_pretrained(save_tiny_model(tmp_path, tie_word_embeddings=True))
    embedding = config.vocab_size * config.hidden_size
    tied = memory.count_parameters(config)["total"]
    config.tie_word_embeddings = False
    assert memory.count_parameters(config)["total"] == tied + embedding


@pytest.mark.parametrize(
    ("settings", "sequences"),
    [
        ({}, 16),
        ({"gradient_accumulation_steps": 2}, 32),
        ({"generation_batch_size": 64}, 32),
        ({"use_vllm": True, "vllm_mode": "server"}, 0),
    ],
)
def test_memory_counts_vllm_where_it_is(recipe, settings, sequences):
    memory = pytest.importorskip(
        "e3_trl.commands.memory", reason="DeepSpeed is not installed: `make install` brings it"
    )
    common = {"vllm_max_model_length": 64, "vllm_gpu_memory_utilization": 0.5}
    without = memory.estimate(Path(recipe(**common, **settings)), gpus=(40, 2, 1))
    assert (without["vllm_weights"], without["sequences"]) == (0, sequences)
    assert without["kv_cache"] == sequences * 64 * 2 * 2 * 2 * 32, "rows x tokens x layers x 2 bytes x key, value x 32"
    assert without["peak"] < 2**30
    assert memory.estimate(Path(recipe(**common, use_vllm=True)), gpus=(40, 2, 1))["peak"] > 20e9


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, installed where nothing else is; what it requires comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("e3_trl", "LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".", cwd=folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").iterdir()
    assert wheel.name == f"e3_trl-{__version__}-py3-none-any.whl"
    done = run(*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_trains_and_draws(installed, recipe, tmp_path):
    command = [sys.executable, str(installed / "bin" / "e3-trl")]
    assert {path.name for path in (installed / "e3_trl" / "accelerate_configs").iterdir()} >= {
        "cpu.yaml",
        "zero3.yaml",
    }
    done = run(*command, "train", "--config", recipe(), cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert str(installed / "e3_trl" / "__init__.py") in done.stdout.splitlines(), "not the clone's"
    assert len((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()) == 8
    done = run(*command, "plot", "run", "--output_dir", "figures", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "figures").glob("*.png"))


@pytest.mark.slow
def test_a_launcher_hands_sigterm_on(recipe, tmp_path):
    """Left alone, the training would go on beside the run that resumes it."""
    reward = ["import os, signal", "", "def length(completions, trainer_state, **kwargs):"]
    reward += ["    if trainer_state.global_step == 2:", "        os.kill(os.getppid(), signal.SIGTERM)"]
    (tmp_path / "my_rewards.py").write_text("\n".join([*reward, "    return [len(text) / 7 for text in completions]"]))
    arguments = ["train", "--accelerate_config", "cpu", "--config", recipe(max_steps=200)]
    done = run(sys.executable, "-m", "e3_trl.cli", *arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(checkpoint.name.split("-")[-1]) < 200
    assert f"SIGTERM: saved {checkpoint.name}" in done.stdout


def test_a_recipe_that_is_no_yaml_is_one_message(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output_dir: [run\nseed: 1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--config", str(tmp_path / "recipe.yaml")])
    assert "recipe.yaml" in ended.value.code
    assert "line 2" in ended.value.code
