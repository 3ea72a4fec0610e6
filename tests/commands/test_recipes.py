"""Every recipe, with the accelerate config that its first line names, through the real parsers."""

import re
import subprocess
import weakref
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
from trl import ModelConfig, TrlParser

from e3_trl import E3GRPOConfig
from e3_trl.commands.evaluate import EvaluationArguments
from e3_trl.commands.plot import make_parser as make_plot_parser
from e3_trl.commands.prepare_data import PreparationArguments
from e3_trl.commands.push import make_parser as make_push_parser
from e3_trl.commands.train import E3ScriptArguments


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/config_*.yaml"))
PAPER = [path for path in RECIPES if "DeepSeek-R1-Distill" in path.parent.name]
README = (ROOT / "recipes" / "README.md").read_text()
# What each recipe sets otherwise than config_grpo.yaml, besides the output folder.
BLOCKS = {
    "e3": {"rollout_allocation": "rank", "temperature_schedule": "entropy"},
    "grpo_er": {"entropy_coef": 1e-4},
    "grpo_ts": {"temperature_schedule": "entropy", "annealing_start": None},
    "grpo_ts_an": {"temperature_schedule": "entropy"},
    "dapo": {"dynamic_sampling": True, "max_resample_rounds": 10, "epsilon_high": 0.28, "loss_type": "dapo"},
    "prepo": {
        "prompt_selection_ratio": 0.2,
        "entropy_weighting": True,
        "num_train_epochs": 15,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
    },
    "best": {
        "rollout_allocation": "rank",
        "temperature_schedule": "entropy",
        "temperature_spread": 0.5,
        "advantage_scale": "mean",
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
    },
}
PARSERS = {"e3-trl plot": make_plot_parser, "e3-trl push": make_push_parser}
PAPERS_RUNS = {"grpo", "grpo_er", "grpo_ts", "grpo_ts_an", "dapo", "e3"}


def parse(path: Path, *arguments: str) -> tuple[E3ScriptArguments, E3GRPOConfig, ModelConfig]:
    parser = TrlParser((E3ScriptArguments, E3GRPOConfig, ModelConfig))
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        # Only this differs from a run on the machine that the recipe is for: there is no launcher, and maybe no GPU.
        file.writelines(line for line in path.open() if not line.startswith("ddp_backend"))
        file.flush()
        settings = ["--config", file.name, "--use_cpu", "true", "--bf16", "false", *arguments]
        return parser.parse_args_and_config(settings)


def accelerate_config(path: Path):
    named = re.search(r"accelerate_configs/\w+\.yaml", path.read_text().splitlines()[0])
    return load_config_from_file(str(ROOT / named.group()))


