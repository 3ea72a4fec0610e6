"""What is refused of E3's settings, as tables, and of a run's data, before a model is loaded."""

import math
import warnings

import numpy as np
from datasets import Dataset, IterableDataset

from .batch.prompt_ids import PROMPT_ID
from .grpo.checks import Combination, Setting, one_of, reward_name
from .method.budget_rules import ROUND_RULES


SETTINGS: list[Setting] = [
    ("success_decay", lambda value: 0 < value <= 1, "Set it in (0, 1], 1 = none."),
    ("success_prior", lambda value: 0 <= value < math.inf, "Set it to 0 (none) or more."),
    one_of("temperature_schedule", "entropy", "constant"),
    one_of("entropy_estimator", "exact", "sampled"),
    one_of("advantage_scale", "std", "mean"),
    one_of("prompt_selection", "perplexity", "partly_solved"),
    ("temperature_spread", lambda value: 0 <= value < 2, "Set it in [0, 2), 0 = the same for all prompts."),
    ("length_bias_coef", lambda value: value >= 0, "Set it to 0 (off) or more."),
    ("length_bias_fraction", lambda value: 0 <= value <= 1, "Set it within [0, 1]."),
    ("max_resample_rounds", lambda value: value >= 1, "Set it to 1 or more, or dynamic_sampling to False."),
]
# What leaves tokens out when it samples, or changes their probabilities, and when it is on.
SAMPLERS = {
    "top_k": lambda value: (value or 0) > 0,
    "top_p": lambda value: value < 1,
    "min_p": lambda value: (value or 0) > 0,
    "repetition_penalty": lambda value: value != 1,
}
COMBINATIONS: list[Combination] = [
    *(
        (
            lambda c, name=name, is_on=is_on: (
                c.entropy_estimator == "sampled" and is_on((c.generation_kwargs or {}).get(name, getattr(c, name)))
            ),
            f"entropy_estimator is 'sampled' and {name} {{c.{name}}} (generation_kwargs: {{c.generation_kwargs}}): "
            "tokens are then sampled from another distribution than the policy's, whose entropy this does not "
            f"estimate. Set entropy_estimator to 'exact', or leave {name} out.",
        )
        for name, is_on in SAMPLERS.items()
    ),
    *(
        (
            lambda c, name=name, is_on=is_on: c.reuse_rollouts and is_on(getattr(c, name)),
            f"reuse_rollouts is True and {name} {{c.{name}!r}}: tokens are then not sampled from the policy, by whose "
            f"log-probs old ones are verified. Leave {name} out, or set reuse_rollouts to False.",
        )
        for name, is_on in {**SAMPLERS, "generation_kwargs": bool, "vllm_structured_outputs_regex": bool}.items()
    ),
    (
        lambda c: c.reuse_rollouts and c.use_transformers_continuous_batching,
        "reuse_rollouts is True, and transformers' continuous batching has not been tried with completions that are "
        "gone on with. Set use_transformers_continuous_batching or reuse_rollouts to False.",
    ),
    (
        lambda c: c.reuse_rollouts and c.deepspeed_plugin is not None and c.deepspeed_plugin.zero_stage == 3,
        "reuse_rollouts is True, and under ZeRO-3 a run that goes on from a checkpoint would score old completions "
        "before it trains, at which DeepSpeed has ended with a tracing error. Set reuse_rollouts to False, or "
        "zero_stage to 2.",
    ),
    (
        lambda c: c.advantage_scale == "mean" and c.scale_rewards != "group",
        "advantage_scale is 'mean' and scale_rewards {c.scale_rewards!r}: both say what advantages are divided by. "
        "Leave scale_rewards at 'group'.",
    ),
    (
        lambda c: c.advantage_scale == "mean" and c.multi_objective_aggregation == "normalize_then_sum",
        "advantage_scale is 'mean' and multi_objective_aggregation 'normalize_then_sum', whose sums have the mean 0. "
        "Set it to 'sum_then_normalize'.",
    ),
    (
        lambda c: c.rollout_allocation in ROUND_RULES and c.dynamic_sampling,
        "rollout_allocation is {c.rollout_allocation!r} and dynamic_sampling True: each decides by the first rewards "
        "of a batch what is sampled next. Set one of them only.",
    ),
    (
        lambda c: c.temperature_spread > 0 and not c.temperature_min <= c.temperature <= c.temperature_max,
        "temperature_spread is {c.temperature_spread} and temperature {c.temperature}, outside of temperature_min "
        "({c.temperature_min}) and temperature_max ({c.temperature_max}), which hold for each prompt. Widen these.",
    ),
    (
        lambda c: c.temperature_spread > 0 and c.use_vllm and c.vllm_mode == "server",
        "temperature_spread is {c.temperature_spread}, and a vLLM server is told one temperature for all prompts. Set "
        "vllm_mode to 'colocate', or temperature_spread to 0.",
    ),
    (
        lambda c: c.temperature_spread > 0 and c.use_transformers_continuous_batching,
        "temperature_spread is {c.temperature_spread}, and transformers' continuous batching is told one temperature "
        "for all prompts. Set use_transformers_continuous_batching to False, or temperature_spread to 0.",
    ),
    (
        lambda c: not 0 < c.prompt_selection_ratio <= 1 or c.num_candidates > c.generation_batch_size,
        "prompt_selection_ratio is {c.prompt_selection_ratio}. Set it to at least 1 / num_generations "
        "(num_generations is {c.num_generations}), for a batch has a row for each candidate, and to at most 1.",
    ),
    (
        lambda c: c.prompt_selection != "perplexity" and c.prompt_selection_ratio == 1,
        "prompt_selection is {c.prompt_selection!r} and prompt_selection_ratio 1: all prompts are sampled, and none "
        "chosen. Set prompt_selection_ratio below 1.",
    ),
    (
        lambda c: c.temperature_target_fraction != 1 and c.temperature_target_entropy is not None,
        "temperature_target_fraction is {c.temperature_target_fraction} and temperature_target_entropy "
        "{c.temperature_target_entropy}: the one is a part of the entropy that is measured, the other set by hand. "
        "Set one of them only.",
    ),
    (
        lambda c: c.temperature_schedule == "entropy" and c.temperature <= 0,
        "temperature is {c.temperature}, and greedy decoding has no entropy to hold. Set it above 0, or set "
        "temperature_schedule to 'constant'.",
    ),
]
# What works on text alone, and when it is on.
TEXT_ONLY = {
    "dynamic_sampling": lambda c: c.dynamic_sampling,
    "prompt_selection_ratio": lambda c: c.prompt_selection_ratio < 1,
    "entropy_weighting": lambda c: c.entropy_weighting,
    "rollout_allocation": lambda c: c.rollout_allocation in ROUND_RULES,
    "temperature_spread": lambda c: c.temperature_spread > 0,
    "reuse_rollouts": lambda c: c.reuse_rollouts,
}


