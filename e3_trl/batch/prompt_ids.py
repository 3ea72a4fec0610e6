"""The index by which a prompt is known: a column that nobody but the trainer sees."""

from collections.abc import Callable

import numpy as np
from torch.utils.data import Dataset


# Column that carries a prompt's index from the dataset to the trainer.
PROMPT_ID = "e3_prompt_id"


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
        collated = self.collator([without_id(row) for row in rows])
        return [{**row, PROMPT_ID: index} for row, index in zip(collated, ids, strict=True)]


def without_id(row: dict) -> dict:
    """The row as the dataset has it."""
    return {name: value for name, value in row.items() if name != PROMPT_ID}


def read_examples(dataset, prompt_ids: np.ndarray, columns: list[str]) -> list[dict]:
    """The dataset's rows for these prompts. Each is a dict of its own, which TRL may write to."""
    examples = dataset.__getitems__(prompt_ids.tolist())
    return [{name: example[name] for name in columns} for example in examples]
