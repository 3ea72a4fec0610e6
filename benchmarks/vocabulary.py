"""
What the temperature schedule does with a small vocabulary, or a small batch. `python -m benchmarks.vocabulary`

For several |V|: the gain of Eq. 4, 1 / (ln |V| + ln ln |V|), by formula; how far the entropy of one batch of 16
prompts x 8, from which the target is taken, lies from that of many batches; and runs of E3, as they are and with the
entropy smoothed, which is no setting of the trainer. The vocabularies are that of the noisy sums (16 tokens), and that
of the quickstart with tokens that no text has (64 and 1,024).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import load_dataset
from transformers import HfArgumentParser, PrinterCallback

from benchmarks.study.run import NUM_SAMPLES, STUDY, count_correct, read_study
from e3_trl import E3GRPOConfig, E3GRPOTrainer, TemperatureCallback, TemperatureSchedule, dotted_path
from e3_trl.runs.report import write_json
from recipes.quickstart.prepare import make_base


VOCAB_SIZES = {"16": "sums", "64": "rules", "1024": "rules"}  # and the study's task for it
NUM_SPECIAL = 3
REAL = 151_936
NUM_BATCHES = 54


@dataclass
class Arguments:
    """
    Args:
        output_dir (`str`): for bases and runs.
        seeds (`int`): worlds of each vocabulary.
        smoothing (`float`): part of the mean so far that an entropy leaves in place.
        output (`str`): where to write the numbers.
    """

    output_dir: str = "outputs/vocabulary"
    seeds: int = 3
    smoothing: float = 0.8
    output: str = str(Path(__file__).parent / "results" / "vocabulary.json")


class SmoothedSchedule(TemperatureSchedule):
    """Eq. 4 on a moving average of the entropies."""

    smoothing: float
    mean: float | None = None

    def step(self, entropy: float, num_steps: int = 1) -> float:
        self.mean = entropy if self.mean is None else self.smoothing * self.mean + (1 - self.smoothing) * entropy
        return super().step(self.mean, num_steps)


def train(base: Path, task, folder: Path, seed: int, smoothing: float | None = None, **changes) -> E3GRPOTrainer:
    """A run of the study's E3."""
    settings = {k: v for k, v in read_study(str(STUDY))["settings"].items() if not k.startswith("eval")}
    settings |= {"output_dir": str(folder), "seed": seed, "max_completion_length": task.max_completion_length}
    config = E3GRPOConfig(**settings | changes)
    data = load_dataset("json", data_files=str(base / "train.jsonl"), split="train")
    trainer = E3GRPOTrainer(str(base), task.reward, config, data)
    trainer.remove_callback(PrinterCallback)
    if smoothing is not None:
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TemperatureCallback))
        callback.schedule = SmoothedSchedule(callback.schedule.vocab_size)
        callback.schedule.smoothing = smoothing
    trainer.train()
    return trainer


def log_of(trainer: E3GRPOTrainer, name: str) -> np.ndarray:
    return np.array([entry[name] for entry in trainer.state.log_history if name in entry and "entropy" in entry])


def main(args: Arguments) -> None:
    torch.set_num_threads(1)
    results: dict = {"gain": {}, "target_noise": {}, "runs": {}}
    for size in [*map(int, VOCAB_SIZES), REAL]:
        results["gain"][str(size)] = 1 / (math.log(size) + math.log(math.log(size)))
    for size, name_of_task in VOCAB_SIZES.items():
        of_task = read_study(str(STUDY))["tasks"][name_of_task]
        noise, runs = [], {"as it is": [], "smoothed": []}
        for seed in range(args.seeds):
            task = dotted_path.load(of_task["task"])(seed)
            # One token each that no text has.
            unused = int(size) - NUM_SPECIAL - len(task.characters)
            task.characters += "".join(chr(0x4E00 + index) for index in range(unused))
            folder = Path(args.output_dir) / size / f"seed{seed}"
            base = folder / "base"
            if not (base / "model.safetensors").exists():
                set_seed(seed)
                make_base(task, base, seed, of_task["steps"], of_task["problems"])
            still = train(base, task, folder / "still", seed, learning_rate=0.0, max_steps=NUM_BATCHES,
                          temperature_schedule="constant", rollout_allocation="uniform")  # fmt: skip
            entropies = log_of(still, "entropy")
            noise.append(float(entropies.std(ddof=1) / entropies.mean()))
            for name, smoothing in (("as it is", None), ("smoothed", args.smoothing)):
                trainer = train(base, task, folder / name.replace(" ", "_"), seed, smoothing)
                trainer.save_model(trainer.args.output_dir)
                temperature, entropy = log_of(trainer, "temperature"), log_of(trainer, "entropy")
                target = log_of(trainer, "target_entropy")
                half = len(entropy) // 2
                test = list(load_dataset("json", data_files=str(base / "test.jsonl"), split="train"))
                runs[name].append(
                    {
                        "entropy error": float(np.abs(entropy[-half:] / target[-half:] - 1).mean()),
                        "temperature change per step": float(np.abs(np.diff(temperature)).mean()),
                        "temperature": float(temperature[-half:].mean()),
                        "at its clamp": float((temperature >= 2).mean()),
                        "pass@1": float(
                            np.mean(count_correct(Path(trainer.args.output_dir), task, test, 1.0)) / NUM_SAMPLES
                        ),
                    }
                )
        results["target_noise"][size] = noise
        results["runs"][size] = runs
        write_json(args.output, results)  # what is there stays
        print(f"|V| {size}: gain {results['gain'][size]:.3f}, target's noise {np.mean(noise):.1%}")
        for name, of_seeds in runs.items():
            means = {key: float(np.mean([run[key] for run in of_seeds])) for key in of_seeds[0]}
            print(f"  {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()), flush=True)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
