import json
import os
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import read_rollout_columns, read_rollouts
from e3_trl.method.counts import rollout_counts, rollout_metrics
from e3_trl.runs.rollout_log import RolloutLog
from e3_trl.runs.run_folder import end_of_step


NAN = float("nan")
WHOLE_NUMBERS = ("step", "batch", "pass", "prompt_id", "rollouts", "correct", "tokens")


def counts():
    return rollout_counts(
        np.array([7, 7, 3, 3, 3, 9, 9]),
        np.array([1.0, 1.0, 0.0, 0.2, NAN, NAN, NAN]),
        np.array([5, 6, 1, 2, 3, 4, 4]),
    )


def test_counts_per_prompt_in_order_of_appearance():
    assert {name: column.tolist() for name, column in counts().items()} == {
        "prompt_id": [7, 3, 9],
        "rollouts": [2, 3, 2],
        "scored": [2, 2, 0],
        "correct": [2, 0, 0],
        "tokens": [11, 6, 8],
    }


def test_metrics_leave_out_prompts_that_cannot_be_scored():
    assert rollout_metrics(counts()) == {
        "rollouts/min": 2.0,
        "rollouts/max": 3.0,
        "rollouts/all_wrong": 0.5,
        "rollouts/all_correct": 0.5,
    }
    unscorable = rollout_counts(np.array([1, 1]), np.array([NAN, NAN]), np.array([1, 1]))
    assert np.isnan(rollout_metrics(unscorable)["rollouts/all_wrong"])


def append(log, step):
    log.append((step, step - 1, 0), counts(), np.array([0.5, NAN, 1.0]), np.full(3, 0.9))


def test_rows_read_back(tmp_path):
    log = RolloutLog(tmp_path)
    append(log, 4)
    rows = read_rollouts(tmp_path)
    assert rows == read_rollouts(log.path)
    assert rows[1] == {
        "step": 4,
        "batch": 3,
        "pass": 0,
        "prompt_id": 3,
        "rollouts": 3,
        "correct": 0,
        "tokens": 6,
        "difficulty": None,
        "temperature": 0.9,
    }


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                **{name: st.integers(0, 2**40) for name in WHOLE_NUMBERS},
                "difficulty": st.none() | st.floats(0, 1),
                "temperature": st.floats(0.1, 2),
            }
        ),
        max_size=60,
    ),
    st.integers(0, 80),
)
def test_columns_are_those_of_the_rows(rows, cut):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        RolloutLog(folder).path.write_text(text[: max(0, len(text) - cut)])
        expected, columns = read_rollouts(folder), read_rollout_columns(folder)
    assert set(columns) == {*WHOLE_NUMBERS, "difficulty", "temperature"}
    for name, column in columns.items():
        values = [NAN if row[name] is None else row[name] for row in expected]
        np.testing.assert_array_equal(column, np.array(values, dtype=column.dtype))


def test_columns_of_many_rows_of_which_the_first_have_no_difficulty(tmp_path):
    """pyarrow reads blocks of a megabyte, and would guess a type for each."""
    log = RolloutLog(tmp_path)
    rows = {name: np.arange(20_000) for name in ("prompt_id", "rollouts", "correct", "tokens")}
    for step, difficulty in ((1, NAN), (2, 0.25)):
        log.append((step, step - 1, 0), rows, np.full(20_000, difficulty), np.ones(20_000))
    columns = read_rollout_columns(log.path)
    assert np.isnan(columns["difficulty"][:20_000]).all()
    assert (columns["difficulty"][20_000:] == 0.25).all()
    assert columns["tokens"].tolist() == [*range(20_000)] * 2
    assert columns["tokens"].dtype == columns["step"].dtype == np.int64


def test_a_full_disk_costs_no_row(tmp_path, caplog):
    log = RolloutLog(tmp_path)
    append(log, 1)
    written = log.path.read_text()
    log.path.rename(tmp_path / "aside")
    log.path.symlink_to("/dev/full")
    append(log, 2)
    assert "could not be written ([Errno 28] No space left on device)" in caplog.text
    log.path.unlink()
    (tmp_path / "aside").rename(log.path)
    append(log, 3)
    assert log.path.read_text().startswith(written)
    assert [row["step"] for row in read_rollouts(tmp_path)] == [1] * 3 + [2] * 3 + [3] * 3


@given(st.lists(st.integers(1, 9), max_size=20).map(sorted), st.integers(0, 10), st.integers(0, 400))
def test_a_resumed_run_keeps_the_whole_rows_up_to_its_step(steps, step, cut):
    rows = [json.dumps({"step": number, "filler": "x" * (7 * number % 50)}) + "\n" for number in steps]
    with tempfile.TemporaryDirectory() as folder:
        log = RolloutLog(folder)
        log.path.write_text("".join(rows)[: max(0, sum(map(len, rows)) - cut)])
        expected = [row for row in read_rollouts(folder) if row["step"] <= step]
        os.truncate(log.path, end_of_step(log.path, step))
        assert read_rollouts(folder) == expected
        assert log.path.read_text() == "".join(rows[: len(expected)])


@pytest.mark.parametrize("cut", [1, 40, 90])
def test_half_a_row_breaks_neither_reading_nor_resuming(tmp_path, cut):
    log = RolloutLog(tmp_path)
    for step in (1, 2, 3):
        append(log, step)
    whole = log.path.read_text()
    log.path.write_text(whole[:-cut])
    assert read_rollouts(tmp_path) == read_rollouts(tmp_path)[:8]
    os.truncate(log.path, end_of_step(log.path, 2))
    append(log, 3)
    assert log.path.read_text() == whole
