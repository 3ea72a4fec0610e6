"""
What a sync of a LoRA policy to a colocated vLLM sends, and how long it takes: the adapter alone (`vllm_lora_sync`)
against all weights, merged. `python benchmarks/lora_sync.py`.

The two take turns, on an engine each. On a GPU all weights go TRL's way; on a CPU, where that fails, they go by vLLM's
own reload, as FastGRPOTrainer does it there.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from trl.generation import vllm_generation

from e3_trl import FastGRPOConfig, FastGRPOTrainer
from e3_trl.grpo import adapter_sync


sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.generation import make_model, spread


def bytes_of_sync(generation) -> int:
    """What the next sync hands to the engine."""
    if not generation._syncs_adapter:
        return sum(tensor.nbytes for _, tensor in generation._iter_named_params())
    sent, save_file = [], adapter_sync.save_file
    adapter_sync.save_file = lambda tensors, path: (sent.extend(tensors.values()), save_file(tensors, path))
    try:
        generation.sync_weights()
    finally:
        adapter_sync.save_file = save_file
    return sum(tensor.nbytes for tensor in sent)


def no_reward(completions, **kwargs) -> list[float]:
    return [0.0] * len(completions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    vllm_generation.LLM = partial(vllm_generation.LLM, enforce_eager=True)
    prompts = Dataset.from_dict({"prompt": [f"A{number}:" for number in range(10, 26)]})
    generations, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, 8192, args.hidden_size, args.num_layers, num_heads=args.hidden_size // 64)
        for name, alone in {"all weights": False, "the adapter alone": True}.items():
            config = FastGRPOConfig(
                output_dir=f"{folder}/run",
                report_to="none",
                use_cpu=not on_gpu,
                bf16=on_gpu,
                use_vllm=True,
                vllm_mode="colocate",
                vllm_lora_sync=alone,
                vllm_max_model_length=256,
                vllm_gpu_memory_utilization=0.2,
                max_completion_length=64,
                model_init_kwargs={"dtype": "float32"},
            )
            lora = LoraConfig(r=args.rank, target_modules="all-linear", init_lora_weights=False)
            trainer = FastGRPOTrainer(folder, no_reward, config, prompts, peft_config=lora)
            generations[name], seconds[name] = trainer.vllm_generation, []
            print(f"{name}: {bytes_of_sync(trainer.vllm_generation) / 1e6:.2f} MB per sync")
        for warm_up in range(-1, args.rounds):
            for name, generation in generations.items():
                start = time.perf_counter()
                generation.sync_weights()
                if on_gpu:
                    torch.cuda.synchronize()
                if warm_up >= 0:
                    seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name}: {spread(times)} s per sync")
    ratios = np.array(seconds["all weights"]) / seconds["the adapter alone"]
    print(f"times as fast: {np.median(ratios):.1f} ({ratios.min():.1f} - {ratios.max():.1f})")


if __name__ == "__main__":
    main()
