"""
A training step of FastGRPOTrainer against one of stock GRPOTrainer on the same rows:
`python benchmarks/optimizer.py`, which is in `make benchmark`; `--plot` draws what it has measured.

All trainers are in one process and take turns of one step each. A ratio is of two turns that stood side by side. The
optimizer phase is all that TRL does once it has completions and rewards: scoring passes, losses, backward passes,
clipping, the optimizer's step. On a CPU, of which one core is used, the time is the processor's: other jobs on the
machine take none of it.
Completions are forced, so a whole step is here one of an engine that takes no time; `--sections quickstart
--quickstart_model outputs/quickstart-base` has one with transformers' generate.

What can be saved depends on the rows, and each lever has a setting in which it is the only one that acts:

1. Padding: completions of long-tailed lengths. They come without an engine's log-probs, so stock makes no second pass.
2. One forward pass in the place of two: completions of one length. They come with log-probs and vLLM's importance
   sampling correction is on, for which stock computes the policy's log-probs of all rows, and the loss them again.
   There is no engine: `use_vllm` is set after the trainer is made, and log-probs near -ln|V| are made up.
3. Rows without a backward pass: completions of one length, of which half, whole groups, have the advantage 0. They
   come with log-probs and without the correction, as in the paper's recipes, so stock makes no second pass.

The last setting has nothing to save. In all of them E3's gradient is compared with stock's. On a GPU, where nothing
but torch, transformers, trl, accelerate, peft and datasets is needed, a model of random weights in bfloat16 with
gradient checkpointing:

    python benchmarks/optimizer.py --device cuda --model qwen2-1.5b --length 4096 --sections levers \
      --levers 1 1+2 1+2+3 none --repeats 2 --output benchmarks/results/optimizer_gpu.json
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from e3_trl import (
    DifficultyTracker,
    E3GRPOConfig,
    E3GRPOTrainer,
    FastGRPOConfig,
    FastGRPOTrainer,
    RolloutBudgetSchedule,
)
from e3_trl.batch.sampler import RolloutBudgetSampler
from e3_trl.grpo.plan import plan_micro_batches


sys.path.insert(0, str(Path(__file__).parent.parent))
from recipes.quickstart.prepare import make_tokenizer
from recipes.quickstart.task import RuleTask, answer_reward


ROOT = Path(__file__).parent.parent
NUM_GENERATIONS = 8
USEFUL_TOKENS = 0.41  # of stock's, where completions are long-tailed
MODELS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 2048},
    "wide": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 4, "vocab_size": 32_768},
    "qwen2-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936},
}
HEADS = {"tiny": (2, 1), "small": (8, 2), "wide": (12, 2), "qwen2-1.5b": (12, 2)}
STOCK = "stock"
VARIANTS = {
    "rows": {"micro_batching": "rows"},
    "tokens": {"micro_batching": "tokens"},
    "rows, sampled entropy": {"micro_batching": "rows", "entropy_estimator": "sampled"},
    "tokens, sampled entropy": {"micro_batching": "tokens", "entropy_estimator": "sampled"},
}


@dataclass(frozen=True)
class Setting:
    """
    Rows that levers act on.

    Args:
        levers (`str`): those that act.
        long_tailed (`bool`): whether completions differ in length. Otherwise they all have the greatest.
        has_logps (`bool`): whether they come with log-probs, as from an engine.
        corrects (`bool`): whether vLLM's importance sampling correction is on.
        half_zero (`bool`): whether every other group has equal rewards.
        target (`float`, *optional*): optimizer phase over stock's that is aimed at.
    """

    levers: str
    long_tailed: bool = False
    has_logps: bool = False
    corrects: bool = False
    half_zero: bool = False
    target: float | None = None


SETTINGS = [
    Setting("1", long_tailed=True, target=0.45),
    Setting("2", has_logps=True, corrects=True),
    Setting("3", has_logps=True, half_zero=True),
    Setting("1+2", long_tailed=True, has_logps=True, corrects=True, target=0.36),
    Setting("1+2+3", long_tailed=True, has_logps=True, corrects=True, half_zero=True, target=0.25),
    Setting("none", target=1.02),
]
ALL_LEVERS = SETTINGS[4]


class Rows:
    """The rows of every step: forced completions, and rewards of which every other group's are equal or none's."""

    def __init__(self, num_rows: int, max_length: int, prompt_length: int, vocab_size: int):
        self.num_rows, self.max_length, self.prompt_length = num_rows, max_length, prompt_length
        self.vocab_size = vocab_size
        self.setting = SETTINGS[0]
        self.order = 0  # in which TRL puts the rows into micro-batches

    def lengths(self) -> np.ndarray:
        """Of the completions, in the order of their prompts."""
        if not self.setting.long_tailed:
            return np.full(self.num_rows, self.max_length)
        # Log-normal, its tail cut off, its scale such that the share of useful tokens is the same for all lengths.
        normal = torch.special.ndtri((torch.arange(self.num_rows) + 0.5) / self.num_rows).numpy()
        scales = np.linspace(0, 0.5, 501)[1:, None] * self.max_length
        lengths = np.clip(scales * np.exp(0.8 * normal), 2, self.max_length).astype(int)
        best = np.abs((lengths + self.prompt_length).mean(axis=1) / self.width - USEFUL_TOKENS).argmin()
        return np.random.default_rng(0).permutation(lengths[best])

    @property
    def width(self) -> int:
        """Tokens of each row of stock's micro-batches, padding included."""
        return self.prompt_length + self.max_length

    @property
    def useful_tokens(self) -> float:
        """Share of stock's tokens that are no padding."""
        return float((self.lengths() + self.prompt_length).mean() / self.width)

    def generate(self, prompt_ids, *args, **kwargs):
        rng = np.random.default_rng(1)
        completions = [rng.integers(3, 12, size=length - 1).tolist() + [1] for length in self.lengths()]
        torch.manual_seed(self.order)  # TRL shuffles the rows
        if not self.setting.has_logps:
            return completions, None
        logps = [(rng.normal(0, 0.1, len(ids)) - np.log(self.vocab_size)).tolist() for ids in completions]
        return completions, logps

    def reward(self, completion_ids, **kwargs) -> list[float]:
        groups = np.arange(self.num_rows) // NUM_GENERATIONS
        rewards = np.array([sum(ids) % 97 for ids in completion_ids], dtype=float)
        return np.where((groups % 2 == 1) & self.setting.half_zero, 1.0, rewards).tolist()


