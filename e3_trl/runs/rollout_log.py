"""`rollouts.jsonl`: one row per prompt per generation batch, written as the run goes."""

import json
import logging
import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from .run_folder import ROLLOUTS_FILE


logger = logging.getLogger(__name__)
COLUMNS = {
    "step": np.int64,
    "batch": np.int64,
    "pass": np.int64,
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
        self.path = Path(folder) / ROLLOUTS_FILE
        self.by_difficulty = np.zeros((2, 10))
        self._pending: list[str] = []

    def state_to_save(self) -> dict:
        """The rows are in a file of their own, which holds all of them by then."""
        self.flush()
        return {}

    def restore(self, state: dict | None) -> None:
        """Begin anew with what is in the file."""
        self.by_difficulty = np.zeros_like(self.by_difficulty)
        self._pending = []

    def append(
        self,
        place: tuple[int, int, int],
        counts: dict[str, np.ndarray],
        difficulty: np.ndarray,
        temperature: np.ndarray,
    ) -> None:
        """
        Write a generation batch, one row per prompt.

        Args:
            place (`tuple` of three `int`):
                The optimizer step that first trains on the batch, generation batches before it, and passes over the
                dataset before it.
            counts (`dict`): its [`~e3_trl.method.counts.rollout_counts`].
            difficulty (`np.ndarray` of shape `(P,)`): the ranks that its budgets came from.
            temperature (`np.ndarray` of shape `(P,)`): the temperatures that it was sampled at.
        """
        columns = [counts[name].tolist() for name in ("prompt_id", "rollouts", "correct", "tokens")]
        columns += [[None if math.isnan(value) else value for value in difficulty.tolist()], temperature.tolist()]
        lines = [
            json.dumps(dict(zip(COLUMNS, (*place, *row), strict=True))) + "\n" for row in zip(*columns, strict=True)
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
        `batch` and `pass` (generation batches, and passes over the dataset, before this one), `prompt_id` (index in
        the dataset), `rollouts`, `correct`, `tokens` (of its completions together), `difficulty` (in (0, 1], 1 =
        hardest, `None` = not ranked yet) and `temperature` (of sampling).
    """
    path = Path(path)
    with open(path / ROLLOUTS_FILE if path.is_dir() else path) as file:
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
    path = path / ROLLOUTS_FILE if path.is_dir() else path
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
