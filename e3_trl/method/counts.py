"""What is counted of a batch's rollouts."""

import numpy as np


def rollout_counts(prompt_ids: np.ndarray, correctness: np.ndarray, num_tokens: np.ndarray) -> dict[str, np.ndarray]:
    """
    Count a batch's rollouts per prompt. A rollout is correct if its correctness reward is above 0.5.

    Args:
        prompt_ids (`np.ndarray` of shape `(N,)`): each rollout's prompt.
        correctness (`np.ndarray` of shape `(N,)`): its correctness reward, NaN = unscorable.
        num_tokens (`np.ndarray` of shape `(N,)`): length of its completion.

    Returns:
        `dict` of arrays of shape `(P,)`, prompts in the order in which they first appear: `prompt_id`, `rollouts`,
        `scored`, `correct` and `tokens`.
    """
    sorted_ids, first, inverse = np.unique(prompt_ids, return_index=True, return_inverse=True)
    columns = {
        "prompt_id": sorted_ids,
        "rollouts": np.bincount(inverse),
        "scored": np.bincount(inverse, weights=~np.isnan(correctness)).astype(np.int64),
        "correct": np.bincount(inverse, weights=correctness > 0.5).astype(np.int64),
        "tokens": np.bincount(inverse, weights=num_tokens).astype(np.int64),
    }
    return {name: column[np.argsort(first)] for name, column in columns.items()}


def rollout_metrics(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """
    Metrics of a batch from its [`rollout_counts`].

    Returns:
        `dict` with `rollouts/min` and `rollouts/max` (rollouts of a prompt), `rollouts/all_wrong` and
        `rollouts/all_correct` (fraction of the prompts whose scored rollouts are all wrong or all right, NaN if none
        could be scored).
    """
    scored = counts["scored"] > 0
    correct, num_scored = counts["correct"][scored], counts["scored"][scored]
    return {
        "rollouts/min": float(counts["rollouts"].min()),
        "rollouts/max": float(counts["rollouts"].max()),
        "rollouts/all_wrong": float((correct == 0).mean()) if scored.any() else float("nan"),
        "rollouts/all_correct": float((correct == num_scored).mean()) if scored.any() else float("nan"),
    }
