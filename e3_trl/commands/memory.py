"""
GPU memory that a recipe needs, on paper.

    e3-trl memory --config my_recipe.yaml --gpu_memory 80 --num_gpus 4
    python -m recipes.memory [--hub]        # of the paper's models: the table of recipes/README.md

Bytes per GPU. P parameters, of which P_t are trained; N GPUs; L layers of hidden size h, MLP size i and V tokens;
R rows in a micro-batch and E = `per_device_eval_batch_size` in one of evaluation, each of S = `vllm_max_model_length`
tokens, C = `max_completion_length` of them completion.

- Full fine-tuning under ZeRO-3, by DeepSpeed's estimator: weights 2 P/N + 4 x the largest layer (gathered), gradients
  4 P/N, optimizer 12 P/N (the float32 copy and Adam's two moments).
- LoRA on one GPU: weights b P + 4 P_t with b bytes in `dtype` (`auto` = the checkpoint's), gradients 4 P_t, optimizer
  8 P_t. In 4 bits (`load_in_4bit`) the P_q parameters of linear layers other than the LM head take 1/2 + 1/16 bytes,
  with `use_bnb_nested_quant` 1/2 + 1/64 + 1/4096.
- Activations with checkpointing: 2 L R S h for the inputs of all layers; 2 x 2 R S (12 h + 4 i), one layer computed
  again and as much for its gradients, with LoRA 6 h + i more for the adapters' inputs; 2 R S^2 for the mask.
- Logits: TRL projects them tile by tile, so 2 x the tile and 4 R C h for the gradient; 4 V h more if the head is
  trained.
- Evaluation: all E rows in one forward pass without gradients; most is held in the MLP, E S (8 h + 6 i), with LoRA on
  a float32 base E S (18 h + 8 i), and E S^2 for the mask.
- vLLM: 2 P weights, in 4 bits those of P_q nested, with `vllm_lora_sync` 2 P_t more; 2 GiB for its own activations
  and CUDA graphs; what is left of `vllm_gpu_memory_utilization` is KV cache, of which a sequence of S tokens takes
  4 L S x key-value heads x head size. Without vLLM as much for each row that a GPU samples, all at once; with a vLLM
  server, which has GPUs of its own, none.

In sleep mode vLLM, training's activations and logits, and evaluation's forward pass are not there at once: the peak is
the model's states and the largest of the three. That an evaluation samples all its prompts in one call changes nothing
here: vLLM's KV cache has its size, and what does not fit waits. The completions are on the host.
A recipe fits if that is at most 90% of the GPU; the rest is for CUDA's context, NCCL and fragmentation.
"""

import argparse
import re
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser
from trl import GRPOConfig, ModelConfig, get_peft_config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from . import mistakes_named
from .models import check_model


# What CUDA reports of a GPU sold as so many GB: A100 and H100, A10 and L4 (with ECC).
GPU_MEMORY = {80: 79 * 2**30, 24: 22 * 2**30}
FITS = 0.9
VLLM_OVERHEAD = 2 * 2**30
# Bytes of a parameter in 4 bits: a float32 scale for every 64 of them, or nested one in 8 bits, and a float32 scale
# for every 256 of those (https://arxiv.org/abs/2305.14314, section 3). vLLM nests.
FOUR_BITS, FOUR_BITS_NESTED = 1 / 2 + 4 / 64, 1 / 2 + 1 / 64 + 4 / (64 * 256)
COLUMNS = ["weights", "gradients", "optimizer", "activations", "logits", "evaluation", "vllm_weights", "kv_cache"]
COLUMNS += ["peak"]


def count_parameters(config, peft_config=None) -> dict[str, int]:
    """Number of parameters: `total` of the model, `largest` of its modules, `linear` but the head, and `trained`."""
    # accelerate's `init_empty_weights` makes two tensors of tied embeddings.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        head = model.get_output_embeddings()
        linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)
        linear = sum(module.weight.numel() for module in linear)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"total": total, "largest": largest, "linear": linear, "trained": trained}


