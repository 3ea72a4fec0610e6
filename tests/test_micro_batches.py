"""Other micro-batches than TRL's, less padding, fewer passes; the same gradients."""

import numpy as np
import pytest
import torch
from conftest import build_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from e3_trl.method.micro_batches import plan_micro_batches


E3_OFF = {"rollout_allocation": "uniform", "temperature_schedule": "constant"}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_plan_has_each_row_once_and_ranks_in_step(data):
    ranks, steps, per_step = (data.draw(st.integers(1, high)) for high in (3, 5, 4))
    shape = ranks, steps * per_step
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    prompts, completions = rng.integers(1, 20, shape), rng.integers(0, 60, shape)
    needed = rng.random(shape) < data.draw(st.sampled_from([0, 0.2, 0.5, 1]))
    max_tokens = data.draw(st.sampled_from([None, 1, 100, 10_000]))
    plan = plan_micro_batches(prompts, completions, needed, steps, max_tokens)
    assert len(plan.trained) == len(plan.left_out) == steps
    rows = np.sort(np.concatenate(plan.trained + plan.left_out, axis=1), axis=1)
    assert (rows == np.arange(shape[1])).all()
    for part in plan.left_out:
        assert not np.take_along_axis(needed, part, axis=1).any()
    sizes = [part.shape[1] for part in plan.trained]
    assert sizes[-1] > 0, "gradients are synced in the last micro-step"
    assert sizes[0] > 0, "DeepSpeed drops the gradients of the step before with the first"
    assert sizes[1:] == sorted(sizes[1:], key=bool), "the micro-steps with nothing to train on come next"
    assert sum(sizes) == max(min(steps, 2), needed.sum(axis=1).max()), "no more than the rank with the most needs"
    if max_tokens is None:
        assert max(sizes) <= per_step


def test_rows_of_one_length_go_together():
    prompts = np.full((2, 64), 5)
    completions = np.random.default_rng(0).permuted(np.tile(np.repeat([10, 20, 400, 30], 16), (2, 1)), axis=1)
    needed = np.ones((2, 64), dtype=bool)
    plan = plan_micro_batches(prompts, completions, needed, num_steps=16)
    for part in plan.trained:
        lengths = np.take_along_axis(completions, part, axis=1)
        assert len(np.unique(lengths)) == 1, "on both ranks, and the same"
    assert np.take_along_axis(completions, plan.trained[0], axis=1).max() == 400, "the longest first"
    plan = plan_micro_batches(prompts, completions, needed, num_steps=16, max_tokens=4 * 405)
    sizes = [part.shape[1] for part in plan.trained if part.size]
    assert len(sizes) < 8
    assert sizes[0] == 4
    assert all(size * 35 <= 4 * 405 for size in sizes[4:])


class Gradients(TrainerCallback):
    """Keeps the gradient that each optimizer step is made of."""

    def __init__(self):
        self.of_step = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of_step.append(
            torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        )


def force_completions(trainer):
    """Give row after row of the run completions of long-tailed lengths, whatever the model says."""
    rng = np.random.default_rng(0)

    def generate(prompt_ids, images, multimodal_fields, num_generations, *args):
        lengths = np.minimum(rng.lognormal(1.5, 1, len(prompt_ids)).astype(int) + 1, trainer.max_completion_length)
        return [[*rng.integers(2, 40, size=length - 1).tolist(), 1] for length in lengths], None

    trainer._generate_single_turn = generate


def half_the_prompts_reward(prompts, completions, **kwargs):
    """Of every other prompt all completions are equally good."""
    return [
        len(completion) * float("a" <= prompt[4] < "i")
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def train(model_path, output_dir, trainer_class=None, **overrides):
    """The gradients of a short run, and its trainer. Without a class, of E3 with both of its parts off."""
    classes = {} if trainer_class is None else {"trainer_class": GRPOTrainer, "config_class": GRPOConfig}
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 24,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "reward_funcs": half_the_prompts_reward,
    }
    if trainer_class is None:
        settings |= E3_OFF
    trainer = build_trainer(model_path, output_dir, **classes, **settings | overrides)
    force_completions(trainer)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.of_step, trainer


def assert_same_gradients(found, expected, rel=1e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.norm(other) > 0
        assert torch.linalg.norm(one - other) <= rel * torch.linalg.norm(other)


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
VARIANTS = {
    "beta": {"beta": 0.1},
    "iterations": {"num_iterations": 2},
    "windows": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "windows and iterations": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 3},
    "two batches a step": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "out of step": {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "num_generations": 4},
    "masked": {"mask_truncated_completions": True},
    "sequence": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "two-sided": {"delta": 1.5, "num_iterations": 2},
    "entropy bonus": {"entropy_coef": 0.1},
    "top entropy": {"top_entropy_quantile": 0.5},
    "multiple": {"pad_to_multiple_of": 8},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def stock(model_path, tmp_path_factory):
    """Gradients of stock GRPOTrainer, computed once per setting."""
    computed = {}

    def gradients(**settings):
        key = str(sorted(settings.items()))
        if key not in computed:
            computed[key] = train(model_path, tmp_path_factory.mktemp("stock"), GRPOTrainer, **settings)[0]
        return computed[key]

    return gradients


@pytest.mark.parametrize("policy", ["rows", "tokens"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradients_of_each_loss_are_those_of_stock(model_path, tmp_path, stock, loss_type, policy):
    expected = stock(loss_type=loss_type)
    found, trainer = train(model_path, tmp_path, loss_type=loss_type, micro_batching=policy)
    assert_same_gradients(found, expected)
    shapes = {batch["completion_ids"].shape for batch in trainer._buffered_inputs if "completion_ids" in batch}
    assert len(shapes) > 1, "micro-batches differ"


@pytest.mark.parametrize("policy", ["rows", "tokens"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_each_setting_are_those_of_stock(model_path, tmp_path, stock, variant, policy):
    settings = VARIANTS[variant] | {"loss_type": "grpo"}
    found, _ = train(model_path, tmp_path, micro_batching=policy, **settings)
    assert_same_gradients(found, stock(**settings))
