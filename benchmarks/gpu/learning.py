"""
Does it learn? 60 steps of GRPO and of E3 with vLLM, and pass@k of held-out problems before and after. `--model`
names a folder with a model, `train.jsonl` and `test.jsonl`; without it, that of the quickstart is made.
"""

from functools import cache, partial
from pathlib import Path

from datasets import load_dataset
from trl.generation import vllm_generation

from e3_trl import E3GRPOConfig, E3GRPOTrainer, FastGRPOConfig, FastGRPOTrainer
from e3_trl.rewards import load_reward_func
from recipes.quickstart.prepare import NUM_STEPS, PROBLEMS, make_base
from recipes.quickstart.task import RuleTask

from .engine import hold
from .report import Case
from .step import one_engine


NUM_SAMPLES = 8
TRAINERS = {"GRPO": (FastGRPOTrainer, FastGRPOConfig), "E3": (E3GRPOTrainer, E3GRPOConfig)}


def measure(case: Case) -> None:
    model = case.model or case.path("quickstart")
    if case.model is None and not (Path(model) / "model.safetensors").exists():
        steps = 20 if case.miniature else NUM_STEPS
        make_base(RuleTask(0), Path(model), 0, steps, PROBLEMS, use_cpu=case.miniature)
    is_quickstart = case.model is None
    data = {split: str(Path(case.data or model) / f"{split}.jsonl") for split in ("train", "test")}
    data = load_dataset("json", data_files=data)
    # Few enough for several passes, of which E3 learns what is difficult.
    sizes = {"train": 8, "test": 4} if case.miniature else {"train": 128, "test": 64}
    problems = {
        split: data[split].shuffle(seed=0).select(range(min(size, len(data[split])))) for split, size in sizes.items()
    }
    own = "recipes.quickstart.task.answer_reward" if is_quickstart else "reasoning_gym_reward"
    reward = load_reward_func(case.reward or own)
    vllm_generation.LLM = partial(one_engine, cache(vllm_generation.LLM))
    before = {}
    for name, (trainer_class, config_class) in TRAINERS.items():
        config = config_class(
            output_dir=case.path(f"learning-{name}"),
            **case.settings,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=1 if case.miniature else 2,
            per_device_eval_batch_size=32,
            num_generations=8,
            num_generations_eval=NUM_SAMPLES,
            max_completion_length=RuleTask.max_completion_length if is_quickstart else 64,
            max_steps=3 if case.miniature else 60,
            learning_rate=2e-4 if is_quickstart else 1e-5,
            lr_scheduler_type="constant",
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=256 if is_quickstart or case.miniature else 512,
            vllm_gpu_memory_utilization=0.3,
            vllm_importance_sampling_mode="token_truncate",
            model_init_kwargs={"dtype": "float32"},
            bf16=not case.miniature,
            gradient_checkpointing=False,
        )
        trainer = trainer_class(model, reward, config, problems["train"], problems["test"])
        if not before:
            before = trainer.evaluate()
            for k in (1, NUM_SAMPLES):
                case.add(f"held-out pass@{k} before", before[f"eval_pass@{k}"])
        trainer.train()
        after = trainer.evaluate()
        for k in (1, NUM_SAMPLES):
            case.add(f"held-out pass@{k} after, {name}", after[f"eval_pass@{k}"])
        limits = {} if case.miniature else {"at_least": 0.02}
        case.add(f"gain of pass@1, {name}", after["eval_pass@1"] - before["eval_pass@1"], **limits)
        hold(case, trainer, name)
