"""
What the quickstart did: pass@1 and pass@64 before and after on held-out problems, what the model answers to
one of each level, and figures of the run.

    python -m recipes.quickstart.report outputs/quickstart [outputs/quickstart-grpo ...]

Adds pass@k to the `report.json` of each folder and of the model that they began with, and the comparison and
`figures/` to the first.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from e3_trl.evaluation.metrics import pass_at_k_table
from e3_trl.runs.figures import draw_runs
from e3_trl.runs.report import read_report, read_settings, write_json
from e3_trl.runs.run_folder import FIGURES, REPORT_FILE
from recipes.quickstart.task import RuleTask


NUM_SAMPLES = 64
KS = (1, 2, 4, 8, 16, 32, NUM_SAMPLES)
IN_TABLE = (1, NUM_SAMPLES)
BATCH_SIZE = 1920
BENCHMARK = "held-out problems"


@torch.inference_mode()
def sample(
    folder: Path, problems: list[dict], num_samples: int, temperature: float, max_new_tokens: int
) -> list[tuple[dict, list[str]]]:
    """`num_samples` completions of each problem."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [problem["prompt"] for problem in problems for _ in range(num_samples)]
    texts = []
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc=f"Evaluating {folder}"):
        inputs = tokenizer(rows[start : start + BATCH_SIZE], return_tensors="pt", padding=True)
        tokens = model.generate(
            **inputs, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=max_new_tokens
        )
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    return [
        (problem, texts[index * num_samples : (index + 1) * num_samples]) for index, problem in enumerate(problems)
    ]


def evaluate(folder: Path, problems: list[dict]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """
    pass@k at temperature 1: by k, over the problems of each level and over all; into the folder's report, too. And the
    most frequent answers to the first problem of each level.
    """
    samples = sample(folder, problems, NUM_SAMPLES, 1.0, RuleTask.max_completion_length)
    rewards = [RuleTask.reward(texts, [problem["answer"]] * NUM_SAMPLES) for problem, texts in samples]
    table = pass_at_k_table(rewards, KS)
    level = np.array([problem["level"] for problem in problems])
    parts = {**{name: level == name for name in RuleTask.levels}, "all": np.full(len(level), True)}
    result = {
        f"pass@{k}": {name: float(values[part].mean()) for name, part in parts.items()}
        for k, values in zip(KS, table.T, strict=True)
    }
    curve = {str(k): result[f"pass@{k}"]["all"] for k in KS}
    write_json(folder / REPORT_FILE, {**read_report(folder), "benchmarks": {BENCHMARK: {"pass@k": curve}}})
    first = {problem["level"]: row for row, (problem, _) in reversed(list(enumerate(samples)))}
    return result, {level: frequent(*samples[row]) for level, row in first.items()}


def frequent(problem: dict, texts: list[str]) -> str:
    """The two most frequent completions and how often each came, right ones with a tick."""
    counts = Counter(texts).most_common(2)
    ticks = RuleTask.reward([text for text, _ in counts], [problem["answer"]] * len(counts))
    return ", ".join(
        f"{text}{' ✓' if tick else ''} {count}x" for (text, count), tick in zip(counts, ticks, strict=True)
    )


def print_answers(problems: list[dict], answers: dict[str, dict[str, str]]) -> None:
    table = Table(title=f"Most frequent answers of {NUM_SAMPLES}")
    for name in ("right rule\nfirst tried", "prompt", *answers):
        table.add_column(name)
    for level in RuleTask.levels:
        prompt = next(problem["prompt"] for problem in problems if problem["level"] == level)
        table.add_row(level, prompt, *(of_levels[level] for of_levels in answers.values()))
    Console(width=100).print(table)


def print_table(results: dict[str, dict]) -> None:
    table = Table(title="Held-out problems: share solved")
    table.add_column("right rule\nfirst tried")
    for k in IN_TABLE:
        for name in results:
            table.add_column(f"pass@{k}\n{name}", justify="right")
    for level in [*RuleTask.levels, "all"]:
        cells = [f"{result[f'pass@{k}'][level]:.2f}" for k in IN_TABLE for result in results.values()]
        table.add_row(level, *cells, style="bold" if level == "all" else None)
    Console(width=100).print(table)


def main(folders: list[str]) -> None:
    first = Path(folders[0])
    base = Path(read_settings(first)["model_name_or_path"])
    problems = [json.loads(line) for line in (base / "test.jsonl").read_text().splitlines()]
    results, answers = {}, {}
    results["before"], answers["before"] = evaluate(base, problems)
    for folder in folders:
        name = Path(folder).name.removeprefix("quickstart-")  # short: a table has two columns of each
        results[name], answers[name] = evaluate(Path(folder), problems)
    print_table(results)
    print_answers(problems, answers)
    counts = {"num_problems": len(problems), "num_samples": NUM_SAMPLES}
    write_json(first / REPORT_FILE, {**read_report(first), **counts, **results, "answers": answers})
    draw_runs([*folders, base], first / FIGURES)
    print(f"Written to {first}: report.json, figures/")


if __name__ == "__main__":
    main(sys.argv[1:] or ["outputs/quickstart"])
