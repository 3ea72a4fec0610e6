"""
Train every method of the study on every task and seed, each run from a base model of that seed.

    python -m benchmarks.study.run [--output_dir outputs/study] [--tasks rules] [--methods grpo e3] [--seeds 2]

A run that is done is a JSON file in the output folder, written whole or not at all: the same command goes on where a
killed one stopped, a run that saves checkpoints at its last. As many runs at a time as there are free cores. Then
`python -m benchmarks.study.report`.
"""

import contextlib
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import yaml
from tqdm import tqdm
from transformers import HfArgumentParser


STUDY = Path(__file__).parent / "study.yaml"
NUM_EXAMPLES = 2
NUM_SAMPLES = 64  # of a held-out problem, at temperature 1 and at the run's last temperature
MANY_SAMPLES = 256  # of the methods that the study names for it, at temperature 1


@dataclass
class Arguments:
    """
    Args:
        config (`str`): the study.
        output_dir (`str`): folder for bases, runs and results.
        tasks (`list[str]`): those of the study to run; none = all.
        methods (`list[str]`): those of the study to run; none = all.
        seeds (`int`): run at most so many of a task's seeds.
        first_seed (`int`): the first of them. The results use 0 and up; what is tried out, others.
        learning_rates (`list[float]`): run every method with each of them, without evaluations, to choose its own.
        processes (`int`): runs at a time. None = one for each free core.
    """

    config: str = str(STUDY)
    output_dir: str = "outputs/study"
    tasks: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    seeds: int | None = None
    first_seed: int = 0
    learning_rates: list[float] = field(default_factory=list)
    processes: int | None = None


@dataclass(frozen=True)
class Job:
    """
    One run of the study, or with `method` None the base model of a task's seed; or, later, many samples of it. A
    `learning_rate` other than the method's own makes it a run of the tuning.
    """

    config: str
    output_dir: str
    task: str
    seed: int
    method: str | None = None
    is_sampling: bool = False
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return (self.method or "base") + (f"@{self.learning_rate}" if self.learning_rate else "")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.task / f"seed{self.seed}"

    @property
    def result(self) -> Path:
        return self.folder / ("many" if self.is_sampling else "") / f"{self.name}.json"


def read_study(path: str) -> dict:
    return yaml.safe_load(Path(path).read_text())


def all_jobs(args: Arguments, study: dict) -> tuple[list[Job], list[Job], list[Job]]:
    """
    Bases, and runs seed by seed, so that what is there after half of the time is a study with fewer seeds; and what is
    to be sampled many times.
    """
    for name, chosen in (("tasks", args.tasks), ("methods", args.methods)):
        if unknown := set(chosen) - set(study[name]):
            raise ValueError(f"{name} has {sorted(unknown)}. Choose from {list(study[name])}.")
    bases, runs = [], []
    for task in args.tasks or study["tasks"]:
        of_task = study["tasks"][task]
        methods = study["methods"] if of_task["methods"] == "all" else of_task["methods"]
        methods = [method for method in methods if not args.methods or method in args.methods]
        for seed in range(args.first_seed, args.first_seed + (args.seeds or of_task["seeds"])):
            bases.append(Job(args.config, args.output_dir, task, seed))
            of_seed = [Job(args.config, args.output_dir, task, seed, method) for method in methods]
            runs += [replace(job, learning_rate=rate) for job in of_seed for rate in args.learning_rates or [None]]
    sampled_later = [] if args.learning_rates else study.get("many_samples", [])
    many = [replace(job, is_sampling=True) for job in bases + runs if job.method in sampled_later]
    return bases, sorted(runs, key=lambda job: job.seed), many


def measure(
    folder: Path, task, problems: list[dict], temperature: float, num_samples: int = NUM_SAMPLES
) -> dict[str, list]:
    """
    `correct`, right answers among `num_samples` samples of each problem; of a task with two ways `written_out`, those
    of the longer way, and `examples`, the first completions of the first problem of each level.
    """
    from recipes.quickstart.report import sample

    sample = getattr(task, "sample", sample)
    samples = sample(folder, problems, num_samples, temperature, task.max_completion_length)
    columns = [name for name in problems[0] if name != "prompt"]
    result = {
        "correct": [
            int(sum(task.reward(texts, **{name: [problem[name]] * num_samples for name in columns})))
            for problem, texts in samples
        ]
    }
    if hasattr(task, "writes_it_out"):
        result["written_out"] = [sum(map(task.writes_it_out, texts)) for _, texts in samples]
        first = {problem["level"]: (problem, texts[:NUM_EXAMPLES]) for problem, texts in reversed(samples)}
        result["examples"] = [
            {"prompt": problem["prompt"], "solution": problem["solution"], "completions": texts}
            for problem, texts in first.values()
        ]
    return result