def elements_per_layer(config, lora: bool = False) -> int:
    """Elements of 2 bytes that one layer keeps for its backward, per token, without the attention mask."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    return 12 * hidden + 4 * mlp + (6 * hidden + mlp if lora else 0)


def evaluation_bytes_per_token(config, lora: bool = False) -> int:
    """Most bytes that a forward pass without gradients holds, per token, without the attention mask."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    return 18 * hidden + 8 * mlp if lora else 8 * hidden + 6 * mlp


def read_recipe(path: Path) -> dict:
    """What stands in a recipe, and the defaults of what does not."""
    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    recipe = defaults | yaml.safe_load(path.read_text())
    for name, what in {
        "model_name_or_path": "the model",
        "vllm_max_model_length": "tokens of the longest prompt and completion together, with vLLM or without",
    }.items():
        if recipe.get(name) is None:
            raise ValueError(f"{path} does not set {name}. Set it: memory depends on it ({what}).")
    return recipe


def read_gpus(path: Path) -> tuple[int, int, int]:
    """GB of a GPU, GPUs and nodes that the recipe's first line names; `ValueError` if it names none."""
    named = re.search(r"of (\d+) GB: (accelerate_configs/\w+\.yaml)", path.read_text())
    if named is None:
        raise ValueError(f"{path} does not say what GPUs it is for. Give --gpu_memory and --num_gpus.")
    launch = load_config_from_file(str(path.parents[2] / named[2]))
    return int(named[1]), launch.num_processes, launch.num_machines


def rows_sampled(recipe: dict, num_gpus: int) -> int:
    """Rows of a generation batch that one GPU samples."""
    if recipe["generation_batch_size"] is not None:
        return recipe["generation_batch_size"] // num_gpus
    steps = recipe["steps_per_generation"] or recipe["gradient_accumulation_steps"]
    return recipe["per_device_train_batch_size"] * steps