def check_run(
    args,
    reward_funcs: list,
    train_dataset: Dataset | IterableDataset | None,
    fixed_columns: bool = True,
    tools: bool = False,
) -> None:
    """
    Raise `ValueError`, naming the field, its value and the remedy, if E3 cannot be trained as configured; warn where
    a part of it would do nothing.

    Args:
        args ([`E3GRPOConfig`]): the run's configuration.
        reward_funcs (`list`): reward functions, reward models and their names.
        train_dataset (`Dataset`, `IterableDataset` or `None`): data to train on.
        fixed_columns (`bool`, *optional*, defaults to `True`):
            Whether all columns come from the dataset. Environments and rollout functions can add to them.
        tools (`bool`, *optional*, defaults to `False`):
            Whether completions can call tools.
    """
    if fixed_columns:
        # An environment may bring a reward of its own, whose name the trainer has later.
        correctness_column(args, [reward_name(func) for func in reward_funcs if func is not None])
    sized = isinstance(train_dataset, Dataset)
    columns = getattr(train_dataset, "column_names", None) or []
    if PROMPT_ID in columns:
        raise ValueError(
            f"The dataset has a column {PROMPT_ID!r}, the name under which the trainer hands on a prompt's index: "
            "reward functions would not get it. Rename it."
        )
    images = {"image", "images"} & set(columns)
    for name, is_set in TEXT_ONLY.items():
        if is_set(args) and (not sized or not fixed_columns or tools or images):
            raise ValueError(
                f"{name} is {getattr(args, name)}, but it works on text alone: no stream, image column, tool, "
                f"environment or rollout function. Set it to {getattr(type(args), name)}, or leave these out."
            )
    annealing = args.temperature_schedule == "entropy" and args.annealing_start is not None
    if annealing and isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"annealing_start is {args.annealing_start}, but max_steps is {args.max_steps} and the dataset has no "
            "length. Set max_steps, or set annealing_start to None."
        )
    if args.gives_budgets and (train_dataset is not None or not fixed_columns):
        _warn_of_equal_budgets(args, train_dataset)
    if sized:
        _check_difficulty_column(args.difficulty_column, train_dataset)
        if len(train_dataset) < args.num_candidates:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} prompts, fewer than the {args.num_candidates} that those of "
                "one generation batch are chosen from (generation_batch_size "
                f"{args.generation_batch_size} / num_generations {args.num_generations} / prompt_selection_ratio "
                f"{args.prompt_selection_ratio:g}). Add prompts, raise prompt_selection_ratio, or lower "
                "per_device_train_batch_size or gradient_accumulation_steps (or steps_per_generation)."
            )


