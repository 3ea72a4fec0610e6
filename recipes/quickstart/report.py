"""
What the quickstart did: pass@1 and pass@16 before and after on held-out problems, and figures of the run.

    python -m recipes.quickstart.report outputs/quickstart [outputs/quickstart-grpo]

Adds pass@k to the `report.json` of each folder, and the comparison and `figures/` to the first.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from e3_trl import pass_at_k
from e3_trl.runs.describe import REPORT_FILE, read_report, write_json
from e3_trl.runs.figures import draw_runs
from e3_trl.runs.publishing import FIGURES
from recipes.quickstart.task import LEVELS, exact_answer_reward


BASE = Path("outputs/quickstart-base")
NUM_SAMPLES = 16
KS = (1, 2, 4, 8, NUM_SAMPLES)
BATCH_SIZE = 320
BENCHMARK = "sums modulo 10"


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


def evaluate(folder: Path, problems: list[dict]) -> tuple[dict, dict]:
    """pass@1 and pass@16 per level and overall, and pass@k overall for k = 1, 2, 4, 8 and 16."""
    correct = count_correct(folder, problems)
    values = defaultdict(list)
    for problem, num_correct in zip(problems, correct, strict=True):
        for k in KS:
            for name in (str(problem["level"]), "all"):
                values[k, name].append(pass_at_k(NUM_SAMPLES, num_correct, k))
    mean = {key: sum(v) / len(v) for key, v in values.items()}
    levels = {f"pass@{k}": {name: mean[k, name] for name in [*map(str, LEVELS), "all"]} for k in (1, NUM_SAMPLES)}
    return levels, {BENCHMARK: {"pass@k": {str(k): mean[k, "all"] for k in KS}}}


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


def main(folders: list[str]) -> None:
    runs = {Path(folder).name: Path(folder) for folder in folders}
    problems = [json.loads(line) for line in (BASE / "test.jsonl").read_text().splitlines()]
    results = {"before": evaluate(BASE, problems)[0]}
    for name, folder in runs.items():
        results[name], benchmarks = evaluate(folder, problems)
        write_json(folder / REPORT_FILE, {**read_report(folder), "benchmarks": benchmarks})
    print_table(results)
    first = Path(folders[0])
    counts = {"num_problems": len(problems), "num_samples": NUM_SAMPLES}
    write_json(first / REPORT_FILE, {**read_report(first), **counts, **results})
    draw_runs(folders, first / FIGURES)
    print(f"Written to {first}: report.json, figures/")


if __name__ == "__main__":
    main(sys.argv[1:] or ["outputs/quickstart"])
