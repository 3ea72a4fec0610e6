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
    each_trains: bool = False,
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
            to the smallest, to 2%, that does not.
        each_trains (`bool`):
            Whether every micro-step has rows to train on. DeepSpeed's ZeRO-1 and ZeRO-2 end with an error in a
            backward pass that reaches no parameter.

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
    min_pieces = num_steps if each_trains else min(num_steps, 2)  # the first and the last
    num_trained = max(min_pieces, int(needs_gradient.sum(axis=1).max()))
    # Those that need it, then the shortest others.
    by_need = np.lexsort((prompt_lengths + completion_lengths, ~needs_gradient))

    keys = completion_lengths, prompt_lengths, prompt_lengths + completion_lengths

    def ordered(rows: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
        """Rows, the longest first, and of each place the length of all ranks' longest prompt and completion."""
        order = np.argsort(-np.take_along_axis(key, rows, axis=1), axis=1, kind="stable")
        rows = np.take_along_axis(rows, order, axis=1)
        prompts, completions = (
            np.take_along_axis(lengths, rows, axis=1).max(axis=0).tolist()
            for lengths in (prompt_lengths, completion_lengths)
        )
        return rows, prompts, completions

    def padded_tokens(key: np.ndarray) -> int:
        _, *lengths = ordered(by_need[:, :num_trained], key)
        return sum(_padded_tokens(*lengths, _equal(num_trained, max_rows)))

    key = min(keys, key=padded_tokens)
    pieces = []
    for rows, least in ((by_need[:, :num_trained], min_pieces), (by_need[:, num_trained:], 0)):
        rows, *lengths = ordered(rows, key)
        num_rows = rows.shape[1]
        sizes = _equal(num_rows, max_rows) if max_tokens is None else _within(*lengths, max_tokens, num_steps)
        while len(sizes) < least:
            largest = sizes.index(max(sizes))
            sizes[largest : largest + 1] = [-(-sizes[largest] // 2), sizes[largest] // 2]
        pieces.append(np.split(rows, np.cumsum(sizes)[:-1], axis=1) if sizes else [])
    trained, left_out = pieces
    nothing = np.empty((len(needs_gradient), 0), dtype=np.int64)
    trained[1:1] = [nothing] * (num_steps - len(trained))
    return MicroBatchPlan(trained, left_out + [nothing] * (num_steps - len(left_out)))


def _equal(num_rows: int, size: int) -> list[int]:
    """Pieces of one size, but for the first, where the rows are the longest."""
    whole, rest = divmod(num_rows, size)
    return [rest] * (rest > 0) + [size] * whole


def _within(prompts: list[int], completions: list[int], max_tokens: int, max_pieces: int) -> list[int]:
    """As few pieces as have `max_tokens` each; and if those are too many, `max_pieces` with little more."""
    sizes = _greedy(prompts, completions, max_tokens, max_pieces)
    if len(sizes) > max_pieces:
        equal = _equal(len(prompts), -(-len(prompts) // max_pieces))
        low, high = max_tokens, max(_padded_tokens(prompts, completions, equal))
        while high - low > 1 + high // 50:
            middle = (low + high) // 2
            fits = len(_greedy(prompts, completions, middle, max_pieces)) <= max_pieces
            low, high = (low, middle) if fits else (middle, high)
        sizes = _greedy(prompts, completions, high, max_pieces)
    return sizes


def _greedy(prompts: list[int], completions: list[int], max_tokens: int, max_pieces: int) -> list[int]:
    """Each piece takes as many rows as `max_tokens` allows, and at least one; a piece too many ends it."""
    sizes: list[int] = []
    size = prompt = completion = 0
    for one_prompt, one_completion in zip(prompts, completions, strict=True):
        widest = max(prompt, one_prompt) + max(completion, one_completion)
        if size and (size + 1) * widest > max_tokens:
            sizes.append(size)
            if len(sizes) > max_pieces:
                break
            size = prompt = completion = 0
        size, prompt, completion = size + 1, max(prompt, one_prompt), max(completion, one_completion)
    return sizes + [size] * (size > 0)


def _padded_tokens(prompts: list[int], completions: list[int], sizes: list[int]) -> list[int]:
    tokens, start = [], 0
    for size in sizes:
        tokens.append(size * (max(prompts[start : start + size]) + max(completions[start : start + size])))
        start += size
    return tokens
