"""
Long runs and large datasets:

    python benchmarks/scale.py --rows 10000000      # a rollouts.jsonl of so many rows is read, drawn and cut
    python benchmarks/scale.py --prompts 1000000    # a dataset of so many prompts is begun with, saved and resumed

The second is compared with a dataset of 1,000 prompts, each in processes of its own. Times are of this machine; the
last column tells by what to measure another.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from e3_trl import read_rollout_columns
from e3_trl.commands.replay import read_batches
from e3_trl.runs.figures import draw_runs
from e3_trl.runs.rollout_log import RolloutLog
from e3_trl.runs.run_folder import ROLLOUTS_FILE


PROMPTS_PER_STEP, STEPS_PER_PASS = 1000, 100


def timed(function) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def write_run(folder: Path, num_rows: int) -> None:
    """A run of so many rows: its log, and its `rollouts.jsonl`."""
    steps = num_rows // PROMPTS_PER_STEP
    rng = np.random.default_rng(0)
    log = [{"step": step, "epoch": step / STEPS_PER_PASS, "loss": 0.0, "entropy": 0.5} for step in range(1, steps + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": log}))
    rollouts = RolloutLog(folder)
    for step in range(1, steps + 1):
        counts = {
            "prompt_id": (step % STEPS_PER_PASS) * PROMPTS_PER_STEP + np.arange(PROMPTS_PER_STEP),
            "rollouts": rng.integers(4, 13, PROMPTS_PER_STEP),
            "correct": rng.integers(0, 5, PROMPTS_PER_STEP),
            "tokens": rng.integers(1000, 50000, PROMPTS_PER_STEP),
        }
        place = step, step - 1, (step - 1) // STEPS_PER_PASS
        rollouts.append(place, counts, rng.random(PROMPTS_PER_STEP), np.full(PROMPTS_PER_STEP, 1.1))


def measure_rows(num_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_run(folder, num_rows)
        path = folder / ROLLOUTS_FILE

        def count_lines():
            with open(path, "rb") as file:
                sum(1 for _ in file)

        print(f"{ROLLOUTS_FILE}: {num_rows:,} rows, {path.stat().st_size / 1e9:.2f} GB")
        lines = timed(count_lines)
        for name, function in {
            "read its columns": lambda: read_rollout_columns(folder),
            "draw the run": lambda: draw_runs([folder], folder / "figures"),
            "cut it into batches, for replay": lambda: read_batches(folder),
            "resume in its middle": lambda: RolloutLog(folder).resume(num_rows // PROMPTS_PER_STEP // 2),
        }.items():
            seconds = timed(function)
            print(f"{name:32} {seconds:8.2f} s  {seconds / lines:6.2f} x counting its lines ({lines:.1f} s)")
        print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def train(num_prompts: int, folder: str, resume: bool) -> None:
    """Train three steps with a checkpoint, or go on from it for one; print seconds and GB, as JSON."""
    from datasets import Dataset

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from conftest import build_trainer

    data = Dataset.from_dict(
        {
            "prompt": [f"say {index}:" for index in range(num_prompts)],
            "threshold": [index % 4 for index in range(num_prompts)],
        }
    )
    settings = {"max_steps": 4 if resume else 3, "save_strategy": "steps", "save_steps": 3, "train_dataset": data}
    start = time.perf_counter()
    trainer = build_trainer(f"{folder}/model", f"{folder}/{num_prompts}", **settings)
    built = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    trained = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"construction": built - start, "training": trained - built, "memory": memory}))


def measure_prompts(num_prompts: int, repeats: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from conftest import save_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder) / "model")
        results: dict[tuple, list[dict]] = {}
        for _ in range(repeats):
            for resume in (False, True):
                for size in (1000, num_prompts):
                    command = [sys.executable, __file__, "--prompts", str(size), "--folder", folder]
                    done = subprocess.run(
                        [*command, *["--resume"] * resume], capture_output=True, text=True, check=True
                    )
                    results.setdefault((resume, size), []).append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{num_prompts:,} prompts against 1,000: median difference (lowest - highest) of {repeats}")
    for resume in (False, True):
        for name, unit in (("construction", "s"), ("training", "s"), ("memory", "GB")):
            pairs = zip(results[resume, num_prompts], results[resume, 1000], strict=True)
            differences = sorted(large[name] - small[name] for large, small in pairs)
            what = f"{'resumed' if resume else 'begun'}: {name}"
            print(f"{what:24} {np.median(differences):+6.2f} {unit} ({differences[0]:+.2f} - {differences[-1]:+.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows of rollouts.jsonl")
    parser.add_argument("--prompts", type=int, help="prompts of the dataset")
    parser.add_argument("--repeats", type=int, default=3, help="of each training (3)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        train(args.prompts, args.folder, args.resume)
    else:
        if args.rows:
            measure_rows(args.rows)
        if args.prompts:
            measure_prompts(args.prompts, args.repeats)
