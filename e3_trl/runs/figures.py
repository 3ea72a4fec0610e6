"""Figures of the paper, from run folders: entropy, temperature, validation accuracy, pass@k, all-wrong prompts."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..method.temperature import EXACT_TEMPERATURES, TemperatureSchedule, exact_temperature, mean_entropy
from .report import read_benchmarks, read_log, read_report, read_settings
from .rollout_log import read_rollout_columns
from .run_folder import ROLLOUTS_FILE


# What may differ between two runs of one method.
IDENTITY = {"seed", "data_seed", "output_dir", "run_name", "hub_model_id", "push_to_hub", "resume_from_checkpoint"}
# Metrics of each figure, the first that there is: patterns, whose group is the name of an evaluation set.
CURVES = {
    "entropy": (["entropy"], "mean token entropy (nats)"),
    "temperature": (["temperature"], "sampling temperature"),
    "all_wrong": (["rollouts/all_wrong"], "share of prompts with no right rollout"),
    "reward": (["reward"], "mean reward"),
    "validation": (
        [r"eval_(?:(.+)_)?pass@1", r"eval_(?:(.+)_)?rewards/.+/mean", "eval_reward"],
        "validation accuracy",
    ),
}
WINDOW = 9
# Of evaluation sets.
LINES = ("-", "--", ":", "-.")


@dataclass
class Run:
    """
    A run folder, or the report of an evaluation.

    Attributes:
        path (`Path`): the folder or file.
        settings (`dict` or `None`): its training arguments.
        log (`list[dict]`): its log history.
    """

    path: Path
    settings: dict | None
    log: list[dict]

    @classmethod
    def read(cls, path: str | Path) -> "Run":
        """Read a run; `ValueError` if there is nothing to draw."""
        path = Path(path).resolve()
        if not path.exists():
            raise ValueError(f"{path} is not there. Give run folders, or reports of `e3-trl evaluate`.")
        run = cls(path, read_settings(path), read_log(path)) if path.is_dir() else cls(path, None, [])
        if not run.log and not read_benchmarks(path):
            raise ValueError(f"{path} holds neither a trainer_state.json nor an evaluation. Give a run's output_dir.")
        return run

    @property
    def name(self) -> str:
        """Of the folder or file, or the method that an evaluation names."""
        if not self.log and (method := read_report(self.path).get("method")):
            return method
        return self.path.name if self.path.is_dir() else self.path.stem

    @property
    def method(self) -> tuple:
        """Equal for runs that differ in nothing but the seed: by their settings, else by their names."""
        if self.settings is None:
            return str(self.path.parent), re.sub(r"[-_]seed\d+$", "", self.name)
        return tuple(sorted((name, str(value)) for name, value in self.settings.items() if name not in IDENTITY))

    def curve(self, pattern: str) -> dict[int, float]:
        """Values of the first metric whose name is `pattern` (a regular expression), by step."""
        return next(iter(self.curves(pattern).values()), {})

    def curves(self, pattern: str) -> dict[str | None, dict[int, float]]:
        """As [`Run.curve`], for each evaluation set, the pattern's group. `None` = there is one without a name."""
        names: dict[str | None, str] = {}
        for name in dict.fromkeys(name for entry in self.log for name in entry):
            if match := re.fullmatch(pattern, name):
                names.setdefault(next(iter(match.groups()), None), name)
        return {
            of_set: {entry["step"]: entry[name] for entry in self.log if name in entry}
            for of_set, name in names.items()
        }

    @property
    def steps_per_pass(self) -> int | None:
        """Optimizer steps in a pass over the data."""
        entry = next((entry for entry in reversed(self.log) if entry.get("epoch")), None)
        return None if entry is None else max(1, round(entry["step"] / entry["epoch"]))

    @property
    def annealing_step(self) -> int | None:
        """The step at which the target entropy begins to fall."""
        target = list(self.curve("target_entropy").items())
        # A mean over several steps is rounded.
        return next((step for step, value in target if value < target[0][1] * (1 - 1e-6)), None)


def group_runs(paths: list[str | Path]) -> dict[str, list[Run]]:
    """Runs by method, in the order given; a method is called by what its runs' names have in common."""
    methods: dict[tuple, list[Run]] = defaultdict(list)
    for path in paths:
        run = Run.read(path)
        methods[run.method].append(run)
    named: dict[str, list[Run]] = {}
    for runs in methods.values():
        name = os.path.commonprefix([run.name for run in runs])
        if len(runs) > 1:
            name = re.sub(r"[-_]?(seed)?\d*$", "", name) if name not in [run.name for run in runs] else name
            name = f"{name or runs[0].name} ({len(runs)} seeds)"
        while name in named:
            name += "'"
        named[name] = runs
    return named


