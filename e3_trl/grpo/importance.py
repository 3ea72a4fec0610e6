"""Correction for completions that another engine sampled than the one that trains."""

import torch


def importance_sampling_ratio(
    logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> torch.Tensor:
    """
    Ratio of the policy's probability to the engine's, as [`~trl.GRPOTrainer`] defines it
    (`vllm_importance_sampling_mode`).

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs under the policy that was sampled from.
        sampling_logps (`torch.Tensor` of shape `(B, T)`): log-probs that the engine gave, NaN = unknown, which counts
            as no difference.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where a token counts.
        mode (`str`): `"token_truncate"`, `"token_mask"`, `"sequence_truncate"` or `"sequence_mask"`: the ratio of each
            token or of the whole sequence, clipped to the bounds or set to 0 outside of them.
        clip_min, clip_max (`float`, *optional*): the bounds. `None` = none.

    Returns:
        `torch.Tensor` of shape `(B, T)`, or `(B, 1)` of sequences.
    """
    difference = torch.nan_to_num((logps - sampling_logps) * mask, nan=0.0)
    level, treatment = mode.split("_")
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True)
    ratio = difference.exp()
    if treatment == "truncate":
        return ratio if clip_min is None and clip_max is None else ratio.clamp(clip_min, clip_max)
    is_outside = torch.zeros_like(ratio, dtype=torch.bool)
    if clip_min is not None:
        is_outside |= ratio < clip_min
    if clip_max is not None:
        is_outside |= ratio > clip_max
    return ratio.masked_fill(is_outside, 0.0)
