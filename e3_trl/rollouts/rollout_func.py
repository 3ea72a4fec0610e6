"""What a rollout function returns."""


def check_rollouts(prompts: list, prompt_ids: list[list[int]], returned_ids: list[list[int]]) -> None:
    """
    Raise `ValueError` if the rows of a rollout function are not those that it was asked for.

    Args:
        prompts (`list`): what each row was asked for.
        prompt_ids (`list[list[int]]`): its tokens, as the trainer makes them.
        returned_ids (`list[list[int]]`): tokens of the prompts that it came back with.
    """
    row = len(returned_ids) if len(returned_ids) != len(prompts) else misplaced_row(prompts, prompt_ids, returned_ids)
    if row is not None:
        raise ValueError(
            f"rollout_func returned {len(returned_ids)} rows for {len(prompts)} prompts, and row {row} is not for the "
            "prompt at its place. Return one completion for each prompt, in their order: under rollout_allocation "
            "'rank' a prompt stands there as often as its budget says, so not every num_generations-th is another "
            "one. Or set rollout_allocation to 'uniform'."
        )


def misplaced_row(prompts: list, prompt_ids: list[list[int]], returned_ids: list[list[int]]) -> int | None:
    """
    The first row that came back for another prompt than it was asked for; `None` if no row can be said to have.

    A rollout function may make the tokens of a prompt in a way of its own, or have one prompt for all; but where it
    has several, rows of different prompts do not come back with the same one.
    """
    if len(set(map(tuple, returned_ids))) == 1:
        prompts = prompts if tuple(returned_ids[0]) in set(map(tuple, prompt_ids)) else prompts[:1] * len(prompts)
    owner = {tuple(ids): row for row, ids in reversed(list(enumerate(prompt_ids)))}
    first: dict[tuple[int, ...], int] = {}
    for row, (own, returned) in enumerate(zip(map(tuple, prompt_ids), map(tuple, returned_ids), strict=True)):
        others = [first.setdefault(returned, row)]
        if returned != own and returned in owner:
            others.append(owner[returned])
        if any(prompts[other] != prompts[row] for other in others):
            return row
    return None
