"""`rollouts.jsonl`: one row per prompt per generation batch, written as the run goes."""

import json
import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from .batch import GenerationBatch


logger = logging.getLogger(__name__)
FILE_NAME = "rollouts.jsonl"
COLUMNS = {
    "step": np.int64,
    "prompt_id": np.int64,
    "rollouts": np.int64,
    "correct": np.int64,
    "tokens": np.int64,
    "difficulty": np.float64,
    "temperature": np.float64,
}


class RolloutLog:
    """
    Appends rows to `rollouts.jsonl` so that a killed run leaves at most half a row, which [`read_rollouts`] and a
    resumed run leave out.

    Args:
        folder (`str` or `Path`): the run's output folder.

    Attributes:
        by_difficulty (`np.ndarray` of shape `(2, 10)`):
            Rollouts, and prompts, in each tenth of the difficulties, since a [`DashboardCallback`] took them last.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / FILE_NAME
        self.by_difficulty = np.zeros((2, 10))
        self._pending: list[str] = []

    def resume(self, step: int) -> None:
        """Go on from the checkpoint of `step`: drop half a row, and the rows of later steps, which come again."""
        self.by_difficulty = np.zeros_like(self.by_difficulty)
        self._pending = []
        if self.path.exists():
            os.truncate(self.path, self._end_of(step))

    def _end_of(self, step: int) -> int:
        """Where the last whole row of `step`, or of one before it, ends, in bytes. Rows lie in the order of steps."""
        kept, dropped = 0, self.path.stat().st_size  # what lies before, and behind
        with open(self.path, "rb") as file:
            while kept < dropped:
                middle = (kept + dropped) // 2
                file.seek(max(middle - 1, 0))
                if middle > 0:
                    file.readline()  # to where the next row begins, which may be in the middle
                start, row = file.tell(), file.readline()
                if start < dropped and row.endswith(b"\n") and json.loads(row)["step"] <= step:
                    kept = file.tell()
                else:
                    dropped = middle
        return kept

    def append(
        self, step: int, counts: dict[str, np.ndarray], difficulty: np.ndarray, temperature: np.ndarray
    ) -> None:
        """
        Write a generation batch, one row per prompt.

        Args:
            step (`int`): the optimizer step that first trains on the batch.
            counts (`dict`): its [`rollout_counts`].
            difficulty (`np.ndarray` of shape `(P,)`): the ranks that its budgets came from.
            temperature (`np.ndarray` of shape `(P,)`): the temperatures that it was sampled at.
        """
        columns = [counts[name].tolist() for name in ("prompt_id", "rollouts", "correct", "tokens")]
        columns += [[None if math.isnan(value) else value for value in difficulty.tolist()], temperature.tolist()]
        lines = [
            json.dumps(dict(zip(COLUMNS, (step, *row), strict=True))) + "\n" for row in zip(*columns, strict=True)
        ]
        self._pending += lines
        ranked = np.isfinite(difficulty)
        tenths = np.ceil(10 * difficulty[ranked]).clip(1, 10).astype(np.int64) - 1
        self.by_difficulty += [np.bincount(tenths, weights, 10) for weights in (counts["rollouts"][ranked], None)]
        self.flush()

    def flush(self) -> None:
        """Write what could not be written yet."""
        if not self._pending:
            return
        size = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = self.path.stat().st_size if self.path.exists() else 0
            with open(self.path, "a") as file:
                file.write("".join(self._pending))
        except OSError as error:  # a full disk is no reason to stop: the other processes would wait for this one
            with suppress(OSError):
                if size is not None:
                    os.truncate(self.path, size)
            logger.warning(f"{self.path} could not be written ({error}). Its rows come when there is room again.")
        else:
            self._pending = []


def read_rollouts(path: str | Path) -> list[dict]:
    """
    Read `rollouts.jsonl`.

    Args:
        path (`str` or `Path`): the file, or the run's output folder.

    Returns:
        `list[dict]`: per prompt and generation batch `step` (the optimizer step that first trains on the batch),
        `prompt_id` (index in the dataset), `rollouts`, `correct`, `tokens` (of its completions together),
        `difficulty` (in (0, 1], 1 = hardest, `None` = not ranked yet) and `temperature` (of sampling).
    """
    path = Path(path)
    with open(path / FILE_NAME if path.is_dir() else path) as file:
        # Only a line that ends was written whole.
        return [json.loads(line) for line in file if line.endswith("\n")]


def read_rollout_columns(path: str | Path) -> dict[str, np.ndarray]:
    """
    Read `rollouts.jsonl` as columns, in a tenth of the time and memory that [`read_rollouts`] takes: for runs of
    millions of rows, and for `pandas.DataFrame`.

    Args:
        path (`str` or `Path`): the file, or the run's output folder.

    Returns:
        `dict` of arrays of shape `(R,)`, R rows: as in [`read_rollouts`], with NaN for a difficulty that is not known.
    """
    import pyarrow  # which takes a moment
    from pyarrow import json as reader

    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    whole = _end_of_last_row(path)
    if whole == 0:
        return {name: np.empty(0, dtype) for name, dtype in COLUMNS.items()}
    schema = pyarrow.schema([(name, pyarrow.from_numpy_dtype(dtype)) for name, dtype in COLUMNS.items()])
    options = reader.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    with pyarrow.OSFile(str(path)) as file:  # not a memory map: a run that resumes may cut the file meanwhile
        table = reader.read_json(pyarrow.BufferReader(file.read_buffer(whole)), parse_options=options)
        return {name: table[name].to_numpy() for name in COLUMNS}


def _end_of_last_row(path: Path) -> int:
    """Where the last row that was written whole ends, in bytes."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                return start + newline + 1
            end = start
    return 0


