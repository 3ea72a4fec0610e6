"""
Can the trainer fit what is within reach? `python -m benchmarks.sanity`

The test of arXiv 2510.26788: on problems that the base model solves between 20% and 80% of the time, an algorithm
that works reaches a training accuracy of nearly 100%; one that stays below 95% has a defect, whatever its rewards are.
Here with plain GRPO and with E3, on the quickstart's problems, at temperature 1.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset, load_dataset
from transformers import HfArgumentParser, PrinterCallback

from benchmarks.study.run import NUM_SAMPLES, count_correct
from e3_trl import E3GRPOConfig, E3GRPOTrainer
from e3_trl.runs.report import write_json
from recipes.quickstart.prepare import Arguments as BaseArguments
from recipes.quickstart.prepare import main as prepare
from recipes.quickstart.task import RuleTask


ROOT = Path(__file__).parent.parent
WITHIN_REACH = 0.2, 0.8
GOAL = 0.95


@dataclass
class Arguments:
    """
    Args:
        base (`str`): folder of the base model and its problems; made if it is not there.
        output_dir (`str`): for the runs.
        num_train_epochs (`int`): passes over the problems.
        output (`str`): where to write the accuracies.
    """

    base: str = "outputs/quickstart-base"
    output_dir: str = "outputs/sanity"
    num_train_epochs: int = 24
    output: str = str(Path(__file__).parent / "results" / "sanity.json")


def accuracies(folder: Path, problems: list[dict]) -> np.ndarray:
    """Share of right answers to each problem at temperature 1, shape `(P,)`."""
    return np.array(count_correct(folder, RuleTask, problems, 1.0)) / NUM_SAMPLES


def main(args: Arguments) -> None:
    torch.set_num_threads(1)
    base = Path(args.base)
    prepare(BaseArguments(args.base))
    problems = list(load_dataset("json", data_files=str(base / "train.jsonl"), split="train"))
    before = accuracies(base, problems)
    low, high = WITHIN_REACH
    kept = [index for index, accuracy in enumerate(before) if low <= accuracy <= high]
    problems = [problems[index] for index in kept]
    results = {"problems": len(problems), "before": float(before[kept].mean())}
    for name in ("grpo", "e3"):
        recipe = yaml.safe_load((ROOT / f"recipes/quickstart/config_{name}.yaml").read_text())
        of_script = {"model_name_or_path", "dtype", "dataset_name", "reward_funcs"}
        settings = {key: value for key, value in recipe.items() if key not in of_script}
        folder = Path(args.output_dir) / name
        settings |= {"output_dir": str(folder), "num_train_epochs": args.num_train_epochs, "save_strategy": "no"}
        config = E3GRPOConfig(**settings)
        trainer = E3GRPOTrainer(str(base), RuleTask.reward, config, Dataset.from_list(problems))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(folder))
        after = accuracies(folder, problems)
        results[name] = {"accuracy": float(after.mean()), "steps": trainer.state.max_steps}
    write_json(args.output, results)
    print(f"{len(problems)} problems, solved by the base {results['before']:.3f} of the time")
    for name in ("grpo", "e3"):
        verdict = "passes" if results[name]["accuracy"] >= GOAL else "FAILS"
        print(f"{name}: training accuracy {results[name]['accuracy']:.3f}, {verdict}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