def run_job(job: Job) -> Job:
    """Do it, and write its result."""
    import torch
    from accelerate.utils import set_seed

    from e3_trl import dotted_path
    from e3_trl.runs.report import write_json
    from recipes.quickstart.prepare import make_base

    torch.set_num_threads(1)
    study = read_study(job.config)
    of_task = study["tasks"][job.task]
    task = dotted_path.load(of_task["task"])(job.seed)
    base = job.folder / "base"
    job.result.parent.mkdir(parents=True, exist_ok=True)
    log = open(job.result.with_suffix(".log"), "w")  # noqa: SIM115
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        set_seed(job.seed)
        if job.method is None and not job.is_sampling:
            make_base = getattr(task, "make_base", partial(make_base, task))
            make_base(base, job.seed, of_task["steps"], of_task["problems"])
        test = [json.loads(line) for line in (base / "test.jsonl").read_text().splitlines()]
        if job.is_sampling:
            model = job.folder / job.name
            result = {"correct": measure(model, task, test, 1.0, MANY_SAMPLES)["correct"]}
        elif job.method is None:
            result = measure(base, task, test, 1.0)
            result |= {name: [row[name] for row in test] for name in ("level", "family") if name in test[0]}
        else:
            settings = study["settings"] | of_task.get("settings", {}) | study["methods"][job.method]
            if job.learning_rate:
                settings |= {"learning_rate": job.learning_rate, "eval_strategy": "no"}
            result = train(job, task, base, test, settings, study.get("own_temperature", True))
    write_json(job.result, result)
    if job.method and not job.is_sampling:  # a checkpoint is three times the model, and nobody goes on from it now
        for checkpoint in (job.folder / job.name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return job


def train(job: Job, task, base: Path, test: list[dict], settings: dict, own_temperature: bool) -> dict:
    """
    Train, and measure on problems that were not trained on: at temperature 1, and with `own_temperature` at the run's
    last one too.
    """
    from datasets import load_dataset
    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    from e3_trl import E3GRPOConfig, E3GRPOTrainer, read_rollouts

    folder = job.folder / job.name
    own = {"output_dir": str(folder), "seed": job.seed, "max_completion_length": task.max_completion_length}
    config = E3GRPOConfig(**own | settings)
    data = {name: str(base / f"{name}.jsonl") for name in ("train", "test")}
    data = load_dataset("json", data_files=data)
    trainer = E3GRPOTrainer(str(base), task.reward, config, data["train"], data["test"])
    trainer.remove_callback(PrinterCallback)
    saves = config.save_strategy != "no" and folder.is_dir()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if saves else None)
    trainer.save_model(str(folder))

    log = [entry for entry in trainer.state.log_history if "entropy" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_pass@1" in entry]
    rollouts, tokens = [0] * (len(log) + 1), [0] * (len(log) + 1)
    for row in read_rollouts(folder):
        rollouts[row["step"]] += row["rollouts"]
        tokens[row["step"]] += row["tokens"]
    result = measure(folder, task, test, 1.0)
    temperature = trainer.temperature
    if own_temperature:
        at_own = result if temperature == 1 else measure(folder, task, test, temperature)
        result["correct_at_own_temperature"] = at_own["correct"]
    names = ("entropy", "target_entropy", "temperature", "rollouts/all_wrong", "rollouts/all_correct", "reward")
    return result | {
        "last_temperature": temperature,
        "seconds": round(sum(entry["step_time"] for entry in log), 1),
        "rollouts": rollouts,
        "tokens": tokens,
        "evaluated_at": [entry["step"] for entry in evaluations],
        "pass@1": [round(entry["eval_pass@1"], 4) for entry in evaluations],
        "log": {name: [round(entry[name], 4) for entry in log if name in entry] for name in names},
    }


def main(args: Arguments) -> None:
    study = read_study(args.config)
    bases, runs, many = all_jobs(args, study)
    processes = args.processes or len(os.sched_getaffinity(0))
    # Processes of their own, started anew: torch does not survive a fork.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for name, jobs in (("base models", bases), ("runs", runs), (f"times {MANY_SAMPLES} samples", many)):
            left = [job for job in jobs if not job.result.exists()]
            minutes = study.get("minutes", {}).get(name)
            if minutes and left:
                hours = minutes * math.ceil(len(left) / processes) / 60
                estimate = f"About {hours:.1f} h, at {minutes} minutes each on a free core."
            else:
                estimate = "The bar says how long it will take."
            print(f"{len(jobs)} {name}, {len(left)} to do, {processes} at a time. {estimate}", flush=True)
            done = as_completed([pool.submit(run_job, job) for job in left])
            for future in tqdm(done, total=len(left), desc=name, smoothing=0):
                future.result()


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