def estimate(path: Path, hub: bool = False, gpus: tuple[int, int, int] | None = None) -> dict[str, float]:
    """
    Memory per GPU of the recipe at `path`.

    Args:
        path (`Path`): the recipe.
        hub (`bool`, *optional*, defaults to `False`):
            Whether to read the model's config from the Hub. Otherwise from `config.json` beside the recipe, if it is
            there.
        gpus (`tuple[int, int, int]`, *optional*):
            GB of a GPU, GPUs and nodes. If `None`, what the recipe's first line says.

    Returns:
        `dict[str, float]`: bytes under the names of `COLUMNS`, and `gpu`; `sequences` = full-length sequences that the
        KV cache holds.
    """
    recipe = read_recipe(path)
    size, num_gpus, num_nodes = gpus or read_gpus(path)
    (model,) = HfArgumentParser(ModelConfig).parse_dict(recipe, allow_extra_keys=True)
    is_beside = not hub and (path.parent / "config.json").is_file()
    if not is_beside:
        check_model(model.model_name_or_path)
    config = AutoConfig.from_pretrained(path.parent if is_beside else model.model_name_or_path)
    parameters = count_parameters(config, get_peft_config(model))
    total, trained = parameters["total"], parameters["trained"]

    in_4_bits = parameters["linear"] if model.load_in_4bit else 0

    memory = {"gpu": GPU_MEMORY.get(size, size * 10**9)}
    if model.use_peft:
        dtype = config.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
        bits = FOUR_BITS_NESTED if model.use_bnb_nested_quant else FOUR_BITS
        memory["weights"] = (dtype or torch.float32).itemsize * (total - in_4_bits) + bits * in_4_bits
        memory["weights"] += 4 * trained
        memory["gradients"], memory["optimizer"] = 4 * trained, 8 * trained
    else:
        _, states, gathered = estimate_zero3_model_states_mem_needs(
            total,
            parameters["largest"],
            num_gpus_per_node=num_gpus // num_nodes,
            num_nodes=num_nodes,
            cpu_offload=False,
            cpu_offload_params=False,
        )
        share = (states - gathered) / 18
        memory |= {"weights": gathered + 2 * share, "gradients": 4 * share, "optimizer": 12 * share}

    rows, length = recipe["per_device_train_batch_size"], recipe["vllm_max_model_length"]
    hidden, layers = config.hidden_size, config.num_hidden_layers
    memory["activations"] = 2 * layers * rows * length * hidden
    memory["activations"] += 4 * rows * length * elements_per_layer(config, model.use_peft) + 2 * rows * length**2
    memory["logits"] = 2 * TOKEN_CHUNK_SIZE * _CHUNKED_LOGPROB_CHUNK_SIZE
    memory["logits"] += 4 * rows * recipe["max_completion_length"] * hidden
    memory["logits"] += 0 if model.use_peft else 4 * config.vocab_size * hidden

    rows = recipe["per_device_eval_batch_size"]
    memory["evaluation"] = rows * length * evaluation_bytes_per_token(config, model.use_peft) + rows * length**2

    sequence = 4 * layers * length * config.num_key_value_heads * hidden // config.num_attention_heads
    if recipe["use_vllm"] and recipe["vllm_mode"] == "colocate":
        sampling = recipe["vllm_gpu_memory_utilization"] * memory["gpu"]
        held = (
            2 * (total - in_4_bits) + FOUR_BITS_NESTED * in_4_bits + 2 * trained * bool(recipe.get("vllm_lora_sync"))
        )
        memory["vllm_weights"] = held / recipe["vllm_tensor_parallel_size"]
        memory["kv_cache"] = sampling - memory["vllm_weights"] - VLLM_OVERHEAD
        memory["sequences"] = memory["kv_cache"] * recipe["vllm_tensor_parallel_size"] / sequence
    else:
        memory["vllm_weights"], memory["sequences"] = 0, 0 if recipe["use_vllm"] else rows_sampled(recipe, num_gpus)
        memory["kv_cache"] = sampling = memory["sequences"] * sequence
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    memory["peak"] = states + max(memory["activations"] + memory["logits"], memory["evaluation"], sampling)
    return memory


def table(recipes: list[Path], hub: bool = False, gpus: tuple[int, int, int] | None = None) -> str:
    """A row for each recipe, in Markdown, in GiB; see [`estimate`]."""
    lines = ["| recipe | " + " | ".join(COLUMNS).replace("vllm_", "vLLM ").replace("kv_", "KV ") + " | of the GPU |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for path in recipes:
        memory = estimate(path, hub, gpus)
        cells = [f"{memory[column] / 2**30:.1f}" for column in COLUMNS]
        cells[COLUMNS.index("kv_cache")] += f" ({memory['sequences']:.0f})"
        name = f"{path.parent.name.removeprefix('DeepSeek-R1-Distill-Qwen-')} {path.stem.removeprefix('config_')}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {memory['peak'] / memory['gpu']:.0%} |")
    return "\n".join(lines)


def run(arguments: list[str] | None = None, default: list[Path] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", type=Path, default=default, required=not default, help="recipes")
    parser.add_argument("--hub", action="store_true", help="read the models' configs from the Hub")
    parser.add_argument("--gpu_memory", type=int, help="GB of a GPU (what the recipe's first line says)")
    parser.add_argument("--num_gpus", type=int, default=1, help="with --gpu_memory: GPUs in all (1)")
    parser.add_argument("--num_nodes", type=int, default=1, help="with --gpu_memory: nodes that they are in (1)")
    args = parser.parse_args(arguments)
    with mistakes_named():
        print(table(args.config, args.hub, args.gpu_memory and (args.gpu_memory, args.num_gpus, args.num_nodes)))
