"""How much of an old completion the policy of today would still write (SPEC-RL, arXiv 2509.23232)."""

import numpy as np


def accepted_tokens(new_logps: np.ndarray, old_logps: np.ndarray, uniforms: np.ndarray, lenience: float = 1.0) -> int:
    r"""
    Number of a completion's first tokens that are accepted. Token \\( t \\) is, with probability

    \\[ \min(1, \ell \, p_{new}(y_t | y_{<t}) / p_{old}(y_t | y_{<t})), \\]

    and with the first that is not, all after it fall. As speculative decoding does it, with the old policy as the
    draft model. What comes after is to be sampled from the new policy, which is not exact: speculative decoding draws
    the token at a rejection from \\( (p_{new} - p_{old})_+ \\), which takes all of \\( p_{old} \\), not that of one
    token. Where the two differ by \\( \delta \\) (total variation), a token that is verified so, with
    \\( \ell = 1 \\), differs from the new policy by at most \\( \delta (1 - \delta) \\).

    Args:
        new_logps (`np.ndarray` of shape `(T,)`): log-probs of the completion's tokens under the policy of today.
        old_logps (`np.ndarray` of shape `(T,)`): log-probs that they were sampled with, NaN = not known, which is not
            accepted.
        uniforms (`np.ndarray` of shape `(T,)`): draws from [0, 1).
        lenience (`float`, *optional*, defaults to `1.0`): \\( \ell \\). More than 1 accepts more, and errs more.

    Returns:
        `int`: from 0 to T.

    Example:

    ```python
    >>> accepted_tokens(np.log([0.5, 0.2, 0.9]), np.log([0.4, 0.4, 0.9]), np.array([0.99, 0.6, 0.0]))
    1

    ```
    """
    with np.errstate(invalid="ignore"):
        probability = lenience * np.exp(new_logps - old_logps)
    rejected = ~(uniforms < probability)  # also where it is NaN
    return int(rejected.argmax()) if rejected.any() else len(rejected)
