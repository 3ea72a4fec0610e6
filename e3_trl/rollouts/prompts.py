"""Copies of a prompt, which stand in neighbouring rows: what is the same for all of them is done once."""

from itertools import groupby


def is_text(trainer) -> bool:
    """Whether the rows are text alone, and the trainer samples them itself: then equal prompts are equal rows."""
    return not trainer._is_vlm and trainer.environment_factories is None and trainer.rollout_func is None


def share_copies(trainer, prompts: list) -> list:
    """
    The prompts, in which equal neighbours are one object, so that a deep copy of them copies it once. They stay apart
    where something writes into the prompt of one row: tools, environments and rollout functions do.
    """
    if trainer.tools or not is_text(trainer):
        return prompts
    shared: list = []
    for prompt in prompts:
        shared.append(shared[-1] if shared and prompt == shared[-1] else prompt)
    return shared


def without_copies(trainer, prompts: list) -> tuple[list, list[int] | None]:
    """
    The prompts to tokenise.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        prompts (`list`): the prompts of N rows.

    Returns:
        `tuple[list, list[int] | None]`: one prompt of each run of equal ones, and the lengths of the runs. Where rows
        have more than their prompt (images, tools of their own environment), all prompts and `None`.
    """
    if not is_text(trainer):
        return prompts, None
    runs = [(prompt, sum(1 for _ in copies)) for prompt, copies in groupby(prompts)]
    return [prompt for prompt, _ in runs], [size for _, size in runs]


def with_copies(tokenized: tuple[list, list | None, dict], num_copies: list[int] | None) -> tuple:
    """
    What TRL's `_tokenize_prompts` has made of prompts [`without_copies`], for all N rows. Each has a list of its own.
    """
    if num_copies is None:
        return tokenized

    def repeat(values: list) -> list:
        return [list(value) for value, size in zip(values, num_copies, strict=True) for _ in range(size)]

    prompt_ids, images, fields = tokenized  # the fields are of each token, `token_type_ids` say
    return repeat(prompt_ids), images, {name: repeat(values) for name, values in fields.items()}
