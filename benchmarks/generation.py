"""
Colocated vLLM: one call with each prompt's own number of completions against TRL's call with one request per row, at
the same number of rows and tokens. `python benchmarks/generation.py`.

All kinds of calls take turns on one engine; the ratios are of calls that stood side by side.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from e3_trl import E3GRPOConfig, E3GRPOTrainer, allocate_rollouts


sys.path.insert(0, str(Path(__file__).parent.parent))
from recipes.quickstart.prepare import make_tokenizer
from recipes.quickstart.task import RuleTask


NUM_GENERATIONS = 8
ONE_PER_ROW, EQUAL, BUDGETS = "TRL, one request per row", "equal budgets", "budgets"


def spread(values) -> str:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{median:.3f} ({low:.3f}-{high:.3f})"


def make_model(folder: str, vocab_size: int, hidden_size: int = 256, num_layers: int = 4, num_heads: int = 8) -> None:
    tokenizer = make_tokenizer(RuleTask.characters)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare_calls(
    generation, vocab_size: int, num_prompts: int, prompt_length: int, completion_length: int, rounds: int
) -> dict[str, list[float]]:
    """
    Seconds of each kind of call on one engine, in turns.

    Args:
        generation ([`~e3_trl.grpo.vllm.RolloutGeneration`]):
            a trainer's, which goes on to the longest completion whatever is sampled.
        vocab_size (`int`): of the tokens from 2 on, prompts are made.
        num_prompts, prompt_length, completion_length (`int`): of a call.
        rounds (`int`): calls of each kind, after one that is not counted.
    """
    rows = num_prompts * NUM_GENERATIONS
    rng = np.random.default_rng(0)
    difficulty = rng.permutation(num_prompts) / num_prompts + 1 / num_prompts
    budgets = allocate_rollouts(difficulty, NUM_GENERATIONS, 4, 12)
    uniform = np.full(num_prompts, NUM_GENERATIONS)
    merged, one_per_row = generation.llm.generate, generation._llm_generate

    def call(engine, repeats) -> float:
        """Seconds of one generation batch, of prompts that no cache has seen."""
        prompts = rng.integers(2, vocab_size, size=(num_prompts, prompt_length)).tolist()
        prompt_ids = np.repeat(np.arange(num_prompts), repeats)
        generation.llm.generate = engine
        with generation.seeded([int(rng.integers(1 << 30))]):
            start = time.perf_counter()
            completions = generation.generate([prompts[i] for i in prompt_ids], None, NUM_GENERATIONS)[1]
            seconds = time.perf_counter() - start
        assert sum(map(len, completions)) == rows * completion_length
        return seconds

    kinds = {ONE_PER_ROW: (one_per_row, uniform), EQUAL: (merged, uniform), BUDGETS: (merged, budgets)}
    for kind in kinds.values():
        call(*kind)
    seconds = {name: [] for name in kinds}
    for _ in tqdm(range(rounds)):
        for name in rng.permutation(list(kinds)):
            seconds[name].append(call(*kinds[name]))
    generation.llm.generate = merged
    return seconds


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = str(Path(folder) / "model")
            make_model(model, args.vocab_size)
        rows = args.num_prompts * NUM_GENERATIONS
        config = E3GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            num_generations=NUM_GENERATIONS,
            max_completion_length=args.completion_length,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=args.prompt_length + args.completion_length,
            vllm_gpu_memory_utilization=0.5,
            generation_kwargs={"ignore_eos": True},  # the same number of tokens for all
            model_init_kwargs={"dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            report_to="none",
        )
        dataset = Dataset.from_dict({"prompt": ["1+1="] * args.num_prompts})
        trainer = E3GRPOTrainer(model, lambda completions, **kwargs: [0.0] * len(completions), config, dataset)
        generation = trainer.vllm_generation
        generation.sync_weights()

        vocab_size = len(AutoTokenizer.from_pretrained(model))
        seconds = compare_calls(
            generation, vocab_size, args.num_prompts, args.prompt_length, args.completion_length, args.rounds
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(
        f"{device}; {args.num_prompts} prompts of {args.prompt_length} tokens, {rows} completions of "
        f"{args.completion_length}; medians of {args.rounds} rounds, quartiles in brackets"
    )
    reference = np.array(seconds[ONE_PER_ROW])
    for name, times in seconds.items():
        rate = rows * args.completion_length / np.array(times)
        print(f"{name:32} {np.median(rate):9.0f} tokens/s, {spread(reference / times)} times TRL's")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="a real model; without it a small one is made")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--completion_length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())