def _warn_of_equal_budgets(args, train_dataset: Dataset | IterableDataset | None) -> None:
    if not isinstance(train_dataset, Dataset):
        origin = "comes as a stream" if train_dataset is not None else "is made by the environment"
        warnings.warn(
            f"rollout_allocation is {args.rollout_allocation!r}, but train_dataset is a "
            f"{type(train_dataset).__name__}: a prompt that {origin} has no index and nothing can be counted of it, "
            "so each will get num_generations rollouts. Load a `Dataset` (streaming off), or set rollout_allocation "
            "to 'uniform'.",
            stacklevel=4,
        )
        return
    prompts_per_batch = args.generation_batch_size // args.num_generations
    if prompts_per_batch == 1 or args.num_generations in (args.num_generations_min, args.num_generations_max):
        warnings.warn(
            f"rollout_allocation is {args.rollout_allocation!r}, but every prompt will get num_generations "
            f"({args.num_generations}) rollouts: a generation batch has {prompts_per_batch} prompt(s), "
            f"num_generations_min is {args.num_generations_min} and num_generations_max {args.num_generations_max}. "
            "Raise gradient_accumulation_steps or num_generations (below 3 there is no room), or widen these.",
            stacklevel=4,
        )


def warn_of_a_first_pass_alone(args, max_steps: int, steps_per_pass: float) -> None:
    """
    Warn if a run ends before difficulty is known: in its first pass, every prompt gets as many rollouts.

    Args:
        args ([`E3GRPOConfig`]): the run's configuration.
        max_steps (`int`): optimizer steps of the run.
        steps_per_pass (`float`): optimizer steps of a pass over the data.
    """
    if max_steps <= steps_per_pass and args.difficulty_column is None and args.rollout_allocation not in ROUND_RULES:
        warnings.warn(
            f"rollout_allocation is {args.rollout_allocation!r}, but the run ends in its first pass (max_steps "
            f"{max_steps}, and a pass has {steps_per_pass:g}), in which no difficulty is known: every prompt will get "
            f"num_generations ({args.num_generations}) rollouts. Name a difficulty_column, set rollout_allocation to "
            "'pilot' or 'uniform', or train longer, or on fewer prompts.",
            stacklevel=3,
        )


def correctness_column(args, names: list[str]) -> int:
    """The column of rewards that is the correctness signal; `ValueError` if no reward function has the name."""
    if args.difficulty_reward_func is None:
        return 0
    if args.difficulty_reward_func not in names:
        raise ValueError(
            f"difficulty_reward_func is {args.difficulty_reward_func!r}, which is none of the reward functions "
            f"{names}. Set it to one of them, or to None for the first."
        )
    return names.index(args.difficulty_reward_func)


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
