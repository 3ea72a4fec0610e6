"""Group-relative advantages (Eq. 2 of E3) for groups of any size."""

import torch
from trl.trainer.utils import nanstd


def group_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, scale_rewards: str = "group", advantage_scale: str = "std"
) -> torch.Tensor:
    r"""
    Advantage of each completion relative to its prompt's group (Eq. 2):
    \\( \hat{A}_i = (r_i - mean(r)) / (std(r) + 10^{-4}) \\), with TRL's epsilon and its unbiased std.

    Where every group has the same size, the result equals TRL's to the last bit.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Reward of each completion, NaN = unscorable: left out of its group, advantage 0.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Integer id of each completion's prompt. Groups may have any size, rows any order.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            As in [`~trl.GRPOConfig`]: divide by the std of the `"group"`, of the `"batch"`, or by nothing (`"none"`).
        advantage_scale (`str`, *optional*, defaults to `"std"`):
            `"std"`, or `"mean"`: divide by the group's mean reward instead, as in MaxRL
            (https://huggingface.co/papers/2602.02710), \\( \hat{A}_i = (r_i - mean(r)) / mean(r) \\), and 0 where the
            mean is 0. That is for rewards of 0 and 1; it is defined for all that are not negative, where it does not
            depend on their unit.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Raises:
        `ValueError`: with `"mean"`, if a reward is negative: below a mean of 0 the better ones would be made rarer.

    Example:

    ```python
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0]), torch.tensor([7, 7, 3, 3, 3]), "none")
    tensor([ 0.5000, -0.5000, -2.0000, -1.0000,  3.0000])

    ```
    """
    advantages, _ = _advantages_and_std(rewards, group_ids, scale_rewards, advantage_scale)
    return torch.nan_to_num(advantages, nan=0.0)


def aggregate_advantages(
    rewards_per_func: torch.Tensor,
    reward_weights: torch.Tensor,
    group_ids: torch.Tensor,
    scale_rewards: str = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
    advantage_scale: str = "std",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`group_advantages`] of several reward functions, aggregated as [`~trl.GRPOTrainer`] does.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, num_funcs)`):
            Reward of each completion by each function, NaN = the function does not apply.
        reward_weights (`torch.Tensor` of shape `(num_funcs,)`):
            Weight of each function.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Integer id of each completion's prompt.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            `"group"`, `"batch"` or `"none"`. Without effect for `"normalize_then_sum"`, as in TRL.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"`, or `"normalize_then_sum"`: each function is normalized in its group first.
        advantage_scale (`str`, *optional*, defaults to `"std"`):
            As in [`group_advantages`], of the sum of the functions' rewards.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(N,)`: the advantages (0 where no function applied) and the standard
        deviation that each completion was compared with.
    """
    rewards_N = total_rewards(rewards_per_func, reward_weights, group_ids, multi_objective_aggregation)
    if multi_objective_aggregation == "normalize_then_sum":
        # The sum is then normalized over the whole batch, that is, as one group.
        group_ids, scale_rewards = torch.zeros_like(group_ids), "group"
    advantages_N, std_N = _advantages_and_std(rewards_N, group_ids, scale_rewards, advantage_scale)
    return torch.nan_to_num(advantages_N, nan=0.0), std_N


def total_rewards(
    rewards_per_func: torch.Tensor,
    reward_weights: torch.Tensor,
    group_ids: torch.Tensor,
    multi_objective_aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """
    The number of each completion by which it is compared with others: the advantages of a group are equal where these
    are.

    Args:
        rewards_per_func, reward_weights, group_ids, multi_objective_aggregation:
            As in [`aggregate_advantages`].

    Returns:
        `torch.Tensor` of shape `(N,)`: the weighted sum of the rewards, or of what each function's are in their
        group, NaN where no function applied.
    """
    unscorable_N = torch.isnan(rewards_per_func).all(dim=1)
    if multi_objective_aggregation == "normalize_then_sum":
        normalized = [_advantages_and_std(rewards_N, group_ids, "group")[0] for rewards_N in rewards_per_func.T]
        rewards_per_func = torch.stack(normalized, dim=1)
    rewards_N = (rewards_per_func * reward_weights.to(rewards_per_func.device)).nansum(dim=1)
    rewards_N[unscorable_N] = torch.nan
    return rewards_N


def _advantages_and_std(
    rewards_N: torch.Tensor, group_ids_N: torch.Tensor, scale_rewards: str, advantage_scale: str = "std"
) -> tuple[torch.Tensor, torch.Tensor]:
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards is {scale_rewards!r}. Set it to 'group', 'batch' or 'none'.")
    if advantage_scale not in ("std", "mean"):
        raise ValueError(f"advantage_scale is {advantage_scale!r}. Set it to 'std' or 'mean'.")
    rewards_N = rewards_N if rewards_N.is_floating_point() else rewards_N.float()
    # One row per group (P, largest group), padded with NaN, which nanmean and nanstd leave out.
    _, group_N, size_P = torch.unique(group_ids_N, return_inverse=True, return_counts=True)
    order = torch.argsort(group_N, stable=True)
    first_P = torch.cumsum(size_P, dim=0) - size_P
    position_N = torch.empty_like(group_N)
    position_N[order] = torch.arange(len(group_N), device=group_N.device) - first_P.repeat_interleave(size_P)
    rewards_PG = rewards_N.new_full((len(size_P), int(size_P.max())), torch.nan)
    rewards_PG[group_N, position_N] = rewards_N

    mean_N = torch.nanmean(rewards_PG, dim=1)[group_N]
    advantages_N = rewards_N - mean_N
    std_N = nanstd(rewards_N).expand_as(rewards_N) if scale_rewards == "batch" else nanstd(rewards_PG, dim=1)[group_N]
    if advantage_scale == "mean":
        if (rewards_N < 0).any():
            raise ValueError(
                f"advantage_scale is 'mean', and a completion has the reward {rewards_N[rewards_N < 0][0]:g}: it is "
                "for rewards of 0 and more. Set it to 'std', or make the reward functions return nothing negative."
            )
        # Where the mean is 0 all rewards are, and no difference is left to be divided.
        advantages_N = advantages_N / torch.where(mean_N > 0, mean_N, 1)
    elif scale_rewards != "none":
        advantages_N = advantages_N / (std_N + 1e-4)
    return advantages_N, std_N
