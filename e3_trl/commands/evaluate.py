"""
Evaluate a model, or several runs of one method, on benchmarks: pass@1 and pass@k as in Table 1 of E3.

    e3-trl evaluate --config recipes/evaluate.yaml --model_name_or_path outputs/e3-seed0 outputs/e3-seed1

Every field of `EvaluationArguments` may stand in the configuration, and on the command line, which wins. Completions
are written to the output folder chunk by chunk: the same command goes on where a killed one stopped. In the end the
folder holds `report.json`, `table.md` and `pass_at_k.png`.
"""

import gc
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from trl import TrlParser

from ..evaluation.completions import CompletionSampler, SamplingConfig, load_scorer, score_completions
from ..evaluation.metrics import evaluation_report
from ..evaluation.problems import answers_for, join_problems, load_problems
from ..runs.report import read_report, write_json
from . import mistakes_named


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class EvaluationArguments(SamplingConfig):
    """
    Arguments of `e3-trl evaluate`, with those of [`~e3_trl.evaluation.completions.SamplingConfig`].

    Args:
        model_name_or_path (`list[str]`):
            Models, folders or names on the Hub: runs of one method, which are averaged. The paper trains three.
        benchmarks (`list[str]`):
            Parquet, JSON or JSON-lines files, or datasets on the Hub (`owner/name`, or `owner/name:config`), with a
            problem and an answer in each row. A column `source` splits a file into several benchmarks. Or
            `reasoning_gym:task`, of which each task is one.
        dataset_config (`str` or a mapping, *optional*):
            Of `reasoning_gym`, as in training: the test split of that configuration.
        sources (`list[str]`, *optional*):
            The benchmarks to take, by name. All if none is named.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Each model is sampled once with each of these; every time is a run.
        method (`str`, *optional*):
            Name of the method in table and figure. If `None`, the first model's.
        compare_with (`list[str]`, *optional*):
            Output folders of other methods' evaluations, to stand in the same table and figure. Methods of one name
            are told apart by their folders.
        output_dir (`str`, *optional*, defaults to `"outputs/evaluation"`):
            Folder to write to, one per method.
    """

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Models: runs of one method, which are averaged."}
    )
    benchmarks: list[str] = field(
        default_factory=list, metadata={"help": "Files, or datasets on the Hub, of problems and answers."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Of reasoning_gym, as in training: a mapping, as JSON here."}
    )
    sources: list[str] = field(
        default_factory=list, metadata={"help": "The benchmarks to take. All if none is named."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Sampling seeds; each makes a run."})
    method: str | None = field(default=None, metadata={"help": "Name of the method in table and figure."})
    compare_with: list[str] = field(
        default_factory=list, metadata={"help": "Output folders of other methods' evaluations, to compare with."}
    )
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder to write to, one per method."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("model_name_or_path", "benchmarks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty. Name at least one.")


def load_benchmarks(args: EvaluationArguments) -> pd.DataFrame:
    """The problems of all benchmarks: `prompt`, `solution`, `source` (the benchmark's name) and their own columns."""
    problems = join_problems([load_problems(name, config=args.dataset_config) for name in args.benchmarks])
    if "solution" not in problems or problems["solution"].isna().any():
        raise ValueError(f"benchmarks names {args.benchmarks}, and one has no answers. Add a column 'answer' to it.")
    unknown = set(args.sources) - set(problems["source"])
    if unknown:
        raise ValueError(f"sources names {sorted(unknown)}, and there are only {sorted(set(problems['source']))}.")
    problems["solution"] = answers_for(args.reward_func, problems["solution"])
    return problems[problems["source"].isin(args.sources)].reset_index(drop=True) if args.sources else problems


def evaluate(args: EvaluationArguments) -> dict:
    """Sample, score and report: see [`~e3_trl.evaluation.metrics.evaluation_report`]."""
    problems = load_benchmarks(args)
    columns = problems.to_dict("list")
    load_scorer(args.reward_func, list(columns))
    folder = Path(args.output_dir)
    # All of them first: what is wrong with the last model is said before the first is loaded.
    samplers = [CompletionSampler(model, columns["prompt"], args) for model in args.model_name_or_path]
    rewards, rows = [], []
    while samplers:
        sampler = samplers.pop(0)
        for seed in args.seeds:
            run = folder / f"{sampler.model.strip('/').replace('/', '--')}-seed{seed}"
            rows.append(sampler.sample(seed, run / "completions.jsonl"))
            rewards.append(score_completions(columns, rows[-1], run / "rewards.jsonl", args))
        del sampler  # and with it the weights, which leave no room for the next model's
        gc.collect()
        torch.cuda.empty_cache()

    def per_benchmark(values: list) -> dict[str, np.ndarray]:
        values_RPn = np.array(values)
        return {name: values_RPn[:, index] for name, index in problems.groupby("source", sort=False).indices.items()}

    return evaluation_report(
        per_benchmark(rewards),
        per_benchmark([[row["tokens"] for row in run] for run in rows]),
        per_benchmark([[row["truncated"] for row in run] for run in rows]),
    )


def benchmark_names(reports: dict[str, dict]) -> list[str]:
    """Those of all methods, in the order given; the average last."""
    names = dict.fromkeys(name for report in reports.values() for name in report if name != "average")
    return [*names, "average"]


def compare_table(reports: dict[str, dict], k: int, box_style: box.Box) -> Table:
    """One row per method, one column per benchmark, as in Table 1 of the paper."""
    benchmarks = benchmark_names(reports)
    table = Table(title=f"pass@1 / pass@{k} in %", title_justify="left", box=box_style)
    table.add_column("method")
    for name in benchmarks:
        table.add_column(name, justify="right")
    for method, report in reports.items():
        cells = []
        for name in benchmarks:
            # The average of other benchmarks is not to be compared.
            comparable = name != "average" or report.keys() == set(benchmarks)
            values = report.get(name, {}).get("pass@k", {}) if comparable else {}
            cells.append(
                " / ".join(f"{100 * values[key]['mean']:.2f}" if key in values else "-" for key in ("1", str(k)))
            )
        table.add_row(method, *cells)
    return table


def detail_table(method: str, report: dict, k: int, box_style: box.Box) -> Table:
    """One row per benchmark of a method: confidence intervals, spread of the runs, lengths."""
    num_runs = len(report["average"]["pass@k"]["1"]["runs"])
    title = (
        f"{method}: {num_runs} run(s)," + (num_runs > 1) * " ± deviation over runs," + " [95% interval over problems]"
    )
    table = Table(title=title, title_justify="left", box=box_style)
    table.add_column("benchmark")
    for column in ("problems", "pass@1", f"pass@{k}", "tokens", "truncated"):
        table.add_column(column, justify="right")
    for name, row in report.items():
        cells = []
        for value in (row["pass@k"]["1"], row["pass@k"][str(k)]):
            mean, low, high = (100 * value[key] for key in ("mean", "low", "high"))
            spread = "" if value["spread"] is None else f" ± {100 * value['spread']:.2f}"
            cells.append(f"{mean:.2f}{spread} [{low:.1f}, {high:.1f}]")
        table.add_row(name, str(row["problems"]), *cells, f"{row['tokens']:.0f}", f"{100 * row['truncated']:.1f}%")
    return table


def tables(reports: dict[str, dict], method: str, k: int, box_style: box.Box) -> tuple[Table, Table]:
    return compare_table(reports, k, box_style), detail_table(method, reports[method], k, box_style)


def draw(reports: dict[str, dict], path: Path) -> None:
    """pass@k against k, one panel per benchmark, with 95% intervals: the paper's Figures 5 and 6."""
    names = benchmark_names(reports)
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), squeeze=False, layout="constrained")
    for name, axes in zip(names, panels[0], strict=True):
        for method, report in reports.items():
            curve = report.get(name, {}).get("pass@k", {})
            ks = [int(k) for k in curve]
            line = axes.plot(ks, [100 * value["mean"] for value in curve.values()], marker="o", ms=3, label=method)[0]
            low, high = ([100 * value[side] for value in curve.values()] for side in ("low", "high"))
            axes.fill_between(ks, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
        axes.set(title=name, xlabel="k", ylim=(0, None))
    panels[0, 0].set(ylabel="pass@k in %")
    panels[0, 0].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_evaluation(folder: str) -> tuple[str, dict]:
    """Method and benchmarks of an earlier evaluation."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise ValueError(f"compare_with names {folder!r}, which holds no report.json. Evaluate that method first.")
    content = json.loads(path.read_text())
    if not {"method", "benchmarks"} <= content.keys():
        raise ValueError(
            f"compare_with names {folder!r}, whose report.json is of a training. Name the output_dir of its "
            "evaluation."
        )
    return content["method"], content["benchmarks"]


def unlike_names(methods: list[str], folders: list[str]) -> list[str]:
    """Names of methods, with their folders where several have the same: checkpoints of two runs, above all."""
    return [
        f"{method} ({folder})" if methods.count(method) > 1 else method
        for method, folder in zip(methods, folders, strict=True)
    ]


def write_report(folder: Path, method: str, benchmarks: dict, settings: dict) -> None:
    """Write `report.json`. In a run's own folder it keeps what the training has said, its `settings` among it."""
    report = read_report(folder)
    of_a_run = report if "step" in report else {}
    name = "evaluation" if of_a_run else "settings"
    write_json(folder / "report.json", {**of_a_run, "method": method, "benchmarks": benchmarks, name: settings})


def main(args: EvaluationArguments) -> None:
    others = [read_evaluation(folder) for folder in args.compare_with]
    report = evaluate(args)
    folder = Path(args.output_dir)
    method = args.method or Path(args.model_name_or_path[0]).name
    write_report(folder, method, report, asdict(args))

    names, results = zip(*others, (method, report), strict=True)
    names = unlike_names(list(names), [*args.compare_with, args.output_dir])
    reports, method, k = dict(zip(names, results, strict=True)), names[-1], args.num_samples
    Console(width=110).print(*tables(reports, method, k, box.HEAVY_HEAD))
    markdown = Console(file=io.StringIO(), width=1000)
    markdown.print(*tables(reports, method, k, box.MARKDOWN))
    (folder / "table.md").write_text("\n".join(map(str.rstrip, markdown.file.getvalue().splitlines())) + "\n")
    draw(reports, folder / "pass_at_k.png")
    print(f"Written to {folder}: report.json, table.md, pass_at_k.png, and the completions of each run")


def run(arguments: list[str] | None = None) -> None:
    with mistakes_named():
        main(*TrlParser(EvaluationArguments).parse_args_and_config(arguments))
