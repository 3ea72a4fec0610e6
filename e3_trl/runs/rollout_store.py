"""The completions that the prompts were given last, for a pass that begins with them again."""

import numpy as np


# A completion's tokens, int32, and the log-probs that they were sampled with, float32; both of shape `(T,)`.
Rollout = tuple[np.ndarray, np.ndarray]
NOTHING: Rollout = (np.empty(0, np.int32), np.empty(0, np.float32))


class RolloutStore:
    """
    Of each prompt the completions that it was given last: 8 bytes a token, in the main process's memory, and in each
    checkpoint, where [checksums](checkpoint.py) tell a damaged one, and the dataset's fingerprint another run's.

    So a run that is killed goes on with those of the checkpoint, whichever that is, and what it holds is never more
    than one pass over the data.

    Args:
        is_main_process (`bool`): whether this process keeps them. The others keep nothing.
    """

    def __init__(self, is_main_process: bool):
        self.is_main_process = is_main_process
        self._rollouts: dict[int, list[Rollout]] = {}

    def __len__(self) -> int:
        """Prompts that have some."""
        return len(self._rollouts)

    def put(self, prompt_ids: np.ndarray, rollouts: list[Rollout], is_kept: np.ndarray) -> None:
        """
        Put completions in the place of those that their prompts had.

        Args:
            prompt_ids (`np.ndarray` of shape `(N,)`): prompt of each completion.
            rollouts (`list[Rollout]`): the completions.
            is_kept (`np.ndarray` of shape `(N,)`): whether they are of use. Where not, those before go all the same.
        """
        if not self.is_main_process:
            return
        for prompt_id in np.unique(prompt_ids).tolist():
            self._rollouts.pop(prompt_id, None)
        for prompt_id, rollout, kept in zip(prompt_ids.tolist(), rollouts, is_kept, strict=True):
            if kept:
                self._rollouts.setdefault(prompt_id, []).append(rollout)

    def get(self, prompt_ids: np.ndarray, places: np.ndarray) -> list[Rollout]:
        """
        Completions of prompts, without tokens where there is none.

        Args:
            prompt_ids (`np.ndarray` of shape `(N,)`): the prompts.
            places (`np.ndarray` of shape `(N,)`): which of a prompt's completions, from 0.
        """

        def find(prompt_id: int, place: int) -> Rollout:
            of_prompt = self._rollouts.get(prompt_id, [])
            return of_prompt[place] if place < len(of_prompt) else NOTHING

        return [find(*which) for which in zip(prompt_ids.tolist(), places.tolist(), strict=True)]

    def state_to_save(self) -> dict[str, np.ndarray]:
        """Completions one after another: `prompt_ids` and `lengths` of each, `tokens` and `logps` of all."""
        rows = [(prompt_id, rollout) for prompt_id, rollouts in self._rollouts.items() for rollout in rollouts]
        columns = zip(NOTHING, *(rollout for _, rollout in rows), strict=True)
        tokens, logps = (np.concatenate(column) for column in columns)
        lengths = np.array([len(rollout[0]) for _, rollout in rows], dtype=np.int64)
        prompt_ids = np.array([prompt_id for prompt_id, _ in rows], dtype=np.int64)
        return {"prompt_ids": prompt_ids, "lengths": lengths, "tokens": tokens, "logps": logps}

    def restore(self, state: dict | None) -> None:
        """Go on with a checkpoint's; `None` = it has none, for they were not to be used again."""
        self._rollouts = {}
        if state is None:
            return
        ends = np.cumsum(state["lengths"])[:-1]
        parts = (np.split(np.array(state[name]), ends) for name in ("tokens", "logps"))
        prompt_ids = state["prompt_ids"]
        self.put(prompt_ids, list(zip(*parts, strict=True))[: len(prompt_ids)], np.ones(len(prompt_ids), dtype=bool))
