"""An evaluation during training: one engine call for all of it, and what is right."""

from collections import Counter, defaultdict, deque

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from ..evaluation.metrics import validation_metrics


class Evaluation:
    """
    One evaluation.

    Args:
        dataset (`Dataset`): its problems. A stream has no length.

    Attributes:
        correctness (`list[torch.Tensor]`): correctness rewards of each batch, over all processes.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.correctness: list[torch.Tensor] = []

    def metrics(self, num_generations: int) -> dict[str, float]:
        """pass@1 and pass@k of `num_generations` samples of each prompt; empty if nothing was evaluated."""
        if not self.correctness:
            return {}
        samples = torch.cat(self.correctness).view(-1, num_generations).cpu().numpy()
        # The last batch is filled up with the first prompts.
        return validation_metrics(samples[: len(self.dataset)] if isinstance(self.dataset, Dataset) else samples)


def name_after_set(metrics: dict[str, list[float]], metric_key_prefix: str) -> None:
    """
    Give the metrics of one evaluation set of several its name, as transformers does with the loss.

    Args:
        metrics (`dict[str, list[float]]`):
            What TRL is to log, as `eval_` and the name, whichever set it is of: of several, the last would remain.
        metric_key_prefix (`str`): transformers' `eval_<set>`, or `eval` where there is but one.
    """
    if metric_key_prefix.startswith("eval_"):
        for name in list(metrics):
            metrics[f"{metric_key_prefix.removeprefix('eval_')}_{name}"] = metrics.pop(name)


class Batches(list):
    """A dataloader's batches, read at once, and its dataset, whose size the evaluation loop asks for."""

    def __init__(self, dataloader: DataLoader):
        super().__init__(dataloader)
        self.dataset = dataloader.dataset


class SampledAhead:
    """
    What an engine samples in one call for all prompts of an evaluation. With a call per batch, TRL wakes the engine,
    sends it the weights (in sleep mode) and waits for the longest answer each time.

    Args:
        prompts (`list[list[int]]`): tokens of the prompt of each of this process's rows.
    """

    def __init__(self, prompts: list[list[int]]):
        self.prompts = prompts
        self._columns: list[list | None] | None = None
        self._rows_of: dict[tuple[int, ...], deque[int]] = defaultdict(deque)
        for row, prompt in enumerate(prompts):
            self._rows_of[tuple(prompt)].append(row)

    @property
    def is_waiting(self) -> bool:
        """Whether nothing is sampled yet."""
        return self._columns is None

    def add(self, columns: list[list | None]) -> None:
        """Keep what was sampled for the prompts: of each column an entry per row, or `None`."""
        self._columns = columns

    def take(self, prompts: list[list[int]]) -> list[list | None] | None:
        """
        The columns of rows with these prompts, `None` if none are left: of the second turn of a conversation with
        tools, say.
        """
        keys = [tuple(prompt) for prompt in prompts]
        if any(count > len(self._rows_of.get(key, ())) for key, count in Counter(keys).items()):
            return None
        rows = [self._rows_of[key].popleft() for key in keys]
        return [None if column is None else [column[row] for row in rows] for column in self._columns]