def rows_per_update(args: E3GRPOConfig, processes: int) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


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
    prompts = args.generation_batch_size * processes // args.num_generations
    assert re.match(rf"# {processes} GPUs? of ", path.read_text())
    assert rows_per_update(args, processes) == 512
    assert prompts == 64
    assert args.num_train_epochs * (10_240 // round(prompts / args.prompt_selection_ratio)) == 480
    assert args.vllm_max_model_length >= PreparationArguments.max_prompt_tokens + args.max_completion_length
    assert processes % args.vllm_tensor_parallel_size == 0
    paper = 5e-6 if "1.5B" in model.model_name_or_path else 2e-6
    assert args.learning_rate == pytest.approx(10 * paper if model.use_peft else paper)
    assert model.use_peft == ("lora" in path.name)
    if model.use_peft:
        assert model.lora_dropout == 0, "with dropout, training scores another policy than the one that sampled"
        assert (model.dtype == "float32") != args.vllm_lora_sync, (
            "merging and unmerging at every sync wears a bfloat16 base away"
        )
    assert (args.max_completion_length, args.beta, args.temperature) == (6144, 0.0, 1.0)
    assert args.loss_type == ("dapo" if "dapo" in path.name else "grpo")
    assert args.vllm_enable_sleep_mode


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if yaml.safe_load(path.read_text()).get("use_vllm")],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_vllm_recipes_choose_their_importance_weights(path):
    """None did, and TRL's default weighs whole completions: most of it is noise at 6,144 tokens, and not in Eq. 1."""
    _, args, _ = parse(path)
    assert "vllm_importance_sampling_correction" in yaml.safe_load(path.read_text())
    assert args.vllm_importance_sampling_correction == (path.stem.removeprefix("config_") not in PAPERS_RUNS)
    if args.vllm_importance_sampling_correction:
        assert args.vllm_importance_sampling_mode == "token_truncate"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *((folder, name) for folder in sorted({path.parent for path in PAPER}) for name in BLOCKS),
        (ROOT / "recipes" / "quickstart", "e3"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_recipes_differ_from_grpo_in_their_own_block_alone(folder, name):
    recipe, grpo = (yaml.safe_load((folder / f"config_{kind}.yaml").read_text()) for kind in (name, "grpo"))
    differs = {key: value for key, value in recipe.items() if key not in grpo or value != grpo[key]}
    assert differs.pop("output_dir") != grpo["output_dir"]
    assert differs == BLOCKS[name]
    assert not grpo.keys() - recipe.keys()
    assert (grpo["rollout_allocation"], grpo["temperature_schedule"]) == ("uniform", "constant")


def test_the_quickstarts_best_recipe_is_what_the_study_ran():
    study = yaml.safe_load((ROOT / "benchmarks" / "study" / "efficiency.yaml").read_text())
    best, e3 = (
        yaml.safe_load((ROOT / f"recipes/quickstart/config_{name}.yaml").read_text()) for name in ("best", "e3")
    )
    differs = {key: value for key, value in best.items() if value != e3.get(key)}
    assert differs.pop("output_dir") != e3["output_dir"]
    assert differs == study["methods"]["e3_spread_mean"]


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_is_understood(path):
    config = load_config_from_file(str(path))
    written = {"gpu_ids": "all"} | load_config_from_file(str(path)).to_dict()  # to_dict drops what is None
    assert written == {"gpu_ids": "all"} | yaml.safe_load(path.read_text()), "as `accelerate config` writes it"
    gpus = re.search(r"(?:(\d)x)?(\d)gpu", path.stem)
    if gpus:
        machines = int(gpus[1] or 1)
        assert (config.num_machines, config.num_processes) == (machines, machines * int(gpus[2]))
    if config.num_machines > 1:
        # Otherwise accelerate names no endpoint, and each node looks for the others on its own localhost.
        assert (config.same_network, config.rdzv_backend) == (True, "static")
    stage = re.match(r"zero(\d)", path.stem)
    assert (config.deepspeed_config or {}).get("zero_stage") == (int(stage[1]) if stage else None)
    version = re.match(r"fsdp(\d)", path.stem)
    assert config.fsdp_config.get("fsdp_version") == (int(version[1]) if version else None)


def test_every_command_of_the_readme_updates_on_512_rows():
    commands = re.findall(r"(accelerate_configs/\S+).*?(recipes/DeepSeek\S+yaml)(.*)", README.replace("\\\n", " "))
    named = {recipe for _, recipe, _ in commands} | {path for path in PAPER if f"`{path.stem}`" in README}
    assert {ROOT / recipe for recipe in named} == set(PAPER)
    for config, recipe, arguments in commands:
        _, args, _ = parse(ROOT / recipe, *arguments.split())
        assert rows_per_update(args, load_config_from_file(str(ROOT / config)).num_processes) == 512


def test_every_command_of_the_reproduction_is_understood(monkeypatch):
    text = (ROOT / "docs" / "reproduce.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").replace("$run", "e3")
    commands = re.findall(r"^ *(e3-trl [\w-]+|accelerate launch .*train.py) ([^#\n]*)", blocks, re.MULTILINE)
    assert len(commands) == 7
    monkeypatch.chdir(ROOT)
    for command, rest in commands:
        arguments = [word for word in rest.split() if word not in ("--seed", "$seed")]
        if command in PARSERS:
            PARSERS[command]().parse_args(arguments)
        elif command.startswith("accelerate"):
            parse(ROOT / arguments[1], *arguments[2:])
        else:
            fields = {"e3-trl prepare-data": PreparationArguments, "e3-trl evaluate": EvaluationArguments}[command]
            TrlParser(fields).parse_args_and_config([*arguments, "--use_vllm", "false"])


@pytest.mark.slow
def test_the_readme_has_the_table_that_the_script_prints_and_every_recipe_fits():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    from e3_trl.commands.memory import FITS, estimate, table
    from recipes.memory import RECIPES

    assert table(RECIPES) in README, "Replace the table by what `python -m recipes.memory` prints."
    for path in PAPER:
        memory = estimate(path)
        assert memory["peak"] <= FITS * memory["gpu"]
        assert memory["sequences"] >= (12 if "qlora" in path.name else 16), "fewer at once, and sampling is slow"


def test_what_is_quantized_is_linear_layers_but_the_head():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    from e3_trl.commands.memory import count_parameters

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Qwen2Config(vocab_size=100, num_attention_heads=4, num_key_value_heads=2, **shape)
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64
    assert count_parameters(config)["linear"] == 2 * (attention + mlp)


def test_a_layer_keeps_the_activations_that_the_formula_says():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    from e3_trl.commands.memory import elements_per_layer

    config = Qwen2Config(hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    layer = Qwen2DecoderLayer(config, 0).to(torch.bfloat16)
    tokens = 32
    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = Qwen2RotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, attention_mask=mask, position_embeddings=rotary)
    elements = sum(storage.nbytes() for storage in kept.values()) / 2 / tokens
    assert elements == pytest.approx(elements_per_layer(config), rel=0.05)


class LargestMemory(TorchDispatchMode):
    """Most bytes that were alive at once, of storages that came into being under it."""

    def __init__(self, model):
        super().__init__()
        self.weights = {parameter.data_ptr() for parameter in model.parameters()}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return output


@pytest.mark.parametrize("lora", [False, True])
def test_an_evaluations_forward_pass_holds_what_the_formula_says(lora):
    """Evaluation was not in the table, and 16 rows of it are more than training needs on the GPU of 24 GB."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    from e3_trl.commands.memory import evaluation_bytes_per_token

    config = Qwen2Config(
        hidden_size=128, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=64,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = Qwen2ForCausalLM(config).to(torch.float32 if lora else torch.bfloat16).eval()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).base_model.model
    rows, tokens = 4, 256
    ids, mask = torch.ones(rows, tokens, dtype=torch.long), torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :3] = 0  # one row is shorter
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), LargestMemory(model) as memory:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    expected = rows * tokens * evaluation_bytes_per_token(config, lora) + rows * tokens**2
    assert memory.most == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_scripts_hand_every_argument_on_as_it_is(nodes, tmp_path):
    """`srun`, `scontrol` and `accelerate` are stand-ins: the first runs its command per node, the last prints it."""
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; for ((n = 0; n < NODES; n++)); do SLURM_NODEID=$n "$@"; done',
        "scontrol": "echo node7; echo node8",
        "accelerate": "printf '%s\\n' \"$@\" END",
    }
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": tmp_path, "NNODES": nodes, "GPUS_ON_NODE": 8, "CPUS_PER_TASK": 4, "JOB_ID": 123456}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "NODES": str(nodes), "SLURM_JOB_NODELIST": "node[7-8]"}
    script = ROOT / "slurm" / ("train.slurm" if nodes == 1 else "train_multi_node.slurm")

    def run(*arguments):
        return subprocess.run(
            ["bash", str(script), *arguments], env=environment, capture_output=True, text=True, check=False
        )

    arguments = ["a recipe.yaml", "--run_name", "$(touch hit) 'two' words; * $HOME"]
    done = run("a config.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    calls = [call.split("\n") for call in done.stdout.split("\nEND\n")[:-1]]
    assert len(calls) == nodes
    for rank, call in enumerate(calls):
        assert call[:3] == ["launch", "--config_file", "a config.yaml"]
        assert call[-5:] == ["recipes/train.py", "--config", *arguments]
        if nodes > 1:
            launch = dict(zip(call[3:-5:2], call[4:-5:2], strict=True))
            assert launch == {
                "--num_machines": "2",
                "--num_processes": "16",
                "--main_process_ip": "node7",
                "--main_process_port": "23456",
                "--machine_rank": str(rank),
            }
    assert not (tmp_path / "hit").exists()
    assert "usage: sbatch" in run("a config.yaml").stderr


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 0.1, 0.4), ("float32", 0.0, 1e-4)])
def test_merging_the_adapter_at_every_sync_wears_a_bfloat16_base_away(dtype, least, most):
    """Why the LoRA recipes have a float32 base: how far 480 syncs move the base, as a part of the adapter's size."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    torch.nn.init.normal_(base[0].weight, std=0.02)  # Qwen2's initializer_range
    model = get_peft_model(base.to(getattr(torch, dtype)), LoraConfig(r=32, lora_alpha=64, target_modules=["0"]))
    layer = model.base_model.model[0]
    before = layer.base_layer.weight.detach().clone()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(480):
        with torch.no_grad():
            for parameter in adapter:  # a step of Adam at learning rate 5e-5, in a direction of chance
                parameter.add_(5e-5 * torch.randn_like(parameter).sign())
        model.merge_adapter()
        model.unmerge_adapter()
    moved = (layer.base_layer.weight - before).float().norm() / layer.get_delta_weight("default").float().norm()
    assert least <= moved.item() <= most
