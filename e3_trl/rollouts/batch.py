"""One generation batch: everything that is known of it between the choice of its prompts and its advantages."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset


# Column that carries a prompt's index from the dataset to the trainer; nothing else sees it.
PROMPT_ID = "e3_prompt_id"


@dataclass
class Round:
    """
    One call for completions. A batch has one, with dynamic sampling or a pilot several.

    Args:
        prompt_ids (`np.ndarray` of shape `(N,)`): prompt of each row, over all processes.
        examples (`list[dict]`): this process's rows, without their ids.
        lengths (`torch.Tensor` of shape `(N,)`): tokens that the model wrote in each row, once it is sampled.
        rewards (`torch.Tensor` of shape `(N, num_funcs)`): of each reward function, NaN = none, once it is scored.
    """

    prompt_ids: np.ndarray
    examples: list[dict]
    lengths: torch.Tensor | None = None
    rewards: torch.Tensor | None = None


@dataclass
class GenerationBatch:
    """
    A generation batch while it is sampled and scored. The trainer makes one when the batch begins, hands it to each
    method that is switched on (`function(trainer, batch)`, in the file of the method's name beside this one), and
    drops it when it has the advantages, or after an exception.

    N rows are trained on; M are sampled, of which dynamic sampling discards some. Both count over all processes, in
    the order of their ranks.

    Args:
        index (`int`): number of the generation batch in the run.
        process_index (`int`): rank of this process.
        num_processes (`int`): processes that share the batch.
        rounds (`list[Round]`): the first holds the prompts that the batch begins with.
        group_ids (`np.ndarray` of shape `(N,)`):
            Group of each row that is trained on: its prompt's id, or with dynamic sampling that of the first round's
            group at its place.
        indexed (`bool`): whether prompt ids are indices into the dataset; otherwise they number the groups of the run.
        defers_old_logps (`bool`): whether the log-probs that TRL computes of all rows, for the steps after the policy
            has changed, are computed later, and of the rows of those steps alone.
        owes_old_logps (`bool`): whether TRL has asked for them, and they are not computed yet.
        kept (`np.ndarray` of shape `(N,)`, *optional*): sampled rows that are trained on. `None` = all.
        shaped_rewards (`torch.Tensor` of shape `(N, num_funcs)`): what the advantages are made of.
        advantages (`torch.Tensor` of shape `(N,)`): the outcome.
    """

    index: int
    process_index: int
    num_processes: int
    rounds: list[Round]
    group_ids: np.ndarray
    indexed: bool = True
    defers_old_logps: bool = False
    owes_old_logps: bool = False
    kept: np.ndarray | None = None
    shaped_rewards: torch.Tensor | None = field(default=None, repr=False)
    advantages: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def begin(cls, index: int, inputs: list[dict], num_generations: int, accelerator) -> "GenerationBatch":
        """
        The batch of these rows.

        Args:
            index (`int`): number of the generation batch in the run.
            inputs (`list[dict]`): this process's rows. They carry ids unless they come from a stream, or from an
                environment that makes the prompts.
            num_generations (`int`): rows of a prompt, where they carry none.
            accelerator (`Accelerator`): the processes that share the batch.
        """
        examples = [_without_id(row) for row in inputs]
        indexed = PROMPT_ID in inputs[0]
        if indexed:
            ids = torch.tensor([row[PROMPT_ID] for row in inputs], device=accelerator.device)
            prompt_ids = accelerator.gather(ids).cpu().numpy()
        else:
            num_groups = len(inputs) * accelerator.num_processes // num_generations
            prompt_ids = np.repeat(index * num_groups + np.arange(num_groups), num_generations)
        rounds = [Round(prompt_ids, examples)]
        return cls(index, accelerator.process_index, accelerator.num_processes, rounds, prompt_ids, indexed)

    def begin_with(self, prompt_ids: np.ndarray, dataset) -> None:
        """Begin with these rows, which N have, in place of those that the dataloader brought."""
        self.group_ids = prompt_ids
        self.rounds = [self.make_round(prompt_ids, dataset)]

    @property
    def round(self) -> Round:
        """The newest round."""
        return self.rounds[-1]

    @property
    def share(self) -> slice:
        """This process's rows among the N."""
        return self.share_of(self.group_ids)

    def share_of(self, rows: np.ndarray) -> slice:
        """This process's part of rows of all processes."""
        size = len(rows) // self.num_processes
        return slice(self.process_index * size, (self.process_index + 1) * size)

    @property
    def prompt_ids(self) -> np.ndarray:
        """The prompts that the batch begins with, each once, in their order."""
        return self.group_ids[np.flatnonzero(np.r_[True, self.group_ids[1:] != self.group_ids[:-1]])]

    @property
    def columns(self) -> list[str]:
        """Columns of the dataset that the examples have."""
        return list(self.rounds[0].examples[0])

    @property
    def sampled_ids(self) -> np.ndarray:
        """Prompt of each row that was sampled, shape `(M,)`."""
        return np.concatenate([one.prompt_ids for one in self.rounds])

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens that the model wrote in each row that was sampled, shape `(M,)`."""
        return torch.cat([one.lengths for one in self.rounds])

    @property
    def rewards(self) -> torch.Tensor:
        """Rewards of each row that was sampled, shape `(M, num_funcs)`."""
        if self.round.rewards is None:
            raise RuntimeError(
                "_calculate_rewards is overridden without a call of super(), so the rewards did not arrive where they "
                "are counted. Call super()._calculate_rewards, and change what it returns."
            )
        return torch.cat([one.rewards for one in self.rounds])

    def of_kept(self, values):
        """Those of the values of M sampled rows that belong to the N that are trained on."""
        return values if self.kept is None else values[self.kept]

    def make_round(self, prompt_ids: np.ndarray, dataset) -> Round:
        """A round with these prompts of the dataset, one for each of its rows, of which all processes have as many."""
        return Round(prompt_ids, read_examples(dataset, prompt_ids[self.share_of(prompt_ids)], self.columns))


def read_examples(dataset, prompt_ids: np.ndarray, columns: list[str]) -> list[dict]:
    """The dataset's rows for these prompts. Each is a dict of its own, which TRL may write to."""
    examples = dataset.__getitems__(prompt_ids.tolist())
    return [{name: example[name] for name in columns} for example in examples]


def _without_id(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != PROMPT_ID}


class IndexedPrompts(Dataset):
    """
    A map-style dataset whose rows carry their index as [`PROMPT_ID`]. The dataset itself stays as it is, with whatever
    transform it has, which a column of it would not survive.

    Args:
        dataset (`datasets.Dataset`): the dataset.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {**self.dataset[index], PROMPT_ID: index}

    def __getitems__(self, indices: list[int]) -> list[dict]:
        rows = self.dataset.__getitems__(indices)
        return [{**row, PROMPT_ID: index} for row, index in zip(rows, indices, strict=True)]


class IndexedCollator:
    """
    A collator that does not see the ids.

    Args:
        collator (`callable`): the collator of the rows without them.
    """

    def __init__(self, collator: Callable[[list[dict]], list[dict]]):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> list[dict]:
        ids = [row[PROMPT_ID] for row in rows]
        collated = self.collator([_without_id(row) for row in rows])
        return [{**row, PROMPT_ID: index} for row, index in zip(collated, ids, strict=True)]
