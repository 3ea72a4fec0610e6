"""
Make what the real model's recipes train: SmolLM2-135M-Instruct, once warmed up on the easy rungs of each ladder of
problems, and the problems, of which it says how often the model solves them.

    python -m recipes.SmolLM2-135M.prepare [--ladders ways]

What is there is not made again.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from e3_trl.runs.report import write_json

from .ladders import LADDERS, OUTPUT, RATES, Ladder
from .pretrained import make_pretrained
from .sampling import sample


# Of each rung.
PROBLEMS = {"train": 32, "test": 20}
MEASURED, NUM_SAMPLES = 16, 16


@dataclass
class Arguments:
    """
    Args:
        output_dir (`str`): folder for the pretrained model and, one for each ladder, the warmed ones.
        ladders (`list[str]`): which; none = all.
        steps (`int`): of the warm-up; none = the ladder's own.
    """

    output_dir: str = OUTPUT
    ladders: list[str] = field(default_factory=list)
    steps: int | None = None


def warm_up(ladder: Ladder, pretrained: Path, folder: Path, steps: int) -> None:
    """Supervised training on the lessons of a ladder, in their order; from a checkpoint, if one was killed."""
    set_seed(0)
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=ladder.lessons_per_step,
        max_steps=steps,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        learning_rate=ladder.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=5,
        save_steps=20,
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype="float32")
    rows = {"input_ids": [], "completion_mask": []}
    for prompt, given, text in ladder.lessons(steps * ladder.lessons_per_step):
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) + given
        before = tokenizer(asked, add_special_tokens=False).input_ids
        learned = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows["input_ids"].append(before + learned)
        rows["completion_mask"].append([0] * len(before) + [1] * len(learned))
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: what is there with it is whole
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def measure(ladder: Ladder, folder: Path, per_level: int = MEASURED, num_samples: int = NUM_SAMPLES) -> dict:
    """
    By rung, of problems that are neither taught nor trained on nor tested, at temperature 1: `solved` (share of all
    samples), `below_0.1` (share of problems that are solved less often) and `written_out` (share of the longer way).
    """
    samples = sample(folder, ladder.problems("rates", per_level), num_samples, 1.0, ladder.max_completion_length)
    rates = {}
    for level in ladder.levels:
        solved = [
            ladder.reward(texts, entry=[problem["entry"]] * num_samples)
            for problem, texts in samples
            if problem["level"] == level
        ]
        texts = [text for problem, of_one in samples if problem["level"] == level for text in of_one]
        rates[level] = {
            "solved": sum(map(sum, solved)) / len(texts),
            "below_0.1": sum(sum(row) < 0.1 * num_samples for row in solved) / len(solved),
            "written_out": sum(map(ladder.writes_it_out, texts)) / len(texts),
            "examples": texts[:: max(1, len(texts) // 6)][:6],
        }
    return rates


def main(args: Arguments) -> None:
    root = Path(args.output_dir)
    pretrained = root / "pretrained"
    if not (pretrained / "model.safetensors").exists():
        make_pretrained(pretrained)
    for name in args.ladders or LADDERS:
        ladder, folder = LADDERS[name](), root / name
        if not (folder / "model.safetensors").exists():
            begin = time.perf_counter()
            warm_up(ladder, pretrained, folder, args.steps or ladder.steps)
            print(f"{name}: warmed up in {time.perf_counter() - begin:.0f} s.")
        if not (folder / RATES).exists():
            write_json(folder / RATES, measure(ladder, folder))
        rates = json.loads((folder / RATES).read_text())
        ladder.write_problems(folder, rates, PROBLEMS)
        for level, of_level in rates.items():
            solved, written = of_level["solved"], of_level["written_out"]
            print(f"{name} {level}: solved {solved:.3f}, the longer way {written:.3f}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
