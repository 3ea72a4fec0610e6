"""pass@k, the probability that at least one of k samples solves a problem, and what an evaluation says with it."""

import math

import numpy as np


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


def pass_at_k_table(rewards: np.ndarray, ks: list[int]) -> np.ndarray:
    """
    [`pass_at_k`] of many problems.

    Args:
        rewards (`np.ndarray` of shape `(P, num_samples)`):
            Reward of each sample of each problem: above 0.5 is right, NaN = unscorable.
        ks (`list[int]`): values of k, up to `num_samples`.

    Returns:
        `np.ndarray` of shape `(P, len(ks))`: NaN for a problem of which a sample is unscorable.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    num_samples = rewards.shape[1]
    by_count = np.array([[pass_at_k(num_samples, count, k) for k in ks] for count in range(num_samples + 1)])
    table = by_count[(rewards > 0.5).sum(axis=1)]
    table[np.isnan(rewards).any(axis=1)] = np.nan
    return table


def validation_metrics(rewards: np.ndarray) -> dict[str, float]:
    """
    Metrics of an evaluation during training.

    Args:
        rewards (`np.ndarray` of shape `(P, num_samples)`): as in [`pass_at_k_table`].

    Returns:
        `dict` with `pass@1` and, of several samples, `pass@{num_samples}`: means over the problems that could be
        scored, NaN if none could.

    Example:

    ```python
    >>> validation_metrics([[1.0, 0.0], [0.0, 0.0]])
    {'pass@1': 0.25, 'pass@2': 0.5}

    ```
    """
    ks = sorted({1, np.shape(rewards)[1]})
    table = pass_at_k_table(rewards, ks)
    table = table[~np.isnan(table).any(axis=1)]
    means = table.mean(axis=0) if len(table) else [math.nan] * len(ks)
    return {f"pass@{k}": float(mean) for k, mean in zip(ks, means, strict=True)}


def bootstrap_means(values: np.ndarray, num_resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """
    Means of problems drawn with replacement. Their 2.5 and 97.5 percentiles are a 95% confidence interval of the mean.

    Args:
        values (`np.ndarray` of shape `(P, K)`): K values of each problem, drawn together.
        num_resamples (`int`, *optional*, defaults to `10000`): how often to draw P problems.
        seed (`int`, *optional*, defaults to `0`): of the draws.

    Returns:
        `np.ndarray` of shape `(num_resamples, K)`.
    """
    num_problems = len(values)
    draws = np.random.default_rng(seed).multinomial(
        num_problems, np.full(num_problems, 1 / num_problems), num_resamples
    )
    return draws @ values / num_problems


def evaluation_report(
    rewards: dict[str, np.ndarray], tokens: dict[str, np.ndarray], truncated: dict[str, np.ndarray]
) -> dict[str, dict]:
    """
    What R runs, each with `num_samples` samples of every problem, say about a method.

    Args:
        rewards (`dict[str, np.ndarray]` of shape `(R, P, num_samples)`):
            Per benchmark, as in [`pass_at_k_table`]. A problem with an unscorable sample is left out and counted.
        tokens (`dict[str, np.ndarray]` of shape `(R, P, num_samples)`): lengths of the samples.
        truncated (`dict[str, np.ndarray]` of shape `(R, P, num_samples)`): whether each was cut off.

    Returns:
        `dict[str, dict]`: per benchmark, and for their unweighted mean under `"average"`:
        - `problems` and `unscorable`: numbers of problems, the latter not part of the former.
        - `pass@k`, for k = 1, 2, 4, ... and `num_samples`, as strings: `mean` over problems and runs; `low` and
          `high`, its 95% confidence interval over problems (bootstrap); `runs`, the mean of each run; `spread`, their
          standard deviation (ddof = 1), `None` for one run.
        - `tokens`: mean length of a response. `truncated`: share of responses cut off.

    Raises:
        `ValueError`: if no problem of a benchmark could be scored.
    """
    num_samples = next(iter(rewards.values())).shape[2]
    ks = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples] + [num_samples]
    report, runs, resampled = {}, {}, {}
    for seed, (name, rewards_RPn) in enumerate(rewards.items()):
        scored = ~np.isnan(rewards_RPn).any(axis=(0, 2))
        if not scored.any():
            raise ValueError(f"No problem of {name} could be scored. Check its answers, or the reward function.")
        values_RPK = np.stack([pass_at_k_table(run, ks) for run in rewards_RPn[:, scored]])
        runs[name] = values_RPK.mean(axis=1)
        resampled[name] = bootstrap_means(values_RPK.mean(axis=0), seed=seed)
        report[name] = {
            "problems": int(scored.sum()),
            "unscorable": int((~scored).sum()),
            "pass@k": _summary(ks, runs[name], resampled[name]),
            "tokens": float(tokens[name][:, scored].mean()),
            "truncated": float(truncated[name][:, scored].mean()),
        }
    report["average"] = {
        **{key: sum(report[name][key] for name in rewards) for key in ("problems", "unscorable")},
        "pass@k": _summary(ks, np.mean(list(runs.values()), axis=0), np.mean(list(resampled.values()), axis=0)),
        **{key: float(np.mean([report[name][key] for name in rewards])) for key in ("tokens", "truncated")},
    }
    return report


def _summary(ks: list[int], runs_RK: np.ndarray, resampled_BK: np.ndarray) -> dict[str, dict]:
    low, high = np.percentile(resampled_BK, [2.5, 97.5], axis=0)
    return {
        str(k): {
            "mean": float(runs_RK[:, index].mean()),
            "low": float(low[index]),
            "high": float(high[index]),
            "runs": runs_RK[:, index].tolist(),
            "spread": float(runs_RK[:, index].std(ddof=1)) if len(runs_RK) > 1 else None,
        }
        for index, k in enumerate(ks)
    }
