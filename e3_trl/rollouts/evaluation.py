"""An evaluation during training: one engine call for all of it, and what is right."""

from collections import Counter, defaultdict, deque

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from ..evaluation.metrics import validation_metrics


class Evaluation:
    """
    One evaluation. It can hold completions that were sampled ahead for all prompts of this process: with a call per
    batch, TRL wakes the engine, sends it the weights (in sleep mode) and waits for the longest answer each time.

    Args:
        batches (`DataLoader`): the evaluation's batches.
        ahead (`bool`): whether completions are to be sampled ahead, at the first batch.

    Attributes:
        batches (`Iterable`): the same.
        correctness (`list[torch.Tensor]`): correctness rewards of each batch, over all processes.
        is_waiting (`bool`): whether completions are still to be sampled ahead.
    """

    def __init__(self, batches: DataLoader, ahead: bool):
        self.batches = _Batches(batches) if ahead else batches
        self.dataset = batches.dataset
        self.correctness: list[torch.Tensor] = []
        self.is_waiting = ahead
        self._completions: dict[tuple[int, ...], deque] = defaultdict(deque)

    @property
    def prompts(self) -> list:
        """Of all rows of this process."""
        return [row["prompt"] for batch in self.batches for row in batch]

    def add(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], logprobs: list[list[float]]) -> None:
        """Keep the completions that were sampled ahead."""
        self.is_waiting = False
        for ids, *completion in zip(prompt_ids, completion_ids, logprobs, strict=True):
            self._completions[tuple(ids)].append(completion)

    def take(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]] | None:
        """
        Completions and log-probs of rows with these prompts, `None` if none are left: of the second turn of a
        conversation with tools, say.
        """
        keys = [tuple(ids) for ids in prompt_ids]
        if any(count > len(self._completions.get(key, ())) for key, count in Counter(keys).items()):
            return None
        completion_ids, logprobs = zip(*(self._completions[key].popleft() for key in keys), strict=True)
        return list(completion_ids), list(logprobs)

    def samples(self, num_generations: int) -> np.ndarray | None:
        """Correctness rewards of each prompt, shape `(P, num_generations)`; `None` if nothing was evaluated."""
        if not self.correctness:
            return None
        samples = torch.cat(self.correctness).view(-1, num_generations).cpu().numpy()
        # The last batch is filled up with the first prompts.
        return samples[: len(self.dataset)] if isinstance(self.dataset, Dataset) else samples

    def metrics(self, num_generations: int) -> dict[str, float]:
        """What is logged of the samples beside TRL's own metrics."""
        samples = self.samples(num_generations)
        return {} if samples is None else validation_metrics(samples)


class _Batches(list):
    """A dataloader's batches, read at once, and its dataset, whose size the evaluation loop asks for."""

    def __init__(self, dataloader):
        super().__init__(dataloader)
        self.dataset = dataloader.dataset
