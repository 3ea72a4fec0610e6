"""
Make what the quickstart trains: a model of 0.33 million parameters that half knows the task, and problems for it.

    python -m recipes.quickstart.prepare

It is taught with every fourth result a random digit, so that it knows the method and is unreliable at each step of it.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from recipes.quickstart.task import CHARACTERS, LEVELS, make_problems, make_prompts, write_solution


NOISE = 0.25
BATCH_SIZE = 64


@dataclass
class Arguments:
    """
    Args:
        output_dir (`str`): folder for the model, `train.jsonl` and `test.jsonl`.
        steps (`int`): training steps.
        seed (`int`): of the problems and the model. The training's own seed is another.
    """

    output_dir: str = "outputs/quickstart-base"
    steps: int = 800
    seed: int = 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Untied and with heads of 32: what vLLM needs on a CPU."""
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


def teach(model, tokenizer, rows: list[dict[str, str]]) -> None:
    """Supervised training on `rows` of `prompt` and `completion`, in this order."""
    config = SFTConfig(
        output_dir="outputs/quickstart-sft",
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
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
    SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(args: Arguments) -> None:
    folder = Path(args.output_dir)
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already. Remove it to make it anew.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    test = make_problems(20, rng)
    test_prompts = {row["prompt"] for row in test}
    write_jsonl(folder / "test.jsonl", test)
    write_jsonl(folder / "train.jsonl", make_problems(80, rng, exclude=test_prompts))

    set_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    # Longer and longer sums, rightly solved: so it learns fast. Then, at all lengths, how to be wrong.
    rows = []
    for longest, noise in [*((level, 0.0) for level in (2, 3, 4, 5, *4 * [LEVELS[-1]])), *2 * [(LEVELS[-1], NOISE)]]:
        for _ in range(args.steps // 10 * BATCH_SIZE):
            prompt = make_prompts(rng.randint(2, longest), 1, rng, test_prompts)[0]
            rows.append({"prompt": prompt, "completion": write_solution(prompt, rng, noise)})
    teach(model, tokenizer, rows)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
