"""
A step of E3GRPOTrainer on two ranks against one of GRPOTrainer, at the same rows and tokens:
`torchrun --nproc_per_node 2 benchmarks/ranks.py`.

The trainers take turns, a few steps each; every ratio is of two turns that stood side by side.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from generation import make_model, spread
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from e3_trl import E3GRPOConfig, E3GRPOTrainer


class StepTimes(TrainerCallback):
    """When each step of the last turn ended."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def main(args: argparse.Namespace) -> None:
    def reward(completions, **kwargs):
        return [float(len(set(completion)) % 2) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        make_model(model, vocab_size=2048)
        settings = {
            "per_device_train_batch_size": args.rows // 2,
            "num_generations": 8,
            "max_completion_length": 32,
            "generation_kwargs": {"min_new_tokens": 32},  # the same number of tokens for both
            "max_steps": args.steps + 1,
            "learning_rate": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        # Prompts for many passes: the budgets of both bounds are in force from the second on.
        dataset = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(2 * args.rows // 8)]})
        trainers, clocks = {}, {}
        for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (E3GRPOTrainer, E3GRPOConfig)):
            name = trainer_class.__name__
            config = config_class(output_dir=str(Path(folder) / name), **settings)
            clocks[name] = StepTimes()
            trainers[name] = trainer_class(model, reward, config, dataset, callbacks=[clocks[name]])
            trainers[name].remove_callback(PrinterCallback)
        rng = np.random.default_rng(0)  # the same order on both ranks
        seconds = {name: [] for name in trainers}
        is_main = trainers["GRPOTrainer"].accelerator.is_main_process
        for turn in tqdm(range(args.rounds + 1), disable=not is_main):
            for name in rng.permutation(list(trainers)):
                trainers[name].train()
                if turn > 0:
                    seconds[name].append(np.median(np.diff(clocks[name].ends)))
        if is_main:
            ratio = np.array(seconds["E3GRPOTrainer"]) / seconds["GRPOTrainer"]
            print(f"{args.rows} rows on 2 ranks, {args.rounds} turns of {args.steps} steps each")
            print(f"a step of GRPOTrainer: {1e3 * np.median(seconds['GRPOTrainer']):.0f} ms")
            print(f"a step of E3GRPOTrainer / one of GRPOTrainer: {spread(ratio)}")
        trainers["GRPOTrainer"].accelerator.wait_for_everyone()
        trainers["GRPOTrainer"].accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    main(parser.parse_args())
