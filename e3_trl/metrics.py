"""pass@k: probability that at least one of k samples solves a problem."""

import math


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""
    Unbiased estimate of pass@k from `num_samples` samples of one problem (Chen et al. 2021,
    https://huggingface.co/papers/2107.03374): \\( 1 - \binom{n - c}{k} / \binom{n}{k} \\).

    Args:
        num_samples (`int`): samples of the problem, \\( n \\).
        num_correct (`int`): how many of them are right, \\( c \\).
        k (`int`): \\( 1 \le k \le n \\).

    Returns:
        `float` in [0, 1].

    Example:

    ```python
    >>> pass_at_k(num_samples=4, num_correct=1, k=2)
    0.5

    ```
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}. Set it in [0, num_samples], here [0, {num_samples}].")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}. Set it in [1, num_samples], here [1, {num_samples}].")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
