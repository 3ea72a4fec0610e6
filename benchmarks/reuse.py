"""
`reuse_rollouts`: how far completions that are gone on with are from fresh ones, and what they save.
`python -m benchmarks.reuse`.

(a) Two runs of the same seed have the same first step, so in the second the same policy: the one goes on with what the
first step sampled, the other samples anew. Of their tokens at each place the distributions are compared, by total
variation, prompt by prompt; beside it two halves of the fresh ones, which is noise, and the first step's completions
as they were, which is what verification is for.

(b) Tokens that are sampled, and seconds of whole steps, of the passes after the first; runs with and without take
turns. Seconds are those of the processor, of one thread, which other programs on the machine change less.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl.generation import vllm_generation

from e3_trl import E3GRPOConfig, E3GRPOTrainer
from e3_trl.batch import steps


RESULT = Path(__file__).parent / "results" / "reuse.json"


def make_model(folder: str, vocab_size: int, hidden_size: int, num_layers: int) -> None:
    """A random model, whose completions end by themselves after `vocab_size` tokens on average."""
    vocab = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(vocab_size - 2))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def even_words(completions, **kwargs) -> list[float]:
    """Share of the words whose number is even, so that every prompt is solved at times."""
    words = [[int(word[1:]) for word in text.split()] or [0] for text in completions]
    return [float(np.mean([word % 2 == 0 for word in of_row])) for of_row in words]


class StepSeconds(TrainerCallback):
    """Processor seconds of each optimizer step, generation included."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)


