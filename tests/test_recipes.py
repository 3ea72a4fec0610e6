"""Every recipe, with the accelerate config that its first line names, through the real parsers."""

import re
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig, TrlParser

from e3_trl import E3GRPOConfig
from recipes.train import E3ScriptArguments


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*/config_*.yaml"))
PAPER = [path for path in RECIPES if "DeepSeek-R1-Distill" in path.parent.name and "lora" not in path.name]
E3_BLOCK = {"rollout_allocation", "temperature_schedule", "output_dir"}


def parse(path: Path) -> tuple[E3ScriptArguments, E3GRPOConfig, ModelConfig]:
    parser = TrlParser((E3ScriptArguments, E3GRPOConfig, ModelConfig))
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        # Only this differs from a run on the machine that the recipe is for: there is no launcher, and maybe no GPU.
        file.writelines(line for line in path.open() if not line.startswith("ddp_backend"))
        file.flush()
        return parser.parse_args_and_config(["--config", file.name, "--use_cpu", "true", "--bf16", "false"])


def accelerate_config(path: Path):
    named = re.search(r"accelerate_configs/\w+\.yaml", path.read_text().splitlines()[0])
    return load_config_from_file(str(ROOT / named.group()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_is_understood(path):
    parse(path)
    keys = list(yaml.safe_load(path.read_text()))
    training = path.read_text().split("# GRPO trainer config\n")[1].splitlines()
    names = [line.split(":")[0] for line in training if line[0] not in "-# "]
    assert names == sorted(names)
    assert len(keys) == len(set(keys))
    assert len(path.read_text().splitlines()) < 60, "one screen"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_paper_recipes_have_the_papers_numbers(path):
    _, args, model = parse(path)
    processes = accelerate_config(path).num_processes
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    prompts = args.generation_batch_size * processes // args.num_generations
    assert rows == 512
    assert prompts == 64
    assert args.num_train_epochs * (10_240 // prompts) == 480
    assert args.vllm_max_model_length >= 2048 + args.max_completion_length
    assert processes % args.vllm_tensor_parallel_size == 0
    assert args.learning_rate == (5e-6 if "1.5B" in model.model_name_or_path else 2e-6)
    assert (args.max_completion_length, args.beta, args.temperature, args.loss_type) == (6144, 0.0, 1.0, "grpo")
    assert args.vllm_enable_sleep_mode


@pytest.mark.parametrize("folder", sorted({path.parent for path in RECIPES}), ids=lambda folder: folder.name)
def test_e3_and_grpo_differ_in_the_e3_block_alone(folder):
    e3, grpo = (yaml.safe_load((folder / f"config_{name}.yaml").read_text()) for name in ("e3", "grpo"))
    assert {key for key in e3 if e3[key] != grpo.get(key)} | (grpo.keys() - e3.keys()) == E3_BLOCK
    assert (grpo["rollout_allocation"], grpo["temperature_schedule"]) == ("uniform", "constant")


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_is_understood(path):
    config = load_config_from_file(str(path))
    gpus = re.search(r"(?:(\d)x)?(\d)gpu", path.stem)
    if gpus:
        machines = int(gpus[1] or 1)
        assert (config.num_machines, config.num_processes) == (machines, machines * int(gpus[2]))
    stage = re.match(r"zero(\d)", path.stem)
    assert config.deepspeed_config.get("zero_stage") == (int(stage[1]) if stage else None)
