"""What is refused before a model is loaded, so that a mistake costs seconds: settings as tables, and a run's data."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
    is_fsdp_enabled,
)
from trl.trainer.utils import get_callable_name

from ..rewards.columns import REWARD_ARGUMENTS, check_reward_columns


# A field, what it may be, and what to do where it is not.
Setting = tuple[str, Callable[[Any], bool], str]
# Dashboards that need more than the package of their name, and say it themselves.
NO_PACKAGE_OF_THEIR_NAME = ("azure_ml", "flyte", "kubeflow")
# Where fields together are wrong, and the message, in which `c` is the config.
Combination = tuple[Callable[[Any], bool], str]


def one_of(name: str, *choices: str) -> Setting:
    """The row of a field that is one of several words."""
    *some, last = map(repr, choices)
    return name, lambda value: value in choices, f"Set it to {', '.join(some)} or {last}."


def check_settings(config, settings: list[Setting], combinations: list[Combination] = ()) -> None:
    """Raise `ValueError`, naming field, value and remedy, for the first row of the tables that the config breaks."""
    for name, is_right, remedy in settings:
        value = getattr(config, name)
        if not is_right(value):
            raise ValueError(f"{name} is {value!r}. {remedy}")
    for is_wrong, message in combinations:
        if is_wrong(config):
            raise ValueError(message.format(c=config))


def check_data(
    args,
    reward_funcs: list,
    datasets: list[Dataset | IterableDataset | None],
    fixed_columns: bool = True,
) -> None:
    """
    Raise `ValueError`, naming the field, its value and the remedy, if the run cannot be trained as configured. What
    TRL says itself is left to it.

    Args:
        args ([`FastGRPOConfig`]): the run's configuration.
        reward_funcs (`list`): reward functions, reward models and their names.
        datasets (`list`): data to train and to evaluate on.
        fixed_columns (`bool`, *optional*, defaults to `True`):
            Whether all columns come from the dataset. Environments and rollout functions can add to them.
    """
    get_reporting_integration_callbacks(args.report_to)  # says which there are
    installed = (*get_available_reporting_integrations(), *NO_PACKAGE_OF_THEIR_NAME)
    missing = [name for name in args.report_to if name not in installed]
    if missing:
        raise ValueError(
            f"report_to is {args.report_to}, and {missing[0]} is not installed. `pip install {missing[0]}`, or set "
            "report_to to none."
        )
    callables = [func for func in reward_funcs if callable(func) and not isinstance(func, torch.nn.Module)]
    for dataset in datasets:
        columns = _columns(dataset)
        if columns is not None and callables:
            _check_names(columns)
        if columns is not None and fixed_columns:
            _check_columns(dataset, columns, callables)
    train_dataset, prompts_per_batch = datasets[0], args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < prompts_per_batch:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {prompts_per_batch} of one generation "
            f"batch (generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}). "
            "Add prompts, or lower per_device_train_batch_size or gradient_accumulation_steps (or "
            "steps_per_generation)."
        )


def check_loading(args, reward_funcs: list, has_adapter: bool) -> None:
    """
    Raise `ValueError` if a model would be loaded whose weights one process alone gets: with
    `fsdp_cpu_ram_efficient_loading` those of the others are zeros until accelerate shares the first's out, which it
    does for the policy alone.

    Args:
        args ([`FastGRPOConfig`]): the run's configuration.
        reward_funcs (`list`): reward functions, reward models and their names.
        has_adapter (`bool`): whether the reference model is the policy without its adapter.
    """
    if not is_fsdp_enabled():  # which transformers asks when it loads a model
        return
    loaded = [f"the reward model {func}" for func in reward_funcs if isinstance(func, str)]
    if args.beta != 0 and not has_adapter:
        loaded.append(f"the reference model (beta is {args.beta})")
    if loaded:
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading is true, and of {loaded[0]} the first process alone would get the "
            "weights. Set it to false in the accelerate configuration."
        )


def _columns(dataset: Dataset | IterableDataset | None) -> list[str] | None:
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom" and len(dataset):
        return list(dataset[0])  # a transform makes and drops columns
    # A stream can leave its columns open; what is no dataset is refused by TRL.
    return dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None


def _check_names(columns: list[str]) -> None:
    # The environments' name is free without any, and TRL leaves a column of completion_ids out.
    for name in sorted((REWARD_ARGUMENTS - {"environments", "completion_ids"}) & set(columns)):
        raise ValueError(
            f"The dataset has a column {name!r}, the name of what every reward function gets from the trainer. Rename "
            f"it, or leave it out: dataset.remove_columns({name!r})."
        )


def _check_columns(dataset: Dataset | IterableDataset, columns: list[str], reward_funcs: list) -> None:
    if "prompt" not in columns:
        raise ValueError(f"The dataset has no column 'prompt', only {columns}. Rename the column of the questions.")
    # Only where the stored column has a null, which may not be among the rows that were selected, are rows read.
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom" and dataset.data["prompt"].null_count:
        prompts = dataset.with_format("arrow").select_columns("prompt")
        for index, batch in enumerate(prompts.iter(batch_size=1000)):
            if batch["prompt"].null_count:
                row = 1000 * index + batch["prompt"].is_null().index(True).as_py()
                raise ValueError(f"The dataset's row {row} has no prompt. Fill it in, or drop the row.")
    for func in reward_funcs:
        check_reward_columns(func, columns)


def reward_name(func) -> str:
    """The name that TRL will give a reward function, or a reward model or its path."""
    if isinstance(func, torch.nn.Module):
        func = func.config._name_or_path
    return func.split("/")[-1] if isinstance(func, str) else get_callable_name(func)


class EngineCheckCallback(TrainerCallback):
    """
    Checks what vLLM is asked to hold, at the one place where the trainer has its model and tokenizer and has not
    started the engine.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer, as yet half built.
        datasets (`list`): what it trains and evaluates on.

    Raises:
        `ValueError`: see [`check_quantized_base`], [`check_tied_embeddings`], [`check_adapted_modules`] and
            [`check_colocated_vllm`].
    """

    def __init__(self, trainer, datasets: list):
        self.trainer = trainer
        self.datasets = datasets

    def on_init_end(self, args, state, control, **kwargs):
        check_quantized_base(args, self.trainer.model)
        if not (args.use_vllm and args.vllm_mode == "colocate"):
            return
        trainer = self.trainer
        check_tied_embeddings(trainer.model)
        if args.vllm_lora_sync:
            check_adapted_modules(trainer.model, trainer.is_fsdp_enabled)
        longest = 0
        # Image and environment prompts get their final length later.
        if not trainer._is_vlm and trainer.environment_factories is None:
            for dataset in filter(lambda dataset: isinstance(dataset, Dataset), self.datasets):
                share = dataset.shard(args.world_size, args.process_index)
                for batch in share.iter(batch_size=1000):
                    longest = max(longest, *map(len, trainer.tokenize(batch["prompt"])))
        longest = max(gather_object([longest]))  # no rank starts an engine where another cannot
        context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        check_colocated_vllm(args, longest, context)


def check_tied_embeddings(model: PreTrainedModel | PeftModel) -> None:
    """
    Raise `ValueError` if an adapter trains the embedding, or the LM head, of a model that has one tensor for both:
    vLLM has one, too, and would sample from another policy.
    """
    if not (isinstance(model, PeftModel) and model.config.tie_word_embeddings):
        return
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    is_trained = any(parameter.requires_grad for end in ends for parameter in end.parameters())
    if is_trained and not getattr(model.active_peft_config, "ensure_weight_tying", False):
        raise ValueError(
            "peft_config trains the embedding or the LM head (target_modules, modules_to_save), and the model has "
            "tie_word_embeddings, one tensor for both, which vLLM keeps. Leave them out, or list embed_tokens in "
            "modules_to_save and set ensure_weight_tying."
        )


# The ranks that vLLM reserves memory for.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# What a LoraConfig may be for vLLM to compute the same with the adapter beside the base, by field. Other ways to begin
# change the base, which the engine has as it was published.
PLAIN_LORA = {
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "lora_bias"), (False, None)),
    **dict.fromkeys(
        ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters")
        + ("layer_replication", "alora_invocation_tokens"),
        (None, {}, []),
    ),
}


def adapter_of(model, peft_config: PeftConfig | None) -> PeftConfig:
    """
    The configuration of the adapter that a run with `vllm_lora_sync` trains.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): as the trainer gets it.
        peft_config ([`~peft.PeftConfig`], *optional*): likewise.

    Raises:
        `ValueError`: if there is none, or vLLM would compute something else with the adapter than the trainer.
    """
    if peft_config is None and isinstance(model, PeftModel):
        peft_config = model.active_peft_config
    if getattr(peft_config, "peft_type", None) != "LORA":
        raise ValueError(
            f"vllm_lora_sync is True, and peft_config is {peft_config and peft_config.peft_type.value}. Give the "
            "trainer a LoraConfig (use_peft), or leave vllm_lora_sync out."
        )
    for name, allowed in PLAIN_LORA.items():
        value = getattr(peft_config, name, None)
        if value not in allowed:
            raise ValueError(
                f"vllm_lora_sync is True, and {name} of peft_config is {value!r}, which vLLM does not apply beside a "
                f"base. Set it to {allowed[0]!r}, or leave vllm_lora_sync out."
            )
    if peft_config.r > LORA_RANKS[-1]:
        raise ValueError(
            f"vllm_lora_sync is True, and r of peft_config is {peft_config.r}. Set it to {LORA_RANKS[-1]}, vLLM's "
            "largest rank, or less, or leave vllm_lora_sync out."
        )
    return peft_config


def quantized_bits(base) -> int | None:
    """4 or 8 if a model, or the `transformers.BitsAndBytesConfig` that it is to be loaded with, is of so many bits."""
    names = {bits: (f"is_loaded_in_{bits}bit", f"load_in_{bits}bit") for bits in (4, 8)}
    return next((bits for bits, of_bits in names.items() if any(getattr(base, name, False) for name in of_bits)), None)


def check_quantized_base(args, base) -> None:
    """
    Raise `ValueError` if vLLM could not sample from a policy whose base is in 4 or 8 bits. What TRL sends of merged
    weights is packed, without its scales: after one update of a tiny model log-probs were off by 0.5. And to load a
    base in 4 bits takes a package, which came with vLLM before 0.28.

    Args:
        args ([`FastGRPOConfig`]): the run's configuration.
        base ([`~transformers.PreTrainedModel`] or `transformers.BitsAndBytesConfig`, *optional*): the policy, or how
            its base is to be quantized.
    """
    bits = quantized_bits(base)
    if not (args.use_vllm and bits):
        return
    if bits == 8 or args.vllm_mode != "colocate" or not args.vllm_lora_sync:
        raise ValueError(
            f"load_in_{bits}bit is True, and use_vllm, but vLLM cannot be sent the weights of such a base. Set "
            "load_in_4bit, vllm_mode to 'colocate' and vllm_lora_sync to True, which sends the adapter alone, or "
            "use_vllm to False."
        )
    quantizer = getattr(base, "hf_quantizer", None)
    # Of a checkpoint that is in 4 bits already, both read how.
    how = base if quantizer is None or quantizer.pre_quantized else quantizer.quantization_config
    kind = getattr(how, "bnb_4bit_quant_type", "nf4")
    if kind != "nf4":
        raise ValueError(
            f"bnb_4bit_quant_type is {kind!r}, and vLLM quantizes a base to 'nf4': it would sample from another "
            "policy. Set it to 'nf4', which is not BitsAndBytesConfig's default."
        )
    if find_spec("vllm") is None:  # TRL says where to get it
        return
    if not any(map(find_spec, ("vllm_bnb_plugin", "vllm.model_executor.layers.quantization.bitsandbytes"))):
        raise ValueError(
            "The base is in 4 bits, and this vLLM loads none without vllm-bnb-plugin. `pip install --no-deps "
            "vllm-bnb-plugin` (--no-deps, for it asks for vLLM's CUDA build), or set load_in_4bit to False."
        )


def check_adapted_modules(model: PeftModel, is_fsdp: bool) -> None:
    """
    Raise `ValueError` if something is trained that is not the adapter of a linear layer, or if weights are sharded by
    FSDP.

    Args:
        model ([`~peft.PeftModel`]): the policy.
        is_fsdp (`bool`): whether FSDP shards it. Gathering an adapter from there is not tested.
    """
    if is_fsdp:
        raise ValueError(
            "vllm_lora_sync is True under FSDP, from which an adapter is not gathered. Use DDP or DeepSpeed, or leave "
            "vllm_lora_sync out."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    others = [name for name, layer in layers.items() if not isinstance(layer.get_base_layer(), torch.nn.Linear)]
    others += [name for name, value in model.named_parameters() if value.requires_grad and model.prefix not in name]
    if others or len(model.active_adapters) > 1:
        raise ValueError(
            f"vllm_lora_sync is True, and the model trains {', '.join(others[:3] or model.active_adapters)}. Train "
            "one adapter, of linear layers alone, or leave vllm_lora_sync out."
        )


def check_colocated_vllm(args, longest_prompt: int, context: int | None) -> None:
    """
    Raise `ValueError` if a colocated vLLM could not hold the run's prompts.

    Args:
        args ([`FastGRPOConfig`]): the run's configuration.
        longest_prompt (`int`): tokens of the dataset's longest prompt.
        context (`int`, *optional*): tokens that the model is made for.
    """
    needed = longest_prompt + args.max_completion_length
    both = (
        f"less than the longest prompt ({longest_prompt} tokens) and max_completion_length "
        f"({args.max_completion_length}) together"
    )
    if args.vllm_max_model_length is None:
        if context is not None and context < needed:
            raise ValueError(
                f"vllm_max_model_length is None, and the model's context (max_position_embeddings) {context}, {both}. "
                "Shorten max_completion_length, drop the longest prompts, or set vllm_max_model_length if the model "
                "holds more."
            )
    elif args.vllm_max_model_length < needed:
        raise ValueError(
            f"vllm_max_model_length is {args.vllm_max_model_length}, {both}. Set it to {needed} or more, shorten "
            "max_completion_length, or drop the longest prompts."
        )
