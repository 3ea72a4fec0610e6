"""
Make what the quickstart trains: a model of 0.33 million parameters that knows ten rules and seldom tries the right one
where it matters, and problems for it.

    python -m recipes.quickstart.prepare
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from recipes.quickstart.task import Lesson, RuleTask


BATCH_SIZE = 128
NUM_STEPS = 800
# Of each family. 24 families: 432 problems to train on, 192 to test.
PROBLEMS = {"train": 18, "test": 8}


@dataclass
class Arguments:
    """
    Args:
        output_dir (`str`): folder for the model, `train.jsonl` and `test.jsonl`.
        steps (`int`): training steps.
        seed (`int`): of the rules, the families, the problems and the model. The training's own seed is another.
    """

    output_dir: str = "outputs/quickstart-base"
    steps: int = NUM_STEPS
    seed: int = 0


def make_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character: a longer one would not survive `AutoTokenizer`, which has its own way with Qwen2."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Heads of 32: what vLLM needs on a CPU."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.03,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def teach(model, tokenizer, lessons: Iterable[Lesson], folder: Path) -> None:
    """Supervised training on texts, in this order, each with the part of it that is learned."""
    eos = tokenizer.eos_token_id
    rows = {"input_ids": [], "completion_mask": []}
    for text, start, stop in lessons:
        ids = [*tokenizer(text).input_ids, eos][:stop]
        rows["input_ids"].append(ids)
        rows["completion_mask"].append([int(start <= place) for place in range(len(ids))])
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.98,
        weight_decay=0.1,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    SFTTrainer(model=model, args=config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer).train()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_base(task, folder: Path, seed: int, steps: int, problems: dict[str, int]) -> None:
    """
    Write a model that was taught a task, and problems of that task which it was not taught.

    Args:
        task ([`~recipes.quickstart.task.RuleTask`]): or another with its attributes and methods.
        folder (`Path`): for the model, `train.jsonl` and `test.jsonl`.
        seed (`int`): of the problems and the model.
        steps (`int`): training steps.
        problems (`dict[str, int]`): number of problems in `train` and `test`, as `task.problems` counts them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    test = task.problems(problems["test"], rng)
    prompts = {row["prompt"] for row in test}
    write_jsonl(folder / "test.jsonl", test)
    write_jsonl(folder / "train.jsonl", task.problems(problems["train"], rng, prompts))
    set_seed(seed)
    tokenizer = make_tokenizer(task.characters)
    model = make_model(tokenizer)
    teach(model, tokenizer, task.lessons(steps * BATCH_SIZE, rng, prompts), folder)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: what is there with it is whole


def main(args: Arguments) -> None:
    folder = Path(args.output_dir)
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already. Remove it to make it anew.")
        return
    make_base(RuleTask(args.seed), folder, args.seed, args.steps, PROBLEMS)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