class StepClock(TrainerCallback):
    """Times one step of a trainer and its parts, and keeps its gradient if asked to."""

    def __init__(self):
        self.gradient, self.keeps_gradient = None, False

    def watch(self, trainer) -> None:
        self.cuda = trainer.accelerator.device.type == "cuda"
        for name in ("get_batch_samples", "training_step", "_generate", "_calculate_rewards"):
            setattr(trainer, name, self._timed(name, getattr(trainer, name)))
        trainer.add_callback(self)

    def _timed(self, name: str, function):
        def timed(*args, **kwargs):
            start = self._now()
            self.first.setdefault(name, start)
            output = function(*args, **kwargs)
            self.spent[name] = self.spent.get(name, 0.0) + self._now() - start
            return output

        return timed

    def _now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.spent = {}, {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        start = self._now()
        if self.keeps_gradient:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            self.gradient = torch.cat([gradient.flatten().cpu().float() for gradient in gradients])
        self.spent["gradient"] = self._now() - start  # which is no part of a step

    def on_step_end(self, args, state, control, **kwargs):
        end = self._now() - self.spent["gradient"]
        self.generation = self.spent["_generate"]
        self.step = end - self.first["get_batch_samples"]
        self.optimizer = end - self.first["training_step"] - self.generation - self.spent["_calculate_rewards"]


class Bench:
    """
    Stock GRPOTrainer and variants of FastGRPOTrainer that take turns.

    Args:
        trainers (`dict`): by name, that of stock among them.
        clock (`type`, *optional*): the [`StepClock`] that times each.
    """

    def __init__(self, trainers: dict, clock: type[StepClock] = StepClock):
        self.trainers = trainers
        self.clocks = {}
        for name, trainer in trainers.items():
            trainer.remove_callback(PrinterCallback)
            self.clocks[name] = clock()
            self.clocks[name].watch(trainer)

    def turn(self, name: str) -> dict[str, float]:
        """One step; its seconds."""
        set_seed(0)
        self.trainers[name].train()
        clock = self.clocks[name]
        return {"optimizer": clock.optimizer, "step": clock.step, "generation": clock.generation}

    def ratios(self, names: list[str], repeats: int, progress, stock: str = STOCK) -> dict[str, dict]:
        """Each variant's seconds over those of the stock turn beside it. Variants go in twos."""
        found = {name: {"optimizer": [], "step": []} for name in names}
        shares = {name: [] for name in [stock, *names]}
        for one, *other in (names[start : start + 2] for start in range(0, len(names), 2)):
            pair = [one, *(other or [one])]
            beside = self.turn(stock)
            for repeat in range(repeats):
                first, second = pair if repeat % 2 == 0 else pair[::-1]
                turns = self.turn(first), self.turn(second)
                after = self.turn(stock)
                for name, turn, reference in zip((first, second), turns, (beside, after), strict=True):
                    shares[name].append(turn["generation"] / turn["step"])
                    shares[stock].append(reference["generation"] / reference["step"])
                    for part in ("optimizer", "step"):
                        found[name][part].append(turn[part] / reference[part])
                beside = after
                progress.update(3)
        return {
            name: {part: spread(values) for part, values in parts.items()}
            | {"generation_share": float(np.median(shares[name])), "stock_share": float(np.median(shares[stock]))}
            for name, parts in found.items()
        }

    def gradients(self, names: list[str]) -> dict[str, float]:
        """Norm of the difference of each variant's gradient from stock's, relative to stock's."""
        gradients = {}
        for name in [STOCK, *names]:
            clock = self.clocks[name]
            clock.keeps_gradient = True
            self.turn(name)
            gradients[name], clock.gradient, clock.keeps_gradient = clock.gradient, None, False
        expected = gradients[STOCK]
        return {
            name: (torch.linalg.norm(gradients[name] - expected) / torch.linalg.norm(expected)).item()
            for name in names
        }

    def peak_memory(self, name: str) -> int:
        """Bytes of tensors that a step has at its peak, the model's parameters and its optimizer's state included."""
        trainer = self.trainers[name]
        own = [*trainer.model.parameters(), *trainer.model.buffers()]
        if trainer.optimizer is not None:
            own += [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
        resident = sum(value.nbytes for value in own if isinstance(value, torch.Tensor))
        if trainer.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.turn(name)
            return resident + torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.turn(name)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return resident + int(np.cumsum([event.nbytes() for event in events]).max())


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    numbers = {"median": median, "q25": low, "q75": high, "min": min(values), "max": max(values)}
    return {name: round(float(number), 4) for name, number in numbers.items()}


def show(numbers: dict[str, float]) -> str:
    return f"{numbers['median']:6.3f} ({numbers['q25']:.3f}-{numbers['q75']:.3f})"


def make_model(name: str, max_positions: int, device: str, tied: bool = False) -> Qwen2ForCausalLM:
    """Randomly initialised, the same weights each time."""
    tokenizer = make_tokenizer(RuleTask.characters)
    heads, key_value_heads = HEADS[name]
    config = Qwen2Config(
        **MODELS[name],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    return model.to(torch.bfloat16) if device == "cuda" else model


def make_bench(
    model: str, rows: int, length: int, args: argparse.Namespace, folder: str, names=tuple(VARIANTS)
) -> tuple[Bench, Rows]:
    """Stock and variants on `rows` rows of at most `length` tokens, and what decides on them."""
    cuda = args.device == "cuda"
    work = Rows(rows, length, args.prompt_length, MODELS[model]["vocab_size"])
    num_groups = rows // NUM_GENERATIONS
    dataset = Dataset.from_dict({"prompt": [f"{i:0{args.prompt_length - 1}}=" for i in range(num_groups)]})
    settings = {
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": rows // args.micro_batch,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": length,
        "loss_type": "grpo",
        "vllm_importance_sampling_mode": "token_truncate",
        "max_steps": 1,
        "learning_rate": 0.0,  # the same rows and gradients in every turn
        "optim": "sgd" if cuda else "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not cuda,
        "bf16": False,  # on a GPU the weights are
        "gradient_checkpointing": cuda,
        "disable_tqdm": True,
    }
    trainers = {}
    for name in [STOCK, *names]:
        trainer_class, config_class, own = GRPOTrainer, GRPOConfig, {}
        if name != STOCK:
            trainer_class, config_class, own = FastGRPOTrainer, FastGRPOConfig, VARIANTS[name]
        if "entropy_estimator" in own:  # which is E3's
            trainer_class, config_class = E3GRPOTrainer, E3GRPOConfig
            own = {"rollout_allocation": "uniform", "temperature_schedule": "constant", **own}
        trainers[name] = trainer = trainer_class(
            make_model(model, args.prompt_length + length, args.device),
            work.reward,
            config_class(output_dir=f"{folder}/{name}", **settings | own),
            dataset,
            processing_class=make_tokenizer(RuleTask.characters),
        )
        trainer._generate_single_turn = work.generate
        trainer.vllm_generation = SimpleNamespace(seeded=lambda *args: nullcontext())
    return Bench(trainers), work


def choose(bench: Bench, work: Rows, setting: Setting) -> None:
    """Put a setting in force."""
    work.setting = setting
    for trainer in bench.trainers.values():
        trainer.use_vllm = setting.has_logps
        trainer.vllm_importance_sampling_correction = setting.corrects


def measure_levers(args: argparse.Namespace, folder: str) -> list[dict]:
    """Each lever alone, and together."""
    bench, work = make_bench(args.model, args.rows, args.length, args, folder)
    settings = [setting for setting in SETTINGS if not args.levers or setting.levers in args.levers]
    variants = {setting: list(VARIANTS)[: 4 if setting.half_zero else 2] for setting in settings}
    found = []
    with tqdm(total=sum(args.repeats * len(names) // 2 * 3 for names in variants.values())) as progress:
        for setting, names in variants.items():
            choose(bench, work, setting)
            gradients = bench.gradients(names)  # also warms up
            memory = {name: bench.peak_memory(name) for name in [STOCK, *names]}
            ratios = bench.ratios(names, args.repeats, progress)
            for name in names:
                found.append(
                    {"levers": setting.levers, "variant": name, "target": setting.target}
                    | {"useful_tokens": round(work.useful_tokens, 3)}
                    | {part: ratios[name][part] for part in ("optimizer", "step")}
                    | {"memory": round(memory[name] / memory[STOCK], 4), "gradient_difference": gradients[name]}
                )
                if args.device == "cuda":
                    found[-1] |= throughput(bench, work, name, memory)
                print_lever(found[-1], progress)
    return found


def throughput(bench: Bench, work: Rows, name: str, memory: dict[str, int]) -> dict:
    """Useful tokens per second of the optimizer phase and GiB at its peak, stock's after it, from one turn each."""
    seconds = [bench.turn(one)["optimizer"] for one in (name, STOCK)]
    return {
        "tokens_per_second": [round(work.lengths().sum() / second) for second in seconds],
        "peak_gib": [round(memory[one] / 2**30, 2) for one in (name, STOCK)],
    }


def print_lever(found: dict, progress) -> None:
    progress.write(
        f"levers {found['levers']:6} {found['variant']:24} optimizer {show(found['optimizer'])}  "
        f"step {show(found['step'])}  memory {found['memory']:.3f}  "
        f"gradient {found['gradient_difference']:.1e}  target {found['target']}"
        + "".join(f"  {name} {found[name]}" for name in ("tokens_per_second", "peak_gib") if name in found)
    )


def measure_growth(args: argparse.Namespace, folder: str) -> dict[str, list[dict]]:
    """All levers together as rows, and the longest completion, become more."""
    found = {"rows": [], "length": []}
    sizes = [("rows", rows, args.growth_length) for rows in args.growth_rows]
    sizes += [("length", args.growth_num_rows, length) for length in args.growth_lengths]
    names = ["rows", "tokens"]
    with tqdm(total=3 * args.growth_repeats * len(sizes)) as progress:
        for axis, rows, length in sizes:
            bench, work = make_bench(args.growth_model, rows, length, args, folder, names)
            choose(bench, work, ALL_LEVERS)
            gradients = bench.gradients(names)
            ratios = bench.ratios(names, args.growth_repeats, progress)
            for name in names:
                found[axis].append(
                    {"rows": rows, "length": length, "variant": name}
                    | {part: ratios[name][part] for part in ("optimizer", "step")}
                    | {"gradient_difference": gradients[name]}
                )
                progress.write(
                    f"{rows:5} rows of up to {length:5} tokens, {name:7} optimizer "
                    f"{show(ratios[name]['optimizer'])}  step {show(ratios[name]['step'])}  "
                    f"gradient {gradients[name]:.1e}"
                )
    return found


def milliseconds(function, repeats: int) -> dict[str, float]:
    measured = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        measured.append(1e3 * (time.process_time() - start))
    return spread(measured)


def measure_plan(args: argparse.Namespace) -> list[dict]:
    """The plan of 1,024 rows, their prompts and completions long-tailed, half of them with advantage 0."""
    lengths = Rows(1024, 2048, 16, 2).lengths()
    prompts, completions = np.roll(lengths, 1)[None] // 4, lengths[None]
    needs_gradient = (np.arange(1024) // NUM_GENERATIONS % 2 == 0)[None]
    longest = int((prompts + completions).max())
    found = []
    for policy, max_tokens in (("rows", None), ("tokens", 4 * longest), ("tokens, their limit too low", longest)):
        measured = milliseconds(
            lambda max_tokens=max_tokens: plan_micro_batches(prompts, completions, needs_gradient, 256, max_tokens),
            repeats=100,
        )
        found.append({"policy": policy, "milliseconds": measured, "target": 5.0})
        print(f"plan of 1,024 rows, {policy}: {show(measured)} ms (at most {measured['max']:.2f}), target 5")
    return found


def measure_dataset(args: argparse.Namespace) -> list[dict]:
    """E3's work as the dataset grows: once per pass (ranks, and the order that TRL draws too), and per step."""
    found = []
    for num_prompts in tqdm(args.num_prompts):
        tracker = DifficultyTracker(num_prompts)
        rng = np.random.default_rng(0)
        tracker.num_rollouts[:] = rng.integers(8, 37, num_prompts)
        tracker.reward_sum[:] = rng.binomial(tracker.num_rollouts, 0.5)
        sampler = RolloutBudgetSampler(
            tracker,
            RolloutBudgetSchedule(NUM_GENERATIONS, 4, 12, 2),
            data_source=range(num_prompts),
            mini_repeat_count=NUM_GENERATIONS,
            batch_size=128,
            shuffle=True,
            seed=0,
        )
        ranks = milliseconds(tracker.update, repeats=10)
        sampler.begin_pass(2)
        # Steps of 1,024 rows. The first one draws the pass's order; transformers' loader asks row by row.
        stream, steps = iter(sampler), []
        start = time.process_time()
        next(stream)
        first = 1e3 * (time.process_time() - start)
        for _ in range(50):
            start = time.process_time()
            ids = np.array([next(stream) for _ in range(1024)])
            tracker.observe(ids, np.ones(1024))
            steps.append(1e3 * (time.process_time() - start))
        found.append({"prompts": num_prompts, "ranks_ms": ranks, "first_row_ms": first, "step_ms": spread(steps)})
        tqdm.write(
            f"{num_prompts:9,} prompts: ranks {show(ranks)} ms and order {first:.0f} ms once per pass; "
            f"a step of 1,024 rows {show(spread(steps))} ms"
        )
    return found


def measure_quickstart(args: argparse.Namespace, folder: str) -> list[dict]:
    """A whole step of the quickstart's config_e3, with transformers' generate, at its 128 rows in other batches."""
    recipe = yaml.safe_load((ROOT / "recipes/quickstart/config_e3.yaml").read_text())
    not_grpo = ("annealing_", "dataset_", "dtype", "model_name", "num_generations_", "reward_", "rollout_", "save_")
    recipe = {name: value for name, value in recipe.items() if not name.startswith((*not_grpo, "temperature_"))}
    recipe |= {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no", "disable_tqdm": True}
    data = load_dataset("json", data_files=str(Path(args.quickstart_model) / "train.jsonl"), split="train")
    trainers = {}
    for size in args.quickstart_sizes:
        for name in [STOCK, "rows", "tokens"]:
            is_stock = name == STOCK
            config = (GRPOConfig if is_stock else FastGRPOConfig)(
                **recipe
                | VARIANTS.get(name, {})
                | {"output_dir": f"{folder}/{name}-{size}"}
                | {"per_device_train_batch_size": size, "gradient_accumulation_steps": 128 // size}
            )
            trainers[f"{name} {size}"] = (GRPOTrainer if is_stock else FastGRPOTrainer)(
                args.quickstart_model, answer_reward, config, data
            )
    bench = Bench(trainers)
    names = [name for name in trainers if name != f"{STOCK} 128"]
    for name in trainers:
        bench.turn(name)
    with tqdm(total=3 * args.repeats * -(-len(names) // 2)) as progress:
        ratios = bench.ratios(names, args.repeats, progress, stock=f"{STOCK} 128")
    found = []
    for name, ratio in ratios.items():
        variant, size = name.rsplit(" ", 1)
        found.append({"variant": variant, "per_device_train_batch_size": int(size), **ratio})
        print(
            f"quickstart, {variant:7} {size:>3} x {128 // int(size):<2} over stock 128 x 1: "
            f"step {show(ratio['step'])}  optimizer {show(ratio['optimizer'])}  "
            f"generation's share {ratio['generation_share']:.2f}, stock's {ratio['stock_share']:.2f}"
        )
    return found


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "capability": None}
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "numpy")}


LABELS = {
    "1": "1: less padding",
    "2": "2: one forward pass, not two",
    "3": "3: half the rows\nwithout backward pass",
    "1+2": "1 and 2",
    "1+2+3": "1, 2 and 3",
    "none": "nothing to save",
}
COLORS = {"rows": "#1f77b4", "tokens": "#ff7f0e"}


def plot(results: dict, path: str) -> None:
    """Bars of the optimizer phase over stock's per setting, and of how it grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, (left, *right) = plt.subplots(
        1, 3, figsize=(11, 4.6), width_ratios=(2.2, 1, 1), layout="constrained", sharey=False
    )
    by_key = {(found["levers"], found["variant"]): found for found in results["levers"]}
    order = [levers for levers in LABELS if (levers, "rows") in by_key]
    for place, levers in enumerate(order):
        variants = [variant for variant in VARIANTS if (levers, variant) in by_key]
        height = 0.8 / len(variants)
        for index, variant in enumerate(variants):
            found = by_key[levers, variant]
            ratio = found["optimizer"]
            y = place - 0.4 + (index + 0.5) * height
            left.barh(
                y,
                ratio["median"],
                height * 0.9,
                xerr=[[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]],
                color=COLORS[variant.split(",")[0]],
                hatch="///" * variant.endswith("entropy"),
                edgecolor="white",
                error_kw={"elinewidth": 1, "capsize": 2},
            )
            right_of = max(ratio["max"], found["target"] or 0) if (found["target"] or 1) < 1 else ratio["max"]
            left.text(right_of + 0.015, y, f"{ratio['median']:.2f}", va="center", fontsize=8)
        if found["target"] is not None and found["target"] < 1:
            left.plot([found["target"]] * 2, [place - 0.42, place + 0.42], color="black", linestyle=":")
    left.set_yticks(range(len(order)), [LABELS[levers] for levers in order])
    left.invert_yaxis()
    left.axvline(1, color="black", linewidth=1)
    left.set_xlim(0, 1.15)
    left.set_xlabel("optimizer phase: time / stock GRPOTrainer's")
    handles = [Patch(color=color, label=f"micro_batching: {name}") for name, color in COLORS.items()]
    handles += [Patch(facecolor="0.7", edgecolor="white", hatch="///", label="entropy_estimator: sampled")]
    handles += [Line2D([], [], color="black", label="stock"), Line2D([], [], color="black", ls=":", label="aim")]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    titles = {"rows": "rows per step", "length": "longest completion (tokens)"}
    for axes, (axis, points) in zip(right, results.get("growth", {}).items(), strict=False):
        for variant, color in COLORS.items():
            ours = [point for point in points if point["variant"] == variant]
            ratios = [point["optimizer"] for point in ours]
            median = [ratio["median"] for ratio in ratios]
            errors = [[ratio["median"] - ratio["min"] for ratio in ratios]]
            errors += [[ratio["max"] - ratio["median"] for ratio in ratios]]
            places = [point[axis] for point in ours]
            axes.errorbar(places, median, errors, color=color, marker="o", markersize=4, capsize=2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:,}" for place in places])
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xlim(places[0] / 1.5, places[-1] * 1.5)
        axes.set_ylim(0, 1.1)
        axes.set_xlabel(titles[axis] + "\n(1, 2 and 3)")
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(args: argparse.Namespace) -> None:
    if args.plot:
        plot(json.loads(Path(args.output).read_text()), args.plot)
        return
    logging.getLogger("e3_trl").setLevel(logging.ERROR)  # each turn is a new run in the folder of the last
    if args.device == "cpu":
        torch.set_num_threads(1)
    output = Path(args.output)
    # What another call has measured stays.
    results = json.loads(output.read_text()) if output.exists() else {}
    results["machine"] = machine(args.device)
    kept = ("model", "rows", "micro_batch", "length", "prompt_length", "repeats", "growth_model", "growth_repeats")
    results["arguments"] = {name: getattr(args, name) for name in kept}
    with tempfile.TemporaryDirectory() as folder:
        for section in args.sections:
            if section == "levers":
                found = measure_levers(args, folder)
                measured = {one["levers"] for one in found}
                found += [one for one in results.get("levers", []) if one["levers"] not in measured]
                results["levers"] = found
            elif section == "growth":
                results["growth"] = measure_growth(args, folder)
            elif section == "plan":
                results["plan"] = measure_plan(args)
            elif section == "dataset":
                results["dataset"] = measure_dataset(args)
            else:
                results["quickstart"] = measure_quickstart(args, folder)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest completion")
    parser.add_argument("--prompt_length", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--levers", nargs="*", help="settings; all if left out")
    parser.add_argument("--growth_model", choices=list(MODELS), default="tiny")
    parser.add_argument("--growth_repeats", type=int, default=3)
    parser.add_argument("--growth_rows", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--growth_length", type=int, default=32)
    parser.add_argument("--growth_num_rows", type=int, default=32)
    parser.add_argument("--growth_lengths", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--num_prompts", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--quickstart_model", help="folder that recipes.quickstart.prepare has made")
    parser.add_argument("--quickstart_sizes", type=int, nargs="*", default=[128, 64, 32, 16])
    sections = ["levers", "growth", "plan", "dataset", "quickstart"]
    parser.add_argument("--sections", nargs="*", choices=sections, default=sections[:-1])
    parser.add_argument(
        "--plot", nargs="?", const=str(ROOT / "docs" / "optimizer.png"), help="draw the results there, measure nothing"
    )
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "optimizer_cpu.json"))
    main(parser.parse_args())
