"""Checks of a run's data that need no model, so that a mistake costs seconds."""

import inspect
import warnings

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from trl.trainer.utils import get_callable_name

from ..config import E3GRPOConfig
from .dashboards import DASHBOARDS


# What TRL passes to every reward function besides the columns of the dataset.
_REWARD_ARGUMENTS = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"
}  # fmt: skip


def check_run(
    args: E3GRPOConfig,
    reward_funcs: list,
    train_dataset: Dataset | IterableDataset | None,
    eval_datasets: list[Dataset | IterableDataset],
    fixed_columns: bool = True,
    tools: bool = False,
) -> None:
    """
    Raise `ValueError`, naming the field, its value and the remedy, if the run cannot be trained as configured. What
    TRL says itself is left to it.

    Args:
        args ([`E3GRPOConfig`]): the run's configuration.
        reward_funcs (`list`): reward functions, reward models and their names.
        train_dataset (`Dataset`, `IterableDataset` or `None`): data to train on.
        eval_datasets (`list`): data to evaluate on.
        fixed_columns (`bool`, *optional*, defaults to `True`):
            Whether all columns come from the dataset. Environments and rollout functions can add to them.
        tools (`bool`, *optional*, defaults to `False`):
            Whether completions can call tools.
    """
    if not isinstance(args, E3GRPOConfig):
        raise TypeError(
            f"args is a {type(args).__name__}, which has none of E3's settings. Use E3GRPOConfig: it takes the same "
            "arguments, and those of E3."
        )
    get_reporting_integration_callbacks(args.report_to)  # says which there are
    missing = [
        name for name in DASHBOARDS if name in args.report_to and name not in get_available_reporting_integrations()
    ]
    if missing:
        raise ValueError(
            f"report_to is {args.report_to}, and {missing[0]} is not installed. `pip install {missing[0]}`, or set "
            "report_to to none."
        )
    if fixed_columns:
        callables = [func for func in reward_funcs if callable(func) and not isinstance(func, torch.nn.Module)]
        for dataset in [train_dataset, *eval_datasets]:
            _check_columns(dataset, callables)
        # An environment may bring a reward of its own, whose name the trainer has later.
        difficulty_reward_index(args, [_reward_name(func) for func in reward_funcs if func is not None])
    sized = isinstance(train_dataset, Dataset)
    images = {"image", "images"} & set(getattr(train_dataset, "column_names", None) or [])
    text_only = {
        "dynamic_sampling": args.dynamic_sampling,
        "prompt_selection_ratio": args.prompt_selection_ratio < 1,
        "entropy_weighting": args.entropy_weighting,
        "rollout_allocation": args.rollout_allocation == "pilot",
        "temperature_spread": args.temperature_spread > 0,
    }
    for name, is_set in text_only.items():
        if is_set and (not sized or not fixed_columns or tools or images):
            raise ValueError(
                f"{name} is {getattr(args, name)}, but it works on text alone: no stream, image column, tool, "
                f"environment or rollout function. Set it to {getattr(E3GRPOConfig, name)}, or leave these out."
            )
    annealing = args.temperature_schedule == "entropy" and args.annealing_start is not None
    if annealing and isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"annealing_start is {args.annealing_start}, but max_steps is {args.max_steps} and the dataset has no "
            "length. Set max_steps, or set annealing_start to None."
        )
    has_prompts = train_dataset is not None or not fixed_columns
    if args.rollout_allocation != "uniform" and not sized and has_prompts:
        origin = "comes as a stream" if train_dataset is not None else "is made by the environment"
        warnings.warn(
            f"rollout_allocation is {args.rollout_allocation!r}, but train_dataset is a "
            f"{type(train_dataset).__name__}: a prompt that {origin} has no index and nothing can be counted of it, "
            "so each will get num_generations rollouts. Load a `Dataset` (streaming off), or set rollout_allocation "
            "to 'uniform'.",
            stacklevel=3,
        )
    prompts_per_batch = args.generation_batch_size // args.num_generations
    if (
        args.rollout_allocation != "uniform"
        and sized
        and (prompts_per_batch == 1 or args.num_generations in (args.num_generations_min, args.num_generations_max))
    ):
        warnings.warn(
            f"rollout_allocation is {args.rollout_allocation!r}, but every prompt will get num_generations "
            f"({args.num_generations}) rollouts: a generation batch has {prompts_per_batch} prompt(s), "
            f"num_generations_min is {args.num_generations_min} and num_generations_max {args.num_generations_max}. "
            "Raise gradient_accumulation_steps or num_generations (below 3 there is no room), or widen these.",
            stacklevel=3,
        )
    if sized:
        _check_difficulty_column(args.difficulty_column, train_dataset)
        if len(train_dataset) < args.num_candidates:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} prompts, fewer than the {args.num_candidates} of one "
                f"generation batch (generation_batch_size {args.generation_batch_size} / num_generations "
                f"{args.num_generations} / prompt_selection_ratio {args.prompt_selection_ratio:g}). Add prompts, or "
                "lower per_device_train_batch_size or gradient_accumulation_steps (or steps_per_generation)."
            )


