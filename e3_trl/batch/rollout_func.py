"""What a rollout function returns."""


def check_rollouts(prompt_ids: list[list[int]], returned_ids: list[list[int]]) -> None:
    """
    Raise `ValueError` if the rows of a rollout function are not those that it was asked for.

    Args:
        prompt_ids (`list[list[int]]`): tokens of the prompt that each row was asked for, as the trainer makes them.
        returned_ids (`list[list[int]]`): tokens of the prompts that the rows came back with.
    """
    row = len(returned_ids) if len(returned_ids) != len(prompt_ids) else misplaced_row(prompt_ids, returned_ids)
    if row is not None:
        raise ValueError(
            f"rollout_func returned {len(returned_ids)} rows for {len(prompt_ids)} prompts, and row {row} is not for "
            "the prompt at its place. Return one completion for each prompt, in their order: under this "
            "rollout_allocation a prompt stands there as often as its budget says, so not every num_generations-th "
            "is another one. Or set rollout_allocation to 'uniform'."
        )


def misplaced_row(prompt_ids: list[list[int]], returned_ids: list[list[int]]) -> int | None:
    """
    The first row that came back for another prompt than it was asked for; `None` if no row can be said to have.

    A rollout function may make the tokens of a prompt in a way of its own, or have one prompt for all; but where it
    has several, rows of different prompts do not come back with the same one.
    """
    asked = {tuple(ids): row for row, ids in enumerate(prompt_ids)}
    if len(set(map(tuple, returned_ids))) == 1 and tuple(returned_ids[0]) not in asked:
        return None
    first: dict[tuple[int, ...], int] = {}
    for row, returned in enumerate(map(tuple, returned_ids)):
        others = first.setdefault(returned, row), asked.get(returned, row)
        if any(prompt_ids[other] != prompt_ids[row] for other in others):
            return row
    return None
