"""
What the real model's study found: a table by rung and the differences to GRPO of each ladder, five transcripts before
and after, and a figure.

    python -m benchmarks.study.real_model_report [--study_dir outputs/real-model]

Every finished run is kept as it is in `benchmarks/results/real_model/`, the tables are `real_model.md` beside it. It
can be run while the study runs: what is there is reported, with the number of seeds.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from benchmarks.study.run import NUM_SAMPLES
from e3_trl.evaluation.metrics import pass_at_k


KS = (1, 8, 64)
NUM_RESAMPLES = 4_000


@dataclass
class Arguments:
    """
    Args:
        study_dir (`str`): where the study has run.
        results_dir (`str`): for the runs and `real_model.md`.
        figure (`str`): for the figure.
    """

    study_dir: str = "outputs/real-model"
    results_dir: str = "benchmarks/results"
    figure: str = "docs/real_model.png"


def keep(study: Path, results: Path) -> None:
    """Copy the result of every finished run."""
    for path in study.glob("*/seed*/*.json"):
        target = results / path.relative_to(study)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def read(results: Path) -> dict[str, dict[int, dict[str, dict]]]:
    """The runs, `base` among them, by ladder and seed; the ladders in the order of the names."""
    runs: dict = {}
    for path in sorted(results.glob("*/seed*/*.json")):
        seeds = runs.setdefault(path.parts[-3], {})
        seeds.setdefault(int(path.parent.name[4:]), {})[path.stem] = json.loads(path.read_text())
    return {
        ladder: {seed: of_seed for seed, of_seed in seeds.items() if "base" in of_seed}
        for ladder, seeds in runs.items()
    }


def pass_at(run: dict, k: int) -> np.ndarray:
    return np.array([pass_at_k(NUM_SAMPLES, count, k) for count in run["correct"]])


def last_quarter(run: dict, name: str) -> float:
    values = run["log"][name]
    return float(np.mean(values[-max(1, len(values) // 4) :]))


def to_goal(run: dict, grpo: dict) -> tuple[float, float]:
    """Rollouts and tokens until the held-out pass@1 that GRPO ends with, as parts of all of GRPO's; inf = never."""
    goal = np.mean(grpo["pass@1"][-2:])
    steps = [step for step, value in zip(run["evaluated_at"], run["pass@1"], strict=True) if value >= goal]
    if not steps:
        return np.inf, np.inf
    return tuple(sum(run[name][: steps[0] + 1]) / sum(grpo[name]) for name in ("rollouts", "tokens"))


