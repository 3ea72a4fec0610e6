"""
What E3 itself costs: `make benchmark`.

Budgets of a batch of 4,096 prompts, ranks of 1,000,000 prompts, and the share of a training step of 512 rows that is
spent in E3's code. The model is tiny, so that a step is short and the share an upper bound for larger ones. What other
micro-batches cost and save is in `optimizer.py`.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from trl import GRPOTrainer

from e3_trl import DifficultyTracker, E3GRPOTrainer, RolloutBudgetSampler, TemperatureCallback, allocate_rollouts


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import build_trainer, make_dataset, save_tiny_model


def times(function, repeats: int) -> tuple[float, float, float]:
    """Median, fastest and slowest of `repeats` calls in milliseconds."""
    measured = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        measured.append(1e3 * (time.perf_counter() - start))
    return statistics.median(measured), min(measured), max(measured)


def clocked(owner: type, name: str, clock: dict[str, float]) -> None:
    """Add the time spent in `owner.name` to `clock`."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            clock[f"{owner.__name__}.{name}"] += time.perf_counter() - start

    setattr(owner, name, wrapper)


def step_shares(steps: int) -> list[float]:
    """Share of each step that is spent in E3's code: its overrides less what they call in TRL, budgets, callback."""
    hooks = ["_calculate_rewards", "_generate", "_generate_and_score_completions", "_compute_loss"]
    of_trl = [*hooks, "_get_per_token_logps_and_entropies"]  # the forward pass, which comes before TRL's loss here
    clock: dict[str, float] = defaultdict(float)
    # TRL's side first: its clock has to lie inside of E3's.
    for owner, names in {
        GRPOTrainer: of_trl,
        E3GRPOTrainer: hooks,
        RolloutBudgetSampler: ["rows"],
        DifficultyTracker: ["update"],
        TemperatureCallback: ["on_step_end"],
    }.items():
        for name in names:
            clocked(owner, name, clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            save_tiny_model(folder),
            f"{folder}/run",
            train_dataset=make_dataset(128),
            per_device_train_batch_size=512,
            num_generations=8,
            num_generations_min=4,
            num_generations_max=12,
            max_completion_length=32,
            max_steps=steps,
            micro_batching="none",
        )
        shares, last = [], {"time": time.perf_counter(), "e3": 0.0}
        training_step = trainer.training_step

        def spy(*args):
            loss = training_step(*args)
            spent = sum(clock.values()) - 2 * sum(clock[f"GRPOTrainer.{name}"] for name in of_trl)
            now = time.perf_counter()
            shares.append((spent - last["e3"]) / (now - last["time"]))
            last.update(time=now, e3=spent)
            return loss

        trainer.training_step = spy
        trainer.train()
    return shares[2:]


if __name__ == "__main__":
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    difficulty = rng.integers(1, 1000, 4096) / 1000
    tracker = DifficultyTracker(1_000_000)
    tracker.num_rollouts[:] = rng.integers(8, 37, 1_000_000)
    tracker.reward_sum[:] = rng.binomial(tracker.num_rollouts.astype(int), 0.5)
    print("                                        median (fastest - slowest)")
    budget = times(lambda: allocate_rollouts(difficulty, 8, 4, 12), repeats=200)
    print("budgets of 4,096 prompts           {:8.3f} ms ({:.3f} - {:.3f})".format(*budget))
    print("ranks of 1,000,000 prompts         {:8.1f} ms ({:.1f} - {:.1f})".format(*times(tracker.update, repeats=20)))
    shares = [100 * share for share in step_shares(40)]
    spread = f"({min(shares):.2f} - {max(shares):.2f})"
    print(f"E3's share of a step of 512 rows   {statistics.median(shares):8.2f} %  {spread}")