def draw_runs(paths: list[str | Path], folder: str | Path) -> list[Path]:
    """
    Write what [`make_figures`] draws as PNG.

    Args:
        paths (`list`): run folders, or reports of `e3-trl evaluate`.
        folder (`str` or `Path`): where to write; a figure of an earlier call that is not drawn now is removed.

    Returns:
        `list[Path]`: the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in make_figures(paths).items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def make_figures(paths: list[str | Path]) -> dict[str, Figure | None]:
    """
    Draw what there is to draw: entropy with its target (the paper's Figure 1), validation accuracy (3), temperature
    (4), pass@k (5, 6), share of all-wrong prompts (7), its difference between the first method and each other (8),
    reward, and the budgets of the first run.

    Lines are means over up to 9 logged steps, and over the seeds of a method; bands reach from the lowest seed to the
    highest. Of validation there is a line for each evaluation set. Red lines: annealing begins (solid), a new pass
    begins (dotted).

    Args:
        paths (`list`): run folders, or reports of `e3-trl evaluate`.

    Returns:
        `dict`: figures by name, `None` = there is nothing to draw.
    """
    methods = group_runs(paths)
    figures = {name: _draw_curves(methods, name) for name in CURVES}
    figures["all_wrong_difference"] = _draw_difference(methods)
    figures["pass_at_k"] = _draw_pass_at_k(methods)
    figures["budgets"] = _draw_budgets(next(iter(methods.values()))[0])
    return figures


def smooth(curve: dict[int, float]) -> dict[int, float]:
    """Centred means of up to `WINDOW` values: a batch has few prompts, so single steps are noisy."""
    values = np.array(list(curve.values()), dtype=float)
    half = WINDOW // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return {
        step: float(np.nanmean(part)) if np.isfinite(part).any() else np.nan
        for step, part in zip(curve, parts, strict=True)
    }


def draw_mean(axes: Axes, curves: list[dict], label: str, color: str, **style) -> None:
    """Mean and range of curves, at the positions that all of them have."""
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[x] for x in common] for curve in curves])  # (runs, positions)
    axes.plot(common, values.mean(axis=0), color=color, label=label, **style)
    if len(curves) > 1:
        axes.fill_between(common, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)


def _finish(figure: Figure, axes: Axes, methods: dict[str, list[Run]]) -> None:
    """Red lines, and a legend where no curve is."""
    runs = [run for group in methods.values() for run in group if run.log]
    last = max(run.log[-1]["step"] for run in runs)
    passes = {
        step for run in runs if run.steps_per_pass for step in range(run.steps_per_pass, last, run.steps_per_pass)
    }
    for label, steps, style in (
        ("a new pass begins", passes, ":"),
        ("annealing begins", {run.annealing_step for run in runs} - {None}, "-"),
    ):
        for index, step in enumerate(sorted(steps)):
            axes.axvline(
                step, color="red", linewidth=0.8, linestyle=style, label=label if index == 0 else "_", zorder=1
            )
    axes.set(xlabel="step")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)


def _draw_curves(methods: dict[str, list[Run]], name: str) -> Figure | None:
    patterns, label = CURVES[name]
    # The first metric that any run has, so that all lines show the same.
    for pattern in patterns:
        curves = {method: [c for run in runs if (c := run.curves(pattern))] for method, runs in methods.items()}
        if any(curves.values()):
            break
    else:
        return None
    sets = list(dict.fromkeys(of_set for of_runs in curves.values() for of_run in of_runs for of_set in of_run))
    figure = Figure(figsize=(7, 4.3), layout="constrained")
    axes = figure.subplots()
    is_validation = name == "validation"
    for index, method in enumerate(curves):
        color = f"C{index}"
        for of_set, line in zip(sets, cycle(LINES), strict=False):
            of_runs = [of_run[of_set] for of_run in curves[method] if of_set in of_run]
            if not of_runs:
                continue
            if len(of_runs) == 1 and not is_validation:
                axes.plot(of_runs[0].keys(), of_runs[0].values(), color=color, alpha=0.2, linewidth=0.8)
            draw_mean(
                axes,
                of_runs if is_validation else [smooth(curve) for curve in of_runs],
                f"{method}, {of_set}" if of_set is not None and len(sets) > 1 else method,
                color,
                marker="o" if is_validation else None,
                markersize=4,
                linestyle=line,
            )
        targets = [target for run in methods[method] if (target := run.curve("target_entropy"))]
        if name == "entropy" and targets:
            draw_mean(axes, targets, f"target of {method}", color, linestyle="--", linewidth=1)
    axes.set(ylabel=label)
    _finish(figure, axes, methods)
    return figure


def _draw_difference(methods: dict[str, list[Run]]) -> Figure | None:
    """Same seeds are compared with each other where there are any, else every run with every other."""
    with_curve = {
        method: [(run, smooth(curve)) for run in runs if (curve := run.curve("rollouts/all_wrong"))]
        for method, runs in methods.items()
    }
    with_curve = {method: runs for method, runs in with_curve.items() if runs}
    if len(with_curve) < 2:
        return None
    (first, first_runs), *others = with_curve.items()
    figure = Figure(figsize=(7, 4.3), layout="constrained")
    axes = figure.subplots()
    for index, (method, runs) in enumerate(others, start=1):
        pairs = [(a, b) for a in first_runs for b in runs]
        seeds = {id(run): (run.settings or {}).get("seed") for run, _ in first_runs + runs}
        same_seed = [(a, b) for a, b in pairs if seeds[id(a[0])] is not None and seeds[id(a[0])] == seeds[id(b[0])]]
        differences = [
            {step: ours[step] - theirs[step] for step in ours if step in theirs}
            for (_, ours), (_, theirs) in same_seed or pairs
        ]
        draw_mean(axes, differences, f"{first} - {method}", f"C{index}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="difference in the share of prompts\nwith no right rollout")
    _finish(figure, axes, methods)
    return figure


def _draw_pass_at_k(methods: dict[str, list[Run]]) -> Figure | None:
    """A panel per benchmark."""
    results = {method: [read_benchmarks(run.path) for run in runs] for method, runs in methods.items()}
    names = list(dict.fromkeys(name for group in results.values() for result in group for name in result))
    if not names:
        return None
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.8 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for name, axes in zip(names, panels, strict=False):
        for index, (method, group) in enumerate(results.items()):
            curves = [curve for result in group for curve in result.get(name, [])]
            if curves:
                draw_mean(axes, curves, method, f"C{index}", marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        ticks = sorted({round(x) for line in axes.lines for x in line.get_xdata()})
        axes.set_xticks(ticks, labels=ticks)
        axes.set(title=name, xlabel="k", ylabel="pass@k")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize="small", frameon=False
    )
    return figure


def _draw_budgets(run: Run) -> Figure | None:
    """Rollouts by difficulty, a panel per pass: of up to 8 passes, and of 2,000 prompts of each."""
    if not (run.path / ROLLOUTS_FILE).is_file():
        return None
    rows = read_rollout_columns(run.path)
    passes = rows["pass"]
    if not len(passes) or np.isnan(passes).any():  # no rows, or those of an earlier version
        return None
    shown = np.unique(passes)
    shown = shown[np.unique(np.linspace(0, len(shown) - 1, 8).round().astype(int))]
    figure = Figure(figsize=(3 * len(shown), 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for number, axes in zip(shown, panels, strict=True):
        places = np.flatnonzero(passes == number)
        places = np.random.default_rng(0).permutation(places)[:2000]
        difficulty = np.nan_to_num(rows["difficulty"][places], nan=0.5)
        # A picture within an SVG, which would be megabytes of single points.
        axes.scatter(difficulty, rows["rollouts"][places], s=8, alpha=0.4, rasterized=True)
        label = "not ranked yet" if number == 0 else "difficulty k"
        axes.set(title=f"pass {number + 1}", xlim=(0, 1.02), xlabel=label)
    panels[0].set(ylabel="rollouts of a prompt", ylim=(0, None))
    return figure


def draw_formula(logits: np.ndarray, path: str | Path) -> dict[str, list[float]]:
    """
    Draw the temperature of Eq. 4 against the one that exactly scales the entropy by alpha (the paper's Figure 2), from
    temperature 1, on real next-token distributions.

    Args:
        logits (`np.ndarray` of shape `(T, V)`): at the tokens of some completions.
        path (`str` or `Path`): where to write the figure.

    Returns:
        `dict` of lists, one value per alpha: `alpha`, `exact` and `formula` (temperatures), `entropy` (reached with
        the formula's, as a multiple of the entropy at temperature 1).
    """
    entropy = mean_entropy(logits, 1.0)
    alphas = np.linspace(0.5, 1.5, 21)
    # Entropy has a limit, the closer the flatter the distributions are already.
    alphas = alphas[alphas * entropy < mean_entropy(logits, EXACT_TEMPERATURES[1])]
    result = {"alpha": alphas.tolist(), "exact": [], "formula": [], "entropy": []}
    for alpha in alphas:
        schedule = TemperatureSchedule(logits.shape[1], target_entropy=alpha * entropy)
        formula = schedule.step(entropy)
        result["formula"].append(formula)
        result["exact"].append(exact_temperature(logits, alpha * entropy))
        result["entropy"].append(mean_entropy(logits, formula) / entropy)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(alphas, result["exact"], color="black", label="exact")
    left.plot(alphas, result["formula"], color="C0", linestyle="--", label="Eq. 4, one step")
    left.set(xlabel=r"$\alpha$ = target entropy / entropy", ylabel="temperature")
    right.plot(alphas, alphas, color="black", label="target")
    right.plot(alphas, result["entropy"], color="C0", linestyle="--", label="Eq. 4, one step")
    right.set(xlabel=r"$\alpha$ = target entropy / entropy", ylabel="entropy / entropy at temperature 1")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.suptitle(
        f"{len(logits)} next-token distributions, |V| = {logits.shape[1]:,}, mean entropy {entropy:.3f} nats",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)
    return result
