"""The length bias of E3's released code: on easy prompts, a long correct completion is worth less than a short one."""

import torch


def length_bias(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    difficulty: torch.Tensor,
    coef: float,
    fraction: float,
) -> torch.Tensor:
    r"""
    Part of its reward that a correct completion of an easy prompt loses for its length \( l \):
    \( w \mu l / (1 + \mu l) \), so that \( r (1 - w \mu l / (1 + \mu l)) \) is left, whatever a right one is worth.

    In the code that E3's authors released, not in the paper. Differs from it: the easiest prompts are those of the
    batch, since the thousands of a dataset that are always solved share one rank. Prompts of equal difficulty are
    treated equally: \( w \) is the probability that a prompt is among the easiest ones if ties are broken by chance,
    so 1 for those easier than the last of them, and for those as easy as the last what is left of the fraction,
    divided among them.

    Args:
        correct (`torch.Tensor` of shape `(N,)`, bool):
            Whether each completion is correct.
        lengths (`torch.Tensor` of shape `(N,)`):
            Tokens of each completion.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Integer id of each completion's prompt.
        difficulty (`torch.Tensor` of shape `(N,)`):
            Difficulty of each completion's prompt in (0, 1], 1 = hardest, NaN = never sampled: not easy.
        coef (`float`):
            \( \mu \), per token.
        fraction (`float`):
            Part of the batch's prompts that counts as easy, rounded to whole prompts.

    Returns:
        `torch.Tensor` of shape `(N,)`: the part that each completion loses, in [0, 1).

    Example:

    ```python
    >>> lengths, groups, difficulty = torch.tensor([1000, 3000]), torch.tensor([4, 9]), torch.tensor([0.1, 0.7])
    >>> length_bias(torch.tensor([True, True]), lengths, groups, difficulty, coef=0.001, fraction=0.5)
    tensor([0.5000, 0.0000])

    ```
    """
    prompts, group_N = torch.unique(group_ids, return_inverse=True)
    difficulty_P = difficulty.new_empty(len(prompts))
    difficulty_P[group_N] = difficulty.nan_to_num(nan=torch.inf)  # equal in all rows of a prompt
    ascending_P = difficulty_P.sort().values
    easier_P = torch.searchsorted(ascending_P, difficulty_P)
    tied_P = torch.searchsorted(ascending_P, difficulty_P, right=True) - easier_P
    weight_P = ((round(fraction * len(prompts)) - easier_P) / tied_P).clamp(0, 1)
    weight_P[difficulty_P.isinf()] = 0
    scaled = coef * lengths
    return torch.where(correct, weight_P[group_N] * scaled / (1 + scaled), 0.0)