def train(model: str, **settings) -> tuple[list[list[tuple]], np.ndarray, list[float]]:
    """
    Train on `num_prompts` prompts, with as many of them in a batch as there are.

    Returns:
        `tuple`: of each step its rows, (prompt, tokens); sampled tokens of each step; seconds of each step.
    """
    num_prompts = settings.pop("num_prompts")
    sampled, batches = [], []
    shape_rewards = steps.shape_rewards

    def spy(trainer, batch):
        batches.append(batch)
        return shape_rewards(trainer, batch)

    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "loss_type": "grpo",
            "temperature_schedule": "constant",
            "rollout_allocation": "uniform",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 7,
        }
        clock = StepSeconds()
        trainer = E3GRPOTrainer(
            model,
            even_words,
            E3GRPOConfig(**arguments | settings),
            Dataset.from_dict({"prompt": [f"w{2 * i} w{2 * i + 1}" for i in range(num_prompts)]}),
            # AutoTokenizer takes what lies beside a Qwen2 model for a Qwen2Tokenizer.
            processing_class=PreTrainedTokenizerFast.from_pretrained(model),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        steps.shape_rewards = spy
        generate = trainer._generate

        def keep_tokens(prompts):
            output = generate(prompts)
            sampled.append(output[1])
            return output

        trainer._generate = keep_tokens
        try:
            trainer.train()
        finally:
            steps.shape_rewards = shape_rewards
    rows = [
        list(zip(batch.sampled_ids.tolist(), tokens, strict=True))
        for batch, tokens in zip(batches, sampled, strict=True)
    ]
    reused = [sum(one.num_reused for one in batch.rounds) for batch in batches]
    numbers = [sum(map(len, tokens)) - kept for tokens, kept in zip(sampled, reused, strict=True)]
    return rows, np.array(numbers), clock.seconds


def marginals(rows: list[tuple], num_prompts: int, num_tokens: int, vocab_size: int) -> np.ndarray:
    """Share of each token at each place, shape `(prompts, places, tokens)`; what is after an end counts as padding."""
    counts = np.zeros((num_prompts, num_tokens, vocab_size))
    for prompt, tokens in rows:
        padded = [*tokens, *[0] * (num_tokens - len(tokens))]
        counts[prompt, np.arange(num_tokens), padded] += 1
    return counts / counts.sum(axis=2, keepdims=True)


def error_by_token(rows_per_prompt: int, num_tokens: int, learning_rate: float) -> dict:
    """(a), on a model of 16 tokens, of which two prompts are sampled."""
    num_prompts, vocab_size = 2, 16
    with tempfile.TemporaryDirectory() as model:
        make_model(model, vocab_size, hidden_size=32, num_layers=2)
        settings = {
            "num_prompts": num_prompts,
            "num_generations": rows_per_prompt,
            "per_device_train_batch_size": num_prompts * rows_per_prompt // 16,
            "gradient_accumulation_steps": 16,
            "max_completion_length": num_tokens,
            "max_steps": 2,
            "learning_rate": learning_rate,
        }
        (old, fresh), _, _ = train(model, **settings)
        (again, reused), numbers, _ = train(model, **settings, reuse_rollouts=True)
    assert old == again
    halves = fresh[::2], fresh[1::2], reused[::2], old[::2]
    first, second, of_reused, of_old = (marginals(half, num_prompts, num_tokens, vocab_size) for half in halves)

    def variation(rows: np.ndarray) -> list[float]:
        return np.round(np.abs(rows - first).sum(axis=2).mean(axis=0) / 2, 4).tolist()

    by_token = {"noise": variation(second), "reused": variation(of_reused), "old": variation(of_old)}
    return {
        "learning_rate": learning_rate,
        "completions_of_a_prompt": rows_per_prompt // 2,
        "sampled_tokens": float(numbers[1] / numbers[0]),
        "total_variation_to_fresh_ones_by_token": by_token,
        "mean": {name: float(np.mean(values)) for name, values in by_token.items()},
    }


def one_engine() -> None:
    """Let all trainers have the engine that the first has started: each brings its weights."""
    start, engines = vllm_generation.LLM, []

    def engine(**settings):
        if not engines:
            engines.append(start(**settings))
        vars(engines[0]).pop("generate", None)  # what the trainer before has put in its place
        return engines[0]

    vllm_generation.LLM = engine


def savings(engine: str, num_tokens: int, learning_rate: float, num_passes: int, rounds: int) -> dict:
    """(b), of passes of one step."""
    settings = {
        "num_prompts": 16,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 8,
        "max_completion_length": num_tokens,
        "max_steps": num_passes,
        "learning_rate": learning_rate,
    }
    if engine == "vllm":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        one_engine()
        settings |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": num_tokens + 8}
    numbers, seconds = {True: [], False: []}, {True: [], False: []}
    with tempfile.TemporaryDirectory() as model:
        make_model(model, 512, hidden_size=128, num_layers=4)
        for _ in range(rounds):
            for reuses in (False, True):
                _, of_steps, of_clock = train(model, **settings, reuse_rollouts=reuses)
                numbers[reuses].append(of_steps[1:].sum())
                seconds[reuses].append(of_clock[1:])
    ratios = np.array(seconds[True]).sum(axis=1) / np.array(seconds[False]).sum(axis=1)
    return {
        "engine": engine,
        "learning_rate": learning_rate,
        "tokens_at_most": num_tokens,
        "sampled_tokens": float(np.mean(np.array(numbers[True]) / np.array(numbers[False]))),
        "seconds_of_a_step": {
            "fresh": float(np.median(seconds[False])),
            "reused": float(np.median(seconds[True])),
            "ratios": np.round(ratios, 3).tolist(),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=4096, help="completions of a prompt, for the distributions")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion at most, for the savings")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["error", "transformers", "vllm"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4], help="learning rates, for the savings")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(args.output.read_text()) if args.output.exists() else {}

    def note(part: str, measured: list[dict]) -> None:
        result[part] = measured
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        print(measured[-1], flush=True)

    if "error" in args.parts:
        note("error", [error_by_token(args.rows, 16, rate) for rate in (1e-3, 1e-2)])
    for engine in {"transformers", "vllm"} & set(args.parts):
        note(engine, [savings(engine, args.tokens, rate, num_passes=3, rounds=args.rounds) for rate in args.rates])


if __name__ == "__main__":
    main()