def difference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Mean over seeds and problems, and a 95% interval: seeds are drawn, and of each its problems."""
    rng = np.random.default_rng(0)
    of_seeds = [run - grpo for run, grpo in pairs]
    means = [
        np.mean(
            [
                rng.choice(of_seeds[seed], len(of_seeds[seed])).mean()
                for seed in rng.integers(len(pairs), size=len(pairs))
            ]
        )
        for _ in range(NUM_RESAMPLES)
    ]
    return float(np.mean([one.mean() for one in of_seeds])), *np.percentile(means, [2.5, 97.5])


def methods_of(seeds: dict[int, dict[str, dict]]) -> list[str]:
    """Base and GRPO first."""
    names = {name for of_seed in seeds.values() for name in of_seed}
    return sorted(names, key=lambda name: (name != "base", name != "grpo", name))


def rungs(seeds: dict[int, dict[str, dict]]) -> str:
    """Markdown: pass@k and the share that writes it out, by rung."""
    levels = sorted({level for of_seed in seeds.values() for level in of_seed["base"]["level"]})
    lines = [f"| method | seeds | measure | {' | '.join([*levels, 'all'])} |", "|" + "---|" * (4 + len(levels))]
    for method in methods_of(seeds):
        of_method = {seed: of_seed[method] for seed, of_seed in seeds.items() if method in of_seed}
        level = np.concatenate([seeds[seed]["base"]["level"] for seed in of_method])
        measures = {f"pass@{k}": np.concatenate([pass_at(run, k) for run in of_method.values()]) for k in KS}
        written = np.concatenate([run["written_out"] for run in of_method.values()]) / NUM_SAMPLES
        for name, values in {**measures, "writes totals": written}.items():
            if values is written and not written.any():
                continue
            cells = [f"{values[level == one].mean():.3f}" for one in levels] + [f"{values.mean():.3f}"]
            lines.append(f"| {method} | {len(of_method)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(seeds: dict[int, dict[str, dict]]) -> str:
    """Markdown: each method less GRPO on the same seed, and what it was like in training."""
    heads = [*(f"pass@{k}" for k in KS), "hardest two rungs, pass@64", "all-wrong", "entropy", "temperature"]
    heads += ["rollouts to GRPO's end", "tokens", "minutes"]
    lines = [f"| method | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for method in methods_of(seeds)[1:]:
        paired = [
            (of_seed[method], of_seed.get("grpo"), of_seed["base"]) for of_seed in seeds.values() if method in of_seed
        ]
        runs = [run for run, _, _ in paired]
        paired = [one for one in paired if one[1] is not None]
        cells = []
        if method != "grpo" and paired:
            hard = [np.isin(base["level"], sorted(set(base["level"]))[-2:]) for _, _, base in paired]
            for k in KS:
                cells.append(difference([(pass_at(run, k), pass_at(grpo, k)) for run, grpo, _ in paired]))
            of_hard = [
                (pass_at(run, 64)[part], pass_at(grpo, 64)[part])
                for (run, grpo, _), part in zip(paired, hard, strict=True)
            ]
            cells = ["{:+.3f} ({:+.3f}, {:+.3f})".format(*one) for one in [*cells, difference(of_hard)]]
        cells = cells or [""] * (len(KS) + 1)
        for name in ("rollouts/all_wrong", "entropy"):
            cells.append(f"{np.mean([last_quarter(run, name) for run in runs]):.3f}")
        cells.append(f"{np.mean([run['last_temperature'] for run in runs]):.2f}")
        goals = np.array([to_goal(run, grpo) for run, grpo, _ in paired]).reshape(-1, 2)
        reached = int(np.isfinite(goals[:, 0]).sum())
        for column in goals.T:
            median = np.median(column) if len(column) else np.inf
            cells.append(
                f"{median:.2f} ({reached} of {len(goals)})"
                if np.isfinite(median)
                else f"never ({reached} of {len(goals)})"
            )
        cells.append(f"{np.mean([run['seconds'] for run in runs]) / 60:.0f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def transcripts(of_seed: dict[str, dict]) -> str:
    """One problem a rung, the first completion of each method."""
    lines = ["| problem | right | " + " | ".join(methods_of({0: of_seed})) + " |"]
    lines.append("|" + "---|" * (2 + len(of_seed)))
    for index, one in enumerate(of_seed["base"]["examples"]):
        texts = [of_seed[method]["examples"][index]["completions"][0] for method in methods_of({0: of_seed})]
        cells = [one["prompt"][-1]["content"], one["solution"], *texts]
        lines.append("| " + " | ".join(cell.replace("\n", " / ").replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, dict[int, dict[str, dict]]], path: Path) -> None:
    """A row for each ladder: held-out pass@1 in training, all-wrong prompts, entropy; means over seeds."""
    figure = Figure(figsize=(12, 3.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 3, squeeze=False)
    for row, (ladder, seeds) in zip(panels, runs.items(), strict=True):
        for index, method in enumerate(methods_of(seeds)[1:]):
            of_method = [of_seed[method] for of_seed in seeds.values() if method in of_seed]
            row[0].plot(
                of_method[0]["evaluated_at"], np.mean([run["pass@1"] for run in of_method], axis=0), "o-", label=method
            )
            for axes, name in zip(row[1:], ("rollouts/all_wrong", "entropy"), strict=True):
                values = np.mean([run["log"][name] for run in of_method], axis=0)
                smooth = np.convolve(values, np.ones(8) / 8, mode="valid")
                axes.plot(np.arange(len(smooth)) + 8, smooth, color=f"C{index}")
        titles = ("held-out pass@1", "share of prompts all wrong", "entropy")
        for axes, title in zip(row, titles, strict=True):
            axes.set(title=f"{ladder}: {title}", xlabel="step")
        row[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(args: Arguments) -> None:
    results = Path(args.results_dir) / "real_model"
    keep(Path(args.study_dir), results)
    runs = {ladder: seeds for ladder, seeds in read(results).items() if any(len(one) > 1 for one in seeds.values())}
    if not runs:
        raise FileNotFoundError(f"{args.study_dir} has no finished run of the study.")
    text = "# A pretrained model\n\nMade by `python -m benchmarks.study.real_model_report`.\n"
    for ladder, seeds in runs.items():
        text += f"\n## {ladder}\n\n{rungs(seeds)}\n\n{differences(seeds)}\n\n{transcripts(seeds[min(seeds)])}\n"
    (Path(args.results_dir) / "real_model.md").write_text(text + COLUMNS)
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    draw(runs, Path(args.figure))
    print(text)


COLUMNS = """
Held-out problems, 64 samples each at temperature 1. Differences are to GRPO on the same seed and problems, with a 95%
interval (bootstrap over seeds and their problems). *all-wrong*, *entropy*: last quarter of the steps, at
the run's own temperature. *rollouts to GRPO's end*, *tokens*: sampled until the held-out pass@1 (2 samples a problem,
every 20 steps) is what GRPO ends with (its last two evaluations), as a part of all of GRPO's: medians, and in how many
seeds it was reached. *minutes*: of training alone, with another run beside it. Transcripts: the first seed's, one
problem a rung, the first completion of each.
"""


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
