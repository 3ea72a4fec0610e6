"""Which rows go through the model together: micro-batches with little padding, the same number on every rank."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatchPlan:
    """
    The rows of one optimizer window, R ranks with N rows each, cut into micro-steps.

    Every rank has as many rows in a micro-step as the others, for they go through the model, and gather what it
    logs, together.

    Attributes:
        trained (`list[np.ndarray]`):
            Per micro-step the rows to train on, shape `(R, n)`, the longest first. Those for which none are left come
            after the first: the first and the last have at least one row each. With the first, DeepSpeed drops the
            gradients of the step before; in the last, ranks add up theirs.
        left_out (`list[np.ndarray]`):
            Per micro-step rows that need no gradient, shape `(R, m)`. Together with `trained`, each row once.
    """

    trained: list[np.ndarray]
    left_out: list[np.ndarray]


def plan_micro_batches(
    prompt_lengths: np.ndarray,
    completion_lengths: np.ndarray,
    needs_gradient: np.ndarray,
    num_steps: int,
    max_tokens: int | None = None,
) -> MicroBatchPlan:
    """
    Put rows of about the same length together. A micro-batch is as wide as its longest prompt and its longest
    completion, so rows are sorted by either or by their sum, whichever leaves the least padding. Each rank sorts its
    own rows, so that the ranks' micro-batches are long and short together.

    Args:
        prompt_lengths (`np.ndarray` of shape `(R, N)`): tokens of each row's prompt, a row of the array per rank.
        completion_lengths (`np.ndarray` of shape `(R, N)`): tokens of each row's completion.
        needs_gradient (`np.ndarray` of shape `(R, N)`): whether the row can change the gradient. Where a rank has
            fewer such rows than another, its shortest other rows are trained on too, which changes nothing.
        num_steps (`int`): micro-steps of the window, a divisor of N.
        max_tokens (`int`, *optional*): tokens, padding included, that a micro-batch may have. `None` = a micro-batch
            has at most N / `num_steps` rows. A budget that would take more than `num_steps` micro-batches is raised
            to the smallest, to 1%, that does not.

    Returns:
        [`MicroBatchPlan`].

    Example:

    ```python
    >>> plan = plan_micro_batches(
    ...     np.array([[3, 3, 3, 3]]), np.array([[9, 1, 8, 2]]), np.array([[True, True, True, True]]), num_steps=2
    ... )
    >>> plan.trained
    [array([[0, 2]]), array([[3, 1]])]

    ```
    """
    max_rows = needs_gradient.shape[1] // num_steps
    min_pieces = min(num_steps, 2)  # the first and the last
    num_trained = max(min_pieces, int(needs_gradient.sum(axis=1).max()))
    # Those that need it, then the shortest others.
    by_need = np.lexsort((prompt_lengths + completion_lengths, ~needs_gradient))

    def cut(rows: np.ndarray, key: np.ndarray, min_pieces: int) -> tuple[list[np.ndarray], int]:
        order = np.argsort(-np.take_along_axis(key, rows, axis=1), axis=1, kind="stable")
        rows = np.take_along_axis(rows, order, axis=1)
        # The longest of all ranks decides how many rows go together on each of them.
        widths = [
            np.take_along_axis(lengths, rows, axis=1).max(axis=0).tolist()
            for lengths in (prompt_lengths, completion_lengths)
        ]
        sizes = _cut(*widths, max_rows, num_steps, max_tokens)
        if len(sizes) < min_pieces:
            sizes = [-(-sum(sizes) // 2), sum(sizes) // 2]
        pieces = np.split(rows, np.cumsum(sizes)[:-1], axis=1) if sizes else []
        return pieces, sum(_padded_tokens(*widths, sizes))

    keys = completion_lengths, prompt_lengths, prompt_lengths + completion_lengths
    plans = [(cut(by_need[:, :num_trained], key, min_pieces), cut(by_need[:, num_trained:], key, 0)) for key in keys]
    (trained, _), (left_out, _) = min(plans, key=lambda parts: parts[0][1] + parts[1][1])
    nothing = np.empty((len(needs_gradient), 0), dtype=np.int64)
    trained[1:1] = [nothing] * (num_steps - len(trained))
    return MicroBatchPlan(trained, left_out + [nothing] * (num_steps - len(left_out)))


def _cut(
    prompts: list[int], completions: list[int], max_rows: int, max_pieces: int, max_tokens: int | None
) -> list[int]:
    """Sizes of the pieces that rows, sorted by length, are cut into."""
    if max_tokens is None:
        whole, rest = divmod(len(prompts), max_rows)
        return [rest] * (rest > 0) + [max_rows] * whole  # the fewest rows where they are the longest
    sizes = _greedy(prompts, completions, max_tokens)
    if len(sizes) > max_pieces:
        low, high = max_tokens, -(-len(prompts) // max_pieces) * (max(prompts) + max(completions))
        while high - low > 1 + high // 100:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_greedy(prompts, completions, middle)) <= max_pieces else (middle, high)
        sizes = _greedy(prompts, completions, high)
    return sizes


def _greedy(prompts: list[int], completions: list[int], max_tokens: int) -> list[int]:
    """Each piece takes as many rows as `max_tokens` allows, and at least one."""
    sizes: list[int] = []
    size = prompt = completion = 0
    for row in range(len(prompts)):
        prompt, completion = max(prompt, prompts[row]), max(completion, completions[row])
        if size and (size + 1) * (prompt + completion) > max_tokens:
            sizes.append(size)
            size, prompt, completion = 0, prompts[row], completions[row]
        size += 1
    return sizes + [size] * (size > 0)


def _padded_tokens(prompts: list[int], completions: list[int], sizes: list[int]) -> list[int]:
    tokens, start = [], 0
    for size in sizes:
        tokens.append(size * (max(prompts[start : start + size]) + max(completions[start : start + size])))
        start += size
    return tokens
