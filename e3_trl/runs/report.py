"""
What a run folder says about its run, as JSON: written by the trainer with every checkpoint, read by the figures and by
the model card.

- `training_args.json`: every training argument, and what was trained on what
- `report.json`: seed, settings, the last metrics, what the run warned of; an evaluation adds `method`, `benchmarks`
  and `evaluation` (its settings)
- `trainer_state.json`: transformers' log, in the folder or in its checkpoints
"""

import json
import math
from dataclasses import fields
from pathlib import Path

from ..scrub import without_secrets
from .run_folder import ARGS_FILE, REPORT_FILE, TRAINER_STATE_NAME, complete_checkpoints, to_json, write_whole


# Of TRL's settings those that a reader of results asks for first; `training_args.json` has all.
SETTINGS = {
    "beta", "entropy_coef", "epsilon", "epsilon_high", "generation_batch_size", "learning_rate", "loss_type",
    "lr_scheduler_type", "max_completion_length", "num_generations", "num_iterations", "num_train_epochs",
    "scale_rewards", "temperature",
}  # fmt: skip


def describe_run(trainer) -> None:
    """
    Write `training_args.json` and `report.json` of a run anew: results of another training in the same folder would be
    wrong. Secrets are left out, however deep they stand.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer. Its arguments do not say what model and what data it was given.
    """
    from trl import GRPOConfig  # which a reader of runs need not wait for

    folder, args, state = Path(trainer.args.output_dir), trainer.args, trainer.state
    origin = without_secrets(
        {
            "model_name_or_path": trainer.model.config._name_or_path,
            "reward_funcs": ", ".join(trainer.reward_func_names),
            **trainer.dataset_id,
        }
    )
    values = without_secrets(args.to_dict())
    write_json(folder / ARGS_FILE, {**origin, **values})
    own = {field.name for field in fields(args)} - {field.name for field in fields(GRPOConfig)}
    settings = {name: value for name, value in values.items() if name in own or name in SETTINGS}
    metrics = {}
    for entry in state.log_history:
        metrics |= {k: v for k, v in entry.items() if isinstance(v, float | int) and math.isfinite(v)}
    report = {"seed": args.seed, "step": state.global_step, "settings": {**origin, **settings}, "metrics": metrics}
    report["warnings"] = trainer.watch.warnings
    write_json(folder / REPORT_FILE, report)


def read_settings(folder: str | Path) -> dict | None:
    """The run's `training_args.json`, or `None` if it was not written by this trainer."""
    path = Path(folder) / ARGS_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def read_report(path: str | Path) -> dict:
    """`report.json` of a run folder, or the report that is `path` itself; empty if there is none."""
    path = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
    return json.loads(path.read_text()) if path.is_file() else {}


def read_log(folder: str | Path) -> list[dict]:
    """
    The run's log history, from the folder or from its last complete checkpoint, whichever went further; empty if
    neither has one.
    """
    states = []
    for place in (folder, *complete_checkpoints(folder)[:1]):
        if (Path(place) / TRAINER_STATE_NAME).is_file():
            states.append(json.loads((Path(place) / TRAINER_STATE_NAME).read_text()))
    return max(states, key=lambda state: state["global_step"])["log_history"] if states else []


def read_benchmarks(path: str | Path) -> dict[str, list[dict[int, float]]]:
    """
    pass@k of an evaluated model, or of the runs that `e3-trl evaluate` averaged.

    Args:
        path (`str` or `Path`): a folder with `report.json`, or a report.

    Returns:
        `dict`: by benchmark, for each run pass@k by k; empty if nothing was evaluated.
    """
    curves = {}
    for name, result in read_report(path).get("benchmarks", {}).items():
        # One number, or the evaluation's statistics with the number of each run.
        values = {int(k): v["runs"] if isinstance(v, dict) else [v] for k, v in result["pass@k"].items()}
        curves[name] = [dict(zip(values, run, strict=True)) for run in zip(*values.values(), strict=True)]
    return curves


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file whole or not at all, without secrets in what has no form of its own in JSON."""
    write_whole(path, to_json(content, default=lambda value: without_secrets(str(value))))
