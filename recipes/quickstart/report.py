"""
What the quickstart did: pass@1 and pass@16 before and after on held-out problems, and figures of the run.

    python -m recipes.quickstart.report outputs/quickstart [outputs/quickstart-grpo]

Writes `report.json` and `figures/` to the first folder.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from e3_trl import pass_at_k, read_rollouts
from recipes.quickstart.task import LEVELS, exact_answer_reward


matplotlib.use("Agg")
import matplotlib.pyplot as plt


BASE = Path("outputs/quickstart-base")
NUM_SAMPLES = 16
BATCH_SIZE = 320


@torch.inference_mode()
def count_correct(folder: Path, problems: list[dict]) -> list[int]:
    """Right answers among `NUM_SAMPLES` samples of each problem at temperature 1."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [problem for problem in problems for _ in range(NUM_SAMPLES)]
    rewards = []
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc=f"Evaluating {folder}"):
        batch = rows[start : start + BATCH_SIZE]
        inputs = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True)
        tokens = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=6 * max(row["level"] for row in batch)
        )
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        rewards += exact_answer_reward(texts, [row["answer"] for row in batch])
    return [int(sum(rewards[i : i + NUM_SAMPLES])) for i in range(0, len(rewards), NUM_SAMPLES)]


def evaluate(folder: Path, problems: list[dict]) -> dict:
    """pass@1 and pass@16 per level and overall."""
    correct = count_correct(folder, problems)
    result = {}
    for k in (1, NUM_SAMPLES):
        values = defaultdict(list)
        for problem, num_correct in zip(problems, correct, strict=True):
            for name in (str(problem["level"]), "all"):
                values[name].append(pass_at_k(NUM_SAMPLES, num_correct, k))
        result[f"pass@{k}"] = {name: sum(v) / len(v) for name, v in values.items()}
    return result


def write_json(path: Path, content) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def print_table(results: dict[str, dict]) -> None:
    table = Table(title="Held-out problems: share solved")
    table.add_column("digits")
    for k in (1, NUM_SAMPLES):
        for name in results:
            table.add_column(f"pass@{k}\n{name}", justify="right")
    for level in [*map(str, LEVELS), "all"]:
        cells = [f"{result[f'pass@{k}'][level]:.2f}" for k in (1, NUM_SAMPLES) for result in results.values()]
        table.add_row(level, *cells, style="bold" if level == "all" else None)
    Console(width=100).print(table)


def draw(runs: dict[str, Path], folder: Path) -> None:
    """The figures, every run in each of them."""
    folder.mkdir(parents=True, exist_ok=True)
    histories = {}
    for name, run in runs.items():
        log = json.loads((run / "trainer_state.json").read_text())["log_history"]
        histories[name] = [entry for entry in log if "loss" in entry]
    last = next(iter(histories.values()))[-1]
    steps_per_pass = round(last["step"] / last["epoch"])
    targets = [entry for entry in next(iter(histories.values())) if "target_entropy" in entry]
    falling = (entry["step"] for entry in targets if entry["target_entropy"] < targets[0]["target_entropy"])
    annealing = next(falling, None)
    figures = {
        "entropy": ("entropy", "mean token entropy (nats)"),
        "temperature": ("temperature", "sampling temperature"),
        "all_wrong": ("rollouts/all_wrong", "share of prompts with no right rollout"),
        "reward": ("reward", "mean reward"),
    }
    for file_name, (key, label) in figures.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for name, history in histories.items():
            values = [entry[key] for entry in history]
            # A batch has 16 prompts, so single steps are noisy: the line is the mean of up to 9 of them.
            mean = [sum(part) / len(part) for part in (values[max(0, i - 4) : i + 5] for i in range(len(values)))]
            line = axes.plot([entry["step"] for entry in history], mean, label=name)[0]
            axes.plot([entry["step"] for entry in history], values, color=line.get_color(), alpha=0.2, linewidth=0.8)
            if key == "entropy" and "target_entropy" in history[0]:
                target = [entry["target_entropy"] for entry in history]
                axes.plot([entry["step"] for entry in history], target, "k--", linewidth=1, label=f"target of {name}")
        for step in range(steps_per_pass, last["step"], steps_per_pass):
            axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        if annealing is not None:
            axes.axvline(annealing, color="red", linewidth=0.8, label="annealing begins")
        axes.set(xlabel="step (dotted: a new pass over the data)", ylabel=label)
        axes.legend()
        figure.savefig(folder / f"{file_name}.png", dpi=120)
        plt.close(figure)
    draw_budgets(next(iter(runs.values())), steps_per_pass, folder / "budgets.png")


def draw_budgets(run: Path, steps_per_pass: int, path: Path) -> None:
    """Rollouts by difficulty, one panel per pass."""
    by_pass = defaultdict(list)
    for row in read_rollouts(run):
        by_pass[(row["step"] - 1) // steps_per_pass].append(row)
    size = (3 * len(by_pass), 3.4)
    figure, panels = plt.subplots(1, len(by_pass), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for (index, rows), axes in zip(sorted(by_pass.items()), panels[0], strict=True):
        difficulty = [0.5 if row["difficulty"] is None else row["difficulty"] for row in rows]
        axes.scatter(difficulty, [row["rollouts"] for row in rows], s=8, alpha=0.4)
        axes.set(title=f"pass {index + 1}", xlim=(0, 1.02), xlabel="not ranked yet" if index == 0 else "difficulty k")
    panels[0, 0].set(ylabel="rollouts of a prompt", ylim=(0, None))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(folders: list[str]) -> None:
    runs = {Path(folder).name: Path(folder) for folder in folders}
    problems = [json.loads(line) for line in (BASE / "test.jsonl").read_text().splitlines()]
    results = {"before": evaluate(BASE, problems)}
    results |= {name: evaluate(folder, problems) for name, folder in runs.items()}
    print_table(results)
    first = Path(folders[0])
    draw(runs, first / "figures")
    write_json(first / "report.json", {"num_problems": len(problems), "num_samples": NUM_SAMPLES, **results})
    print(f"Written to {first}: report.json, figures/")


if __name__ == "__main__":
    main(sys.argv[1:] or ["outputs/quickstart"])
