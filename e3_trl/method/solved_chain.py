"""Whether a prompt will be partly solved, predicted from how it was before: DPS, arXiv 2603.10887."""

import numpy as np


# The states of a prompt: all rollouts of a batch wrong, some right, all right.
UNSOLVED, PARTLY, SOLVED = range(3)


class SolvedChain:
    r"""
    A Markov chain of three states for each prompt: unsolved, partly solved, solved. A batch shows the state of its
    prompts; until the next pass shows it again it is believed to move by the prompt's own transition probabilities,
    which have a Dirichlet prior and count what was seen:
    \\( \alpha \leftarrow \lambda \alpha + (1 - \lambda) \alpha_0 + \xi \\), \\( \xi \\) the expected transitions into
    the state seen and \\( \alpha_0 = 1 \\) (https://huggingface.co/papers/2603.10887).

    Differs from the paper: a step of the chain is a pass over the dataset, in which a prompt is met at most once, and
    is made when the prompt is asked for. So a batch costs what its own prompts cost.

    Args:
        num_prompts (`int`): prompts of the dataset.
        decay (`float`, *optional*, defaults to `0.95`): \\( \lambda \\), in [0, 1].

    Example:

    ```python
    >>> chain = SolvedChain(2)
    >>> for _ in range(3):
    ...     chain.observe([0, 0, 1, 1], [1.0, 0.0, 0.0, 0.0])
    ...     chain.begin_pass()
    >>> chain.partly_solved([0, 1]).round(2)
    array([0.62, 0.19])

    ```
    """

    def __init__(self, num_prompts: int, decay: float = 0.95):
        self.decay = decay
        self.belief = np.full((num_prompts, 3), 1 / 3)
        self.transitions = np.ones((num_prompts, 3, 3))
        self.seen_in = np.zeros(num_prompts, dtype=np.int64)
        self.num_passes = 0

    def begin_pass(self) -> None:
        """A pass over the dataset is over."""
        self.num_passes += 1

    def observe(self, prompt_ids: np.ndarray, rewards: np.ndarray) -> None:
        """
        Note the state of the prompts of a batch.

        Args:
            prompt_ids (`np.ndarray` of shape `(N,)`): index of each rollout's prompt in the dataset.
            rewards (`np.ndarray` of shape `(N,)`): its correctness reward, right above 0.5, NaN = unscorable.
        """
        prompt_ids_N, rewards_N = np.asarray(prompt_ids), np.asarray(rewards, dtype=np.float64)
        is_scored_N = ~np.isnan(rewards_N)
        ids_B, place_N = np.unique(prompt_ids_N[is_scored_N], return_inverse=True)
        right_B = np.bincount(place_N, rewards_N[is_scored_N] > 0.5, len(ids_B))
        all_B = np.bincount(place_N, minlength=len(ids_B))
        state_B = np.where(right_B == 0, UNSOLVED, np.where(right_B == all_B, SOLVED, PARTLY))
        before_B3, rows_B = self._before(ids_B), np.arange(len(ids_B))
        # In proportion to the belief that it was in a state, and the probability of the step from there.
        probability_B33 = self._probabilities(ids_B)
        came_from_B3 = before_B3 * probability_B33[rows_B, :, state_B]
        came_from_B3 /= came_from_B3.sum(axis=1, keepdims=True)
        self.transitions[ids_B] = self.decay * self.transitions[ids_B] + (1 - self.decay)
        self.transitions[ids_B[:, None], np.arange(3), state_B[:, None]] += came_from_B3
        self.belief[ids_B] = np.eye(3)[state_B]
        self.seen_in[ids_B] = self.num_passes

    def partly_solved(self, prompt_ids: np.ndarray) -> np.ndarray:
        """Probability that some rollouts of a prompt will be right in this pass, and some wrong; of shape `(B,)`."""
        ids_B = np.asarray(prompt_ids)
        return np.einsum("bi,bij->bj", self._before(ids_B), self._probabilities(ids_B))[:, PARTLY]

    def _probabilities(self, ids_B: np.ndarray) -> np.ndarray:
        counts_B33 = self.transitions[ids_B]
        return counts_B33 / counts_B33.sum(axis=2, keepdims=True)

    def _before(self, ids_B: np.ndarray) -> np.ndarray:
        """The belief at the end of the last pass, `(B, 3)`: moved on where a prompt was not seen there."""
        belief_B3, probability_B33 = self.belief[ids_B], self._probabilities(ids_B)
        steps_B = self.num_passes - 1 - self.seen_in[ids_B]
        for step in range(max(0, steps_B.max(initial=0))):
            moved_B3 = np.einsum("bi,bij->bj", belief_B3, probability_B33)
            belief_B3 = np.where((steps_B > step)[:, None], moved_B3, belief_B3)
        return belief_B3

    def state_dict(self) -> dict[str, np.ndarray | int]:
        """What [`SolvedChain.load_state_dict`] goes on from exactly."""
        arrays = {name: getattr(self, name).copy() for name in ("belief", "transitions", "seen_in")}
        return arrays | {"num_passes": self.num_passes}

    def load_state_dict(self, state_dict: dict[str, np.ndarray | int]) -> None:
        """Restore what [`SolvedChain.state_dict`] returned."""
        for name in ("belief", "transitions", "seen_in"):
            setattr(self, name, np.array(state_dict[name]))
        self.num_passes = state_dict["num_passes"]
