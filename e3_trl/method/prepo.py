"""PREPO (arXiv 2511.00794): which prompts of many are sampled, and how much each completion counts."""

import math

import numpy as np
import torch


def prompt_perplexity(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    \\( \exp(-\frac{1}{T} \sum_t \log \pi(x_t \mid x_{<t})) \\) of each prompt.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-prob of each token, in nats.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where a token counts. Without any, the perplexity is 1.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return torch.exp(-torch.nan_to_num(token_mean(logps, mask), nan=0.0))


def token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of each row of `values`, of shape `(N, T)`, where the mask is 1; NaN where it is nowhere."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


def select_by_perplexity(perplexity: np.ndarray, num_selected: int, progress: float) -> np.ndarray:
    r"""
    The candidates that are sampled: of all \\( |B| \\), sorted from low to high perplexity, the \\( K \\) from
    position \\( l = \lfloor \rho (|B| - K) \rfloor \\) on, so easy prompts early in the run and hard ones late.

    Args:
        perplexity (`np.ndarray` of shape `(B,)`): perplexity of each candidate.
        num_selected (`int`): \\( K \\).
        progress (`float`): \\( \rho \\), the part of the run's steps that is over, in [0, 1].

    Returns:
        `np.ndarray` of shape `(num_selected,)`: places of the candidates, by perplexity.

    Example:

    ```python
    >>> perplexity = np.array([9.0, 2.0, 5.0, 3.0])
    >>> [select_by_perplexity(perplexity, 2, progress).tolist() for progress in (0.0, 0.5, 1.0)]
    [[1, 3], [3, 2], [2, 0]]

    ```
    """
    first = math.floor(progress * (len(perplexity) - num_selected))
    return np.argsort(perplexity, kind="stable")[first : first + num_selected]


def entropy_weights(entropy: torch.Tensor) -> torch.Tensor:
    r"""
    Weight of each completion by its relative entropy: \\( w_i = H_i / mean_j H_j \\).

    Args:
        entropy (`torch.Tensor` of shape `(N,)`):
            Mean entropy of each completion's tokens. NaN = it has none to train on: weight 1, left out of the mean.

    Returns:
        `torch.Tensor` of shape `(N,)`, 1 on average. All are 1 if no completion has any entropy.

    Example:

    ```python
    >>> entropy_weights(torch.tensor([0.2, 0.6, torch.nan]))
    tensor([0.5000, 1.5000, 1.0000])

    ```
    """
    return torch.nan_to_num(entropy / torch.nanmean(entropy), nan=1.0)