def rollout_counts(prompt_ids: np.ndarray, correctness: np.ndarray, num_tokens: np.ndarray) -> dict[str, np.ndarray]:
    """
    Count a batch's rollouts per prompt. A rollout is correct if its correctness reward is above 0.5.

    Args:
        prompt_ids (`np.ndarray` of shape `(N,)`): each rollout's prompt.
        correctness (`np.ndarray` of shape `(N,)`): its correctness reward, NaN = unscorable.
        num_tokens (`np.ndarray` of shape `(N,)`): length of its completion.

    Returns:
        `dict` of arrays of shape `(P,)`, prompts in the order in which they first appear: `prompt_id`, `rollouts`,
        `scored`, `correct` and `tokens`.
    """
    sorted_ids, first, inverse = np.unique(prompt_ids, return_index=True, return_inverse=True)
    columns = {
        "prompt_id": sorted_ids,
        "rollouts": np.bincount(inverse),
        "scored": np.bincount(inverse, weights=~np.isnan(correctness)).astype(np.int64),
        "correct": np.bincount(inverse, weights=correctness > 0.5).astype(np.int64),
        "tokens": np.bincount(inverse, weights=num_tokens).astype(np.int64),
    }
    return {name: column[np.argsort(first)] for name, column in columns.items()}


def rollout_metrics(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """
    Metrics of a batch from its [`rollout_counts`].

    Returns:
        `dict` with `rollouts/min` and `rollouts/max` (rollouts of a prompt), `rollouts/all_wrong` and
        `rollouts/all_correct` (fraction of the prompts whose scored rollouts are all wrong or all right, NaN if none
        could be scored).
    """
    scored = counts["scored"] > 0
    correct, num_scored = counts["correct"][scored], counts["scored"][scored]
    return {
        "rollouts/min": float(counts["rollouts"].min()),
        "rollouts/max": float(counts["rollouts"].max()),
        "rollouts/all_wrong": float((correct == 0).mean()) if scored.any() else float("nan"),
        "rollouts/all_correct": float((correct == num_scored).mean()) if scored.any() else float("nan"),
    }


def log_rollouts(trainer, batch: "GenerationBatch") -> None:
    """Log what was sampled, whether it is trained on or not, and count it towards difficulty."""
    correctness = batch.rewards[:, trainer.difficulty_reward_index].cpu().numpy()
    counts = rollout_counts(batch.sampled_ids, correctness, batch.lengths.cpu().numpy())
    for name, value in rollout_metrics(counts).items():
        trainer.add_metric(name, value)
    if trainer.accelerator.is_main_process:
        of_prompt = [method(batch, counts["prompt_id"]) for method in (trainer.difficulty_of, trainer.temperature_of)]
        trainer.rollout_log.append(trainer.state.global_step + 1, counts, *of_prompt)
    if batch.indexed:
        trainer.difficulty_tracker.observe(batch.sampled_ids, correctness)