def difficulty_reward_index(args: E3GRPOConfig, names: list[str]) -> int:
    """The column of rewards that is the correctness signal; `ValueError` if no reward function has the name."""
    if args.difficulty_reward_func is None:
        return 0
    if args.difficulty_reward_func not in names:
        raise ValueError(
            f"difficulty_reward_func is {args.difficulty_reward_func!r}, which is none of the reward functions "
            f"{names}. Set it to one of them, or to None for the first."
        )
    return names.index(args.difficulty_reward_func)


def _reward_name(func) -> str:
    """The name that TRL will give a reward function, or a reward model or its path."""
    if isinstance(func, torch.nn.Module):
        func = func.config._name_or_path
    return func.split("/")[-1] if isinstance(func, str) else get_callable_name(func)


def check_colocated_vllm(
    args: E3GRPOConfig, tie_word_embeddings: bool, device: str, longest_prompt: int, context: int | None
) -> None:
    """
    Raise `ValueError` if a colocated vLLM could not hold the run's prompts, or would sample from stale weights.

    Args:
        args ([`E3GRPOConfig`]): the run's configuration.
        tie_word_embeddings (`bool`): whether the model's LM head is its embedding.
        device (`str`): type of the device that is trained on.
        longest_prompt (`int`): tokens of the dataset's longest prompt.
        context (`int`, *optional*): tokens that the model is made for.
    """
    if device == "cpu" and tie_word_embeddings:
        raise ValueError(
            "The model has tie_word_embeddings set, and use_vllm is on with a CPU: vLLM's reload leaves the tied LM "
            "head at its old weights there. Use an untied model, a GPU, or set use_vllm to False."
        )
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


def _check_columns(dataset: Dataset | IterableDataset | None, reward_funcs: list) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # a stream can leave its columns open
        return
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom" and len(dataset):
        columns = list(dataset[0])  # a transform makes and drops columns
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
        for parameter in inspect.signature(func).parameters.values():
            required = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if required and parameter.name not in _REWARD_ARGUMENTS | set(columns):
                raise ValueError(
                    f"Reward function {get_callable_name(func)!r} needs a column {parameter.name!r}, but the dataset "
                    f"has only {columns}. Add or rename the column, or choose another reward function."
                )


def _check_difficulty_column(column: str | None, dataset: Dataset) -> None:
    if column is None:
        return
    if column not in dataset.column_names:
        raise ValueError(
            f"difficulty_column is {column!r}, but the dataset has only {dataset.column_names}. Name one of them."
        )
    remedy = "Scale it to [0, 1], 1 = hardest, null = unknown."
    try:
        values = initial_difficulty(column, dataset)
    except (TypeError, ValueError) as error:
        raise ValueError(f"difficulty_column {column!r} does not hold numbers ({error}). {remedy}") from error
    outside = values[(values < 0) | (values > 1)]
    if len(outside):
        raise ValueError(f"difficulty_column {column!r} holds {outside[0]}. {remedy}")


def initial_difficulty(column: str | None, dataset: Dataset) -> np.ndarray | None:
    """The starting difficulty of each prompt, shape `(num_prompts,)`, NaN where the column is null."""
    return None if column is None else np.array(list(dataset.with_format(None)[column]), dtype=np.float64)
