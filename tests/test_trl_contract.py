"""
What e3_trl hooks in TRL, transformers and accelerate. None of them promises to keep it, so an upgrade has to fail
here, by name, and not in a training run.
"""

import configparser
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import Trainer
from transformers import trainer as transformers_trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils

from e3_trl import E3GRPOTrainer
from e3_trl.runs import checkpoint


def test_version_is_the_tested_one():
    """Of every package, however it was installed: `make compat` is on the ends of what setup.cfg allows."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    for line in setup["options"]["install_requires"].split("\n")[1:]:
        requirement = Requirement(line)
        installed = version(requirement.name)
        assert installed in requirement.specifier, (
            f"{requirement.name} is {installed}. Run the whole suite with it, then widen setup.cfg."
        )


@pytest.mark.parametrize(
    "name", ["PREFIX_CHECKPOINT_DIR", "SAFE_WEIGHTS_INDEX_NAME", "SAFE_WEIGHTS_NAME", "TRAINER_STATE_NAME"]
)
def test_a_checkpoints_files_have_the_names_that_are_read(name):
    assert getattr(checkpoint, name) == getattr(transformers_trainer, name)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (GRPOTrainer._get_train_sampler, ["self", "dataset"]),
        (
            GRPOTrainer._calculate_rewards,
            ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        ),
        (GRPOTrainer._generate, ["self", "prompts"]),
        (GRPOTrainer._generate_and_score_completions, ["self", "inputs"]),
        (GRPOTrainer._compute_loss, ["self", "model", "inputs"]),
        (GRPOTrainer._prepare_inputs, ["self", "generation_batch"]),
        (GRPOTrainer._save_checkpoint, ["self", "model", "trial"]),
        (GRPOTrainer._load_optimizer_and_scheduler, ["self", "checkpoint"]),
        (GRPOTrainer._set_signature_columns_if_needed, ["self"]),
        (GRPOTrainer.create_model_card, ["self", "model_name", "dataset_name", "tags"]),
        (Trainer.save_model, ["self", "output_dir", "_internal_call"]),
        (Trainer._get_output_dir, ["self", "trial"]),
        (
            Trainer._get_dataloader,
            ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        ),
        (Trainer.get_batch_samples, ["self", "epoch_iterator", "num_batches", "device"]),
        (
            utils.RepeatSampler.__init__,
            ["self", "data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"],
        ),
        (utils.add_fused_lm_head, ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]),
        (utils.nanstd, ["tensor", "dim", "keepdim"]),
        (utils.get_callable_name, None),
        (GRPOTrainer._tokenize_prompts, ["self", "prompts"]),
        (
            GRPOTrainer._generate_single_turn,
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        (
            GRPOTrainer._get_per_token_logps_and_entropies,
            [
                "self",
                "model",
                "input_ids",
                "attention_mask",
                "logits_to_keep",
                "batch_size",
                "compute_entropy",
                "compute_aux_loss",
                "pixel_values",
                "image_grid_thw",
                "num_images",
                "pixel_attention_mask",
                "spatial_shapes",
                "num_tiles",
                "image_sizes",
                "token_type_ids",
                "mm_token_type_ids",
                "image_position_ids",
            ],
        ),
        (
            GRPOTrainer.evaluation_loop,
            ["self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
        ),
        (GRPOTrainer.train, ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        (VLLMGeneration.generate, ["self", "prompts", "images", "num_generations", "profiler"]),
        (VLLMGeneration.sync_weights, ["self"]),
        (VLLMGeneration._iter_named_params, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signature(function, parameters):
    if parameters is not None:
        assert list(inspect.signature(function).parameters) == parameters


def test_the_first_arguments_keep_their_places():
    """They may be passed by position."""
    mine = list(inspect.signature(E3GRPOTrainer.__init__).parameters)[:-1]
    assert list(inspect.signature(GRPOTrainer.__init__).parameters)[: len(mine)] == mine


def test_the_fused_head_reads_the_temperature_from_its_closure():
    code = next(
        constant
        for constant in utils.add_fused_lm_head.__code__.co_consts
        if getattr(constant, "co_name", "") == "_fused_forward"
    )
    assert "temperature" in code.co_freevars


def test_every_override_calls_super():
    for name, member in vars(E3GRPOTrainer).items():
        if inspect.isfunction(member) and hasattr(GRPOTrainer, name):
            assert f"super().{name}(" in inspect.getsource(member), name


def test_the_signature_of_every_override_is_pinned():
    pinned = {function.__name__ for (function, _) in test_signature.pytestmark[0].args[1]}
    for name, member in vars(E3GRPOTrainer).items():
        if inspect.isfunction(member) and hasattr(GRPOTrainer, name) and name != "__init__":
            assert name in pinned


def test_class_docstring_lists_every_override():
    for name, member in vars(E3GRPOTrainer).items():
        if inspect.isfunction(member) and hasattr(GRPOTrainer, name):
            assert f"`{name}`" in E3GRPOTrainer.__doc__, name


HOOKED_ATTRIBUTES = {
    "_buffered_inputs", "_entropy_bonus_enabled", "_is_vlm", "_logs", "_metrics", "_pending_extra_logs",
    "_signature_columns", "_step", "_tokenizer", "aux_loss_enabled", "beta", "callback_handler", "data_collator",
    "environment_factories", "gather_function", "generation_config", "generation_kwargs",
    "importance_sampling_level", "is_deepspeed_enabled", "is_fsdp_enabled", "is_in_train", "loss_type",
    "multi_objective_aggregation", "num_generations", "num_generations_eval", "num_iterations", "pad_to_multiple_of",
    "ref_model", "reward_func_names", "reward_weights", "rollout_func", "scale_rewards", "state", "tools",
    "top_entropy_quantile", "use_vllm", "vllm_importance_sampling_correction",
}  # fmt: skip


def test_attributes(make_trainer):
    trainer = make_trainer(max_steps=1)
    for name in HOOKED_ATTRIBUTES:
        assert hasattr(trainer, name), name
    trainer.train()
    assert trainer._step == 1
    assert isinstance(trainer._buffered_inputs, list)
    assert set(trainer._buffered_inputs[0]) >= {"advantages", "completion_mask", "completion_ids", "prompt_ids"}
    assert trainer._logs["advantages"].maxlen == 16, "the right advantages push TRL's out"


def test_rewards_come_gathered_one_column_per_function(make_trainer):
    trainer = make_trainer(max_steps=1)
    shapes, calculate = [], trainer._calculate_rewards

    def spy(*args):
        shapes.append(calculate(*args).shape)
        return calculate(*args)

    trainer._calculate_rewards = spy
    trainer.train()
    assert shapes == [(16, 1)]


def test_metrics_of_the_batch_are_the_last_entries(make_trainer):
    trainer = make_trainer(max_steps=3, logging_steps=3)
    trainer._metrics["train"].clear()
    seen = []
    compute_loss = trainer._compute_loss

    def spy(model, inputs):
        loss = compute_loss(model, inputs)
        metrics = trainer._metrics["train"]
        seen.append((len(metrics["entropy"]), len(metrics["frac_reward_zero_std"])))
        return loss

    trainer._compute_loss = spy
    trainer.train()
    assert seen == [(1, 1), (2, 2), (3, 3)]
