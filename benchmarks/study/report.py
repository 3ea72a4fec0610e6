"""
What the study found: tables, three figures, and the numbers behind them.

    python -m benchmarks.study.report [--config benchmarks/study/study.yaml --study_dir outputs/study]

Writes, by the name of the study's file, `study.json` (every number of every seed), `study.md` (the tables),
`study_pass_at_k.png`, `study_differences.png` and `study_runs.png`. It can be run while the study runs: what is there
is reported, with the number of seeds. A task that is not in the folder stays as `study.json` has it. Within a task
nothing is mixed: on another processor the same seed gives another base model, and a difference to GRPO is between runs
from the same one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import HfArgumentParser

from benchmarks.study.run import MANY_SAMPLES, NUM_SAMPLES, STUDY, read_study
from e3_trl import dotted_path
from e3_trl.evaluation.metrics import bootstrap_means, pass_at_k
from e3_trl.runs.figures import CURVES, draw_mean, smooth
from e3_trl.runs.report import write_json


KS = (1, 2, 4, 8, 16, 32, NUM_SAMPLES)
# What is compared with GRPO, seed by seed: name, heading, format of a value, and whether more is better.
MEASURES = {
    "pass@1": "pass@1",
    "pass@16": "pass@16",
    "pass@64": "pass@64",
    "hard pass@64": "pass@64, harder half",
    "families solved": "families solved",
    "all-wrong": "all-wrong, last quarter",
}
# What else methods are compared with, and what is in the names of those: what a change to E3 changes, and what E3 adds
# to MaxRL's advantage.
REFERENCES = {"e3": "e3_", "grpo_mean": "_mean"}
TITLES = {"rules": "(a) which rule", "chains": "(b) chains of actions", "sums": "(c) noisy sums"}
# Of the picture of whole runs, the README's.
IN_RUNS = {"grpo": "GRPO", "e3": "E3", "e3_spread_mean": "E3 with config_best"}
IN_FIGURE = ("grpo", "e3", "entropy_bonus_0.05", "temperature_1.6", "dapo", "grpo_mean", "e3_mean", "e3_spread_mean")


@dataclass
class Arguments:
    """
    Args:
        config (`str`): the study.
        study_dir (`str`): where the study has run.
        results_dir (`str`): for the numbers and the tables.
        figures_dir (`str`): for the figures.
    """

    config: str = str(STUDY)
    study_dir: str = "outputs/study"
    results_dir: str = "benchmarks/results"
    figures_dir: str = "docs"


def mean_pass_at_k(correct: np.ndarray, k: int, num_samples: int = NUM_SAMPLES) -> float:
    return float(np.mean([pass_at_k(num_samples, int(count), k) for count in correct]))


def measure(run: dict, base: dict, levels: list[str], goal: float | None) -> dict[str, float]:
    """
    The numbers of one run.

    Args:
        run (`dict`): what `run.py` wrote of it, or of the base model.
        base (`dict`): what it wrote of the base model.
        levels (`list[str]`): levels of the task, easiest first.
        goal (`float`, *optional*): held-out pass@1 that GRPO ends with on this seed.

    Returns:
        `dict` with `pass@k` at temperature 1 for each of `KS`; `own pass@k` at the run's last temperature; `easy
        pass@k` and `hard pass@k` of the two halves of the levels; `families solved` (share of families of which at
        least half of the samples are right); and of a run `all-wrong` (share of a batch's prompts, mean over the last
        quarter of the steps) and `all-wrong by eighth`, `entropy` (last quarter), `entropy error` (mean distance from
        its target, as a part of it, over the second half), `temperature` (last), `rollouts`, `tokens` and
        `rollouts to goal` and `tokens to goal` (sampled until the first evaluation that reaches it, NaN = never).
    """
    correct = np.array(run["correct"])
    level, family = np.array(base["level"]), np.array(base["family"])
    halves = {"easy": np.isin(level, levels[: len(levels) // 2]), "hard": np.isin(level, levels[len(levels) // 2 :])}
    numbers = {f"pass@{k}": mean_pass_at_k(correct, k) for k in KS}
    for name, part in halves.items():
        numbers |= {f"{name} pass@{k}": mean_pass_at_k(correct[part], k) for k in (1, 16, 64)}
    solved = [correct[family == one].mean() >= NUM_SAMPLES / 2 for one in np.unique(family)]
    numbers["families solved"] = float(np.mean(solved))
    if run is base:
        return numbers
    if "correct_at_own_temperature" in run:
        own = np.array(run["correct_at_own_temperature"])
        numbers |= {f"own pass@{k}": mean_pass_at_k(own, k) for k in (1, 16, 64)}
    log = {name: np.array(values) for name, values in run["log"].items()}
    steps = len(log["entropy"])
    numbers["all-wrong"] = float(np.nanmean(log["rollouts/all_wrong"][-steps // 4 :]))
    eighths = np.array_split(log["rollouts/all_wrong"], min(8, steps))
    numbers["all-wrong by eighth"] = [round(float(np.nanmean(part)), 4) for part in eighths]
    numbers["entropy"] = float(log["entropy"][-steps // 4 :].mean())
    if len(log["target_entropy"]):
        error = np.abs(log["entropy"][-steps // 2 :] / log["target_entropy"][-steps // 2 :] - 1)
        numbers["entropy error"] = float(error.mean())
    numbers["temperature"] = run["last_temperature"]
    numbers["seconds"] = run["seconds"]
    reached = [step for step, value in zip(run["evaluated_at"], run["pass@1"], strict=True) if goal and value >= goal]
    for name in ("rollouts", "tokens"):
        total = np.cumsum(run[name])
        numbers[name] = int(total[-1])
        numbers[f"{name} to goal"] = int(total[reached[0]]) if reached else None
    return numbers


def read_task(folder: Path, levels: list[str]) -> dict[str, dict[int, dict]]:
    """The numbers of every run of a task: by method, `base` first, and seed."""
    numbers: dict[str, dict[int, dict]] = {"base": {}}
    for seed_folder in sorted(folder.glob("seed*"), key=lambda path: int(path.name[4:])):
        seed = int(seed_folder.name[4:])
        runs = {path.stem: json.loads(path.read_text()) for path in seed_folder.glob("*.json")}
        if not {"base", "grpo"} <= runs.keys():
            continue
        base = runs.pop("base")
        numbers["base"][seed] = measure(base, base, levels, None)
        # Each evaluation has few samples: the last three together.
        goal = float(np.mean(runs["grpo"]["pass@1"][-3:]))
        for method, run in runs.items():
            numbers.setdefault(method, {})[seed] = measure(run, base, levels, goal)
        for path in (seed_folder / "many").glob("*.json"):
            correct = np.array(json.loads(path.read_text())["correct"])
            for k in (NUM_SAMPLES * 2, MANY_SAMPLES):
                numbers[path.stem][seed][f"pass@{k}"] = mean_pass_at_k(correct, k, MANY_SAMPLES)
    return numbers


def read_results(path: Path, task: str) -> dict[str, dict[int, dict]]:
    """[`read_task`]'s numbers as they were written to `study.json`; empty if they were not."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    return {
        method: {int(seed): numbers for seed, numbers in of_method.items()}
        for method, of_method in runs.get(task, {}).items()
    }


def compare(of_method: dict[int, dict], of_grpo: dict[int, dict]) -> dict[str, dict]:
    """Difference to GRPO over the seeds that both have: mean, and 95% interval (bootstrap over seeds)."""
    seeds = sorted(of_method.keys() & of_grpo.keys())
    differences = np.array([[of_method[s][name] - of_grpo[s][name] for name in MEASURES] for s in seeds])
    low, high = np.percentile(bootstrap_means(differences), [2.5, 97.5], axis=0)
    return {
        name: {"mean": float(differences[:, i].mean()), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(MEASURES)
    }


def cost(of_method: dict[int, dict], of_grpo: dict[int, dict]) -> dict[str, float | int | None]:
    """
    Medians over seeds, as parts of GRPO's on the same seed: `rollouts`, `tokens` and `seconds` of the whole run, and
    `rollouts to goal` and `tokens to goal` as parts of all that GRPO samples; `reached`: in how many seeds it was.
    """
    seeds = sorted(of_method.keys() & of_grpo.keys())
    result: dict = {
        name: float(np.median([of_method[s][name] / of_grpo[s][name] for s in seeds]))
        for name in ("rollouts", "tokens", "seconds")
    }
    result["reached"] = sum(of_method[s]["rollouts to goal"] is not None for s in seeds)
    for name in ("rollouts", "tokens"):
        parts = [(of_method[s][f"{name} to goal"] or np.inf) / of_grpo[s][name] for s in seeds]
        median = float(np.median(parts))
        result[f"{name} to goal"] = median if np.isfinite(median) else None
    return result


def mean(of_method: dict[int, dict], name: str) -> float | None:
    values = [numbers[name] for numbers in of_method.values() if name in numbers]
    return float(np.mean(values)) if values else None


def table(title: str, numbers: dict, comparison: dict, costs: dict) -> str:
    """Markdown: a row per method."""

    def cell(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    names = [f"pass@{k}" for k in (1, 16, 64)]
    names.append(f"pass@{MANY_SAMPLES}")
    heads = ["method", "seeds", *names, "hard pass@64", "families solved", "own pass@1", "own pass@64", "all-wrong"]
    heads += [
        "entropy",
        "its error",
        "temperature",
        "rollouts",
        "tokens",
        "time",
        "rollouts to goal",
        "tokens to goal",
    ]
    lines = [f"## {title}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, of_method in numbers.items():
        cells = [method, str(len(of_method))]
        for name in [*names, "hard pass@64", "families solved"]:
            text = cell(mean(of_method, name))
            if method in comparison and name in comparison[method]:
                interval = comparison[method][name]
                text += f" ({interval['low']:+.3f}, {interval['high']:+.3f})"
            cells.append(text)
        cells += [cell(mean(of_method, name)) for name in ("own pass@1", "own pass@64")]
        text = cell(mean(of_method, "all-wrong"))
        if method in comparison:
            interval = comparison[method]["all-wrong"]
            text += f" ({interval['low']:+.3f}, {interval['high']:+.3f})"
        cells += [text, *(cell(mean(of_method, name)) for name in ("entropy", "entropy error", "temperature"))]
        of_cost = costs.get(method, {})
        cells += [cell(of_cost.get(name), 2) for name in ("rollouts", "tokens", "seconds")]
        for name in ("rollouts to goal", "tokens to goal"):
            text = "never" if of_cost and of_cost[name] is None else cell(of_cost.get(name), 2)
            cells.append(text + (f" ({of_cost['reached']} of {len(of_method)})" if of_cost else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table_of_differences(reference: str, comparison: dict[str, dict]) -> str:
    """Markdown: each method against the reference on the same seed."""
    names = ["pass@1", "pass@16", "pass@64", "all-wrong"]
    lines = [f"| less {reference} on the same seed | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for method, intervals in comparison.items():
        cells = ["{mean:+.3f} ({low:+.3f}, {high:+.3f})".format(**intervals[name]) for name in names]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines) + "\n"


def draw_pass_at_k(tasks: dict[str, dict], path: Path) -> None:
    """A panel per task: means over seeds, bands of two standard errors."""
    figure = Figure(figsize=(4.2 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, numbers) in zip(panels, tasks.items(), strict=True):
        for index, method in enumerate(["base", *IN_FIGURE]):
            if method not in numbers:
                continue
            of_seeds = list(numbers[method].values())
            ks = [k for k in (*KS, NUM_SAMPLES * 2, MANY_SAMPLES) if all(f"pass@{k}" in one for one in of_seeds)]
            values = np.array([[one[f"pass@{k}"] for k in ks] for one in of_seeds])
            color, style = ("black", "--") if method == "base" else (f"C{index - 1}", "-")
            axes.plot(ks, values.mean(axis=0), style, color=color, marker="o", markersize=3, label=method)
            if len(values) > 1 and method in ("grpo", "e3"):
                error = 2 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
                middle = values.mean(axis=0)
                axes.fill_between(ks, middle - error, middle + error, color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        ticks = (*KS[::2], MANY_SAMPLES)
        axes.set_xticks(ticks, labels=ticks)
        axes.set(title=f"{TITLES.get(task, task)}, {len(numbers['grpo'])} seeds", xlabel="k")
    panels[0].set(ylabel="held-out pass@k at temperature 1")
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = min(6, 3 * len(tasks))
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=columns, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def draw_runs(folder: Path, numbers: dict[str, dict], path: Path) -> None:
    """Entropy, temperature and all-wrong prompts through the runs of a task, and pass@k: means and ranges of seeds."""
    methods = [method for method in IN_RUNS if method in numbers]
    logs = {
        method: [
            json.loads((folder / f"seed{seed}" / f"{method}.json").read_text())["log"] for seed in numbers[method]
        ]
        for method in methods
    }
    figure = Figure(figsize=(12, 7), layout="constrained")
    *panels, of_pass_at_k = figure.subplots(2, 2).ravel()
    for axes, name in zip(panels, ("entropy", "temperature", "all_wrong"), strict=True):
        (metric,), label = CURVES[name]
        for index, method in enumerate(methods):
            curves = [smooth(dict(enumerate(log[metric], start=1))) for log in logs[method]]
            draw_mean(axes, curves, IN_RUNS[method], f"C{index}")
        axes.set(xlabel="step", ylabel=label)
    for index, method in enumerate(["base", *methods]):
        curves = [{k: one[f"pass@{k}"] for k in KS} for one in numbers[method].values()]
        color = f"C{index - 1}" if index else "black"
        draw_mean(of_pass_at_k, curves, IN_RUNS.get(method, "base model"), color, marker="o", markersize=4)
    of_pass_at_k.set_xscale("log", base=2)
    of_pass_at_k.set_xticks(KS, labels=KS)
    of_pass_at_k.set(xlabel="k", ylabel="held-out pass@k at temperature 1")
    handles, labels = of_pass_at_k.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def draw_differences(task: str, numbers: dict[str, dict], comparison: dict[str, dict], path: Path) -> None:
    """Every method's difference to GRPO with its interval, a panel per measure."""
    names = {"pass@1": "pass@1", "pass@16": "pass@16", "pass@64": "pass@64", "all-wrong": "all-wrong (less is better)"}
    methods = sorted(comparison, key=lambda method: comparison[method]["pass@64"]["mean"])
    figure = Figure(figsize=(12, 1 + 0.3 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for place, method in enumerate(methods):
            interval = comparison[method][name]
            color = "C1" if method == "e3" else "C0"
            axes.plot([interval["low"], interval["high"]], [place, place], color=color, linewidth=1.5)
            axes.plot(interval["mean"], place, "o", color=color, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(methods)), labels=[f"{method} ({len(numbers[method])})" for method in methods])
    title = f"difference to GRPO on the same seed, 95% intervals, task {TITLES.get(task, task)} (number of seeds)"
    figure.supxlabel(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def main(args: Arguments) -> None:
    tasks, comparisons, costs, has_run = {}, {}, {}, {}
    to_others: dict[str, dict] = {reference: {} for reference in REFERENCES}
    study, name = read_study(args.config), Path(args.config).stem
    text = f"# The study ({name}.yaml)\n\nMade by `python -m benchmarks.study.report --config {args.config}`; what the"
    text += " columns mean stands at the end.\n\n"
    results, figures = Path(args.results_dir), Path(args.figures_dir)
    for task, of_task in study["tasks"].items():
        levels = list(dotted_path.load(of_task["task"]).levels)
        numbers = read_task(Path(args.study_dir) / task, levels)
        has_run[task] = "grpo" in numbers
        if not has_run[task]:
            numbers = read_results(results / f"{name}.json", task)
        if "grpo" not in numbers:
            continue
        tasks[task] = numbers = {m: numbers[m] for m in ["base", *study["methods"]] if m in numbers}
        grpo = numbers["grpo"]
        # An interval over fewer seeds would say nothing.
        compared = [m for m in numbers if m not in ("base", "grpo") and len(numbers[m].keys() & grpo.keys()) >= 3]
        comparisons[task] = {m: compare(numbers[m], grpo) for m in compared}
        costs[task] = {m: cost(numbers[m], grpo) for m in numbers if m != "base"}
        text += table(TITLES.get(task, task), numbers, comparisons[task], costs[task]) + "\n"
        for reference, part in REFERENCES.items():
            others = [m for m in compared if part in m and m != reference and reference in compared]
            to_others[reference][task] = {m: compare(numbers[m], numbers[reference]) for m in others}
            if others:
                text += table_of_differences(reference, to_others[reference][task]) + "\n"
    for folder in (results, figures):
        folder.mkdir(parents=True, exist_ok=True)
    differences = {"difference_to_grpo": comparisons}
    differences |= {f"difference_to_{reference}": of_tasks for reference, of_tasks in to_others.items()}
    write_json(results / f"{name}.json", {"runs": tasks, **differences, "cost": costs})
    (results / f"{name}.md").write_text(text + COLUMNS)
    draw_pass_at_k(tasks, figures / f"{name}_pass_at_k.png")
    first = next(iter(tasks))
    if has_run[first]:
        draw_runs(Path(args.study_dir) / first, tasks[first], figures / f"{name}_runs.png")
    if comparisons[first]:
        draw_differences(first, tasks[first], comparisons[first], figures / f"{name}_differences.png")
    print(text)


COLUMNS = """\
Means over seeds; in brackets the 95% interval of the difference to GRPO on the same seed (bootstrap over seeds; not of
fewer than three).

- pass@k: held-out problems, 64 samples each at temperature 1, for pass@256 of some methods 256; *hard*: the harder
  half of the levels; *own*: at the run's last temperature. *families solved*: share of families of which half of the
  samples are right.
- *all-wrong*: share of a batch's prompts (of those that were chosen) none of whose rollouts was right, last quarter
  of the run, at the run's own temperature. *entropy*: nats per token there; *its error*: mean distance from its
  target as a part of it, second half of the run.
- *rollouts*, *tokens*, *time*: of the whole run, as parts of GRPO's (medians; time with two runs at once, so rough).
- *rollouts to goal*, *tokens to goal*: sampled until held-out pass@1, evaluated with 4 samples as often as the study's
  file says, first reaches what GRPO ends with on that seed (its last three evaluations), as a part of all that GRPO
  samples: medians, and in how many seeds it does. GRPO's own is below 1 because it levels off, and because an
  evaluation is noisy.
"""


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
