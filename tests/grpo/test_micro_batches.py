"""Other micro-batches than TRL's, less padding, fewer passes; the same gradients."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_trainer, length_reward, logged, make_dataset, trained_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import GRPOTrainer

from e3_trl import E3GRPOTrainer, FastGRPOTrainer
from e3_trl.grpo.plan import plan_micro_batches


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
    each_trains = data.draw(st.booleans())
    plan = plan_micro_batches(prompts, completions, needed, steps, max_tokens, each_trains)
    assert len(plan.trained) == len(plan.left_out) == steps
    rows = np.sort(np.concatenate(plan.trained + plan.left_out, axis=1), axis=1)
    assert (rows == np.arange(shape[1])).all()
    for part in plan.left_out:
        assert not np.take_along_axis(needed, part, axis=1).any()
    sizes = [part.shape[1] for part in plan.trained]
    assert sizes[-1] > 0, "gradients are synced in the last micro-step"
    assert sizes[0] > 0, "DeepSpeed drops the gradients of the step before with the first"
    assert sizes[1:] == sorted(sizes[1:], key=bool), "the micro-steps with nothing to train on come next"
    least = steps if each_trains else min(steps, 2)
    assert sum(map(bool, sizes)) >= least
    assert sum(sizes) == max(least, needed.sum(axis=1).max()), "no more than the rank with the most needs"
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


def force_completions(trainer, tokens=(2, 40), engine=False):
    """
    Give row after row of the run completions of long-tailed lengths, whatever the model says; as vLLM does with
    log-probs, of which one is unknown.
    """
    rng, noise = np.random.default_rng(0), np.random.default_rng(1)

    def generate(prompt_ids, images, multimodal_fields, num_generations, *args):
        lengths = np.minimum(rng.lognormal(1.5, 1, len(prompt_ids)).astype(int) + 1, trainer.max_completion_length)
        completions = [[*rng.integers(*tokens, size=length - 1).tolist(), 1] for length in lengths]
        if not engine:
            return completions, None
        logps = [noise.normal(-3.5, 0.6, length).tolist() for length in lengths]
        logps[0][0] = None
        return completions, logps

    trainer._generate_single_turn = generate
    if engine:
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = SimpleNamespace(
            seeded=lambda key: nullcontext(), rows_with=lambda **of_rows: nullcontext(), sync_weights=lambda: None
        )


def half_the_prompts_reward(prompts, completions, **kwargs):
    """Of every other prompt all completions are equally good."""
    return [
        len(completion) * float("a" <= prompt[4] < "i")
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def train(model_path, output_dir, trainer_class=FastGRPOTrainer, engine=False, tokens=(2, 40), **overrides):
    """The gradients of a short run; E3's with both of its parts off. And its trainer, with rows it has forwarded."""
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 24,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "reward_funcs": half_the_prompts_reward,
    }
    settings |= E3_OFF if issubclass(trainer_class, E3GRPOTrainer) else {}
    trainer = build_trainer(model_path, output_dir, trainer_class, **settings | overrides)
    force_completions(trainer, tokens, engine)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.forwarded = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: trainer.forwarded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
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
    "LoRA": {"peft_config": LoraConfig(r=4, target_modules="all-linear")},
    "LoRA and beta": {
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
        "beta": 0.1,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
    },
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


@pytest.mark.parametrize(
    ("trainer_class", "policy"),
    [(FastGRPOTrainer, "rows"), (FastGRPOTrainer, "tokens"), (E3GRPOTrainer, "rows")],
)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradients_of_each_loss_are_those_of_stock(model_path, tmp_path, stock, loss_type, trainer_class, policy):
    expected = stock(loss_type=loss_type)
    found, trainer = train(model_path, tmp_path, trainer_class, loss_type=loss_type, micro_batching=policy)
    assert_same_gradients(found, expected)
    shapes = {batch["completion_ids"].shape for batch in trainer._buffered_inputs if "completion_ids" in batch}
    assert len(shapes) > 1, "micro-batches differ"


@pytest.mark.parametrize("policy", ["rows", pytest.param("tokens", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_each_setting_are_those_of_stock(model_path, tmp_path, stock, variant, policy):
    settings = VARIANTS[variant] | {"loss_type": "grpo"}
    found, _ = train(model_path, tmp_path, micro_batching=policy, **settings)
    assert_same_gradients(found, stock(**settings))


def assert_same_logs(found, expected, prefix):
    names = {name for entry in expected.state.log_history for name in entry if name.startswith(prefix)}
    assert names
    for name in names:
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-4, abs=1e-6), name


CLIPPED = {"vllm_importance_sampling_clip_min": 0.1, "vllm_importance_sampling_clip_max": 1.2}
ENGINES = {
    "token_truncate": {"vllm_importance_sampling_mode": "token_truncate", **CLIPPED},
    "token_mask": {"vllm_importance_sampling_mode": "token_mask", **CLIPPED},
    "sequence_truncate": {"vllm_importance_sampling_mode": "sequence_truncate", **CLIPPED},
    "sequence_mask": {"vllm_importance_sampling_mode": "sequence_mask", **CLIPPED},
    "vespo": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
    "vespo mask": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask", **CLIPPED},
    "off-policy mask": {"off_policy_mask_threshold": 0.5},
    "iterations in one step": {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "reward_funcs": length_reward,
    },
    "two batches a step": {"steps_per_generation": 2},
    "TRL's micro-batches": {"loss_type": "bnpo"},
    "windows": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "beta": 0.1},
    "out of step": {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "beta": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ENGINES)
def test_what_another_engine_sampled_is_corrected_and_logged_as_in_stock(model_path, tmp_path, variant):
    """With a KL term where there are later steps, whose rows that are left out are compared with no engine."""
    settings = {"engine": True, "loss_type": "dapo"} | ENGINES[variant]
    expected, stock = train(model_path, tmp_path / "stock", GRPOTrainer, **settings)
    found, trainer = train(model_path, tmp_path / "e3", **settings)
    assert_same_gradients(found, expected)
    assert_same_logs(trainer, stock, "sampling/")
    assert logged(trainer, "loss") == pytest.approx(logged(stock, "loss"), abs=2e-6)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_tokens_that_a_tool_wrote_count_as_in_stock(model_path, tmp_path, loss_type):
    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        completions, logprobs = trainer._generate_single_turn(ids, None, {}, 1)
        masks = [[int(place % 3 > 0) for place in range(len(row))] for row in completions]  # of one token, none
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs, "env_mask": masks}

    settings = {"rollout_func": rollout, "loss_type": loss_type, "engine": True, "num_iterations": 2}
    expected, stock = train(model_path, tmp_path / "stock", GRPOTrainer, **settings)
    found, trainer = train(model_path, tmp_path / "e3", **settings)
    assert_same_gradients(found, expected)
    assert_same_logs(trainer, stock, "sampling/")


def prompts_of_many_lengths():
    prompts = [prompt + "x" * (index % 7) for index, prompt in enumerate(make_dataset()["prompt"])]
    return make_dataset().remove_columns("prompt").add_column("prompt", prompts)


@pytest.fixture(scope="module")
def gpt2_path(model_path, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("gpt2"))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    GPT2LMHeadModel(GPT2Config(**size, **dropout, initializer_range=0.2)).save_pretrained(path)
    return path


@pytest.mark.parametrize("model", ["rotary", "absolute"])
def test_prompts_of_many_lengths_are_trimmed_where_positions_are_relative(model_path, gpt2_path, tmp_path, model):
    path = {"rotary": model_path, "absolute": gpt2_path}[model]
    settings = {"train_dataset": prompts_of_many_lengths(), "loss_type": "grpo", "num_iterations": 2, "beta": 0.1}
    expected, _ = train(path, tmp_path / "stock", GRPOTrainer, **settings)
    found, trainer = train(path, tmp_path / "e3", **settings)
    assert_same_gradients(found, expected)
    widths = {batch["prompt_ids"].size(1) for batch in trainer._buffered_inputs}
    assert len(widths) == 1 if model == "absolute" else len(widths) > 1


class PerToken:
    """A subclass may weigh each token."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        weights = torch.linspace(1, 2, output["completion_ids"].size(1))
        return output | {"advantages": output["advantages"].unsqueeze(1) * weights}

    def _compute_loss(self, model, inputs):
        if "completion_ids" in inputs:  # and look at the reference, or a teacher
            tokens, attended = (
                torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
            )
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(model, tokens, attended, inputs["completion_ids"].size(1))
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("micro_batching", ["rows", "none"])
def test_advantages_of_tokens_that_a_subclass_makes(model_path, tmp_path, micro_batching):
    settings = {"loss_type": "grpo", "num_iterations": 2}
    expected, _ = train(model_path, tmp_path / "stock", type("Stock", (PerToken, GRPOTrainer), {}), **settings)
    mine = type("Mine", (PerToken, FastGRPOTrainer), {})
    found, _ = train(model_path, tmp_path / "e3", mine, micro_batching=micro_batching, **settings)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"entropy_weighting": True},
        {"entropy_weighting": True, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
        {"dynamic_sampling": True, "max_resample_rounds": 2, "num_iterations": 2},
        {"length_bias_coef": 0.01},
        {"rollout_allocation": "pilot", "temperature_spread": 1.0, "max_steps": 2, "beta": 0.1},
    ],
    ids=str,
)
def test_parts_of_e3_work_on_planned_rows_as_on_trls(model_path, tmp_path, settings):
    settings = {"loss_type": "grpo", "engine": True, "trainer_class": E3GRPOTrainer} | settings
    expected, trls = train(model_path, tmp_path / "none", micro_batching="none", **settings)
    found, trainer = train(model_path, tmp_path / "rows", **settings)
    assert_same_gradients(found, expected)
    assert logged(trainer, "reward") == logged(trls, "reward")


# --- rows that cannot change the gradient


def reference_of(trainer) -> tuple[float, float]:
    """Mean entropy and mean of minus the log-prob over all tokens, row by row without padding."""
    entropies, negative_logps = [], []
    for rows in trained_rows(trainer._buffered_inputs):
        masks = rows["prompt_mask"].bool(), rows["completion_mask"].bool()
        for prompt, prompt_mask, completion, mask in zip(
            rows["prompt_ids"], masks[0], rows["completion_ids"], masks[1], strict=True
        ):
            prompt, completion = prompt[prompt_mask], completion[mask]
            logits = trainer.model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1)
            entropies.append(-(logps.exp() * logps).sum(-1))
            negative_logps.append(-logps.gather(-1, completion[:, None])[:, 0])
    return torch.cat(entropies).mean().item(), torch.cat(negative_logps).mean().item()


FROZEN = {"learning_rate": 0.0, "max_steps": 1}


@pytest.mark.parametrize("policy", ["rows", "tokens"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_logged_entropy_is_that_of_all_tokens(model_path, tmp_path, policy, estimator):
    _, trainer = train(
        model_path, tmp_path, E3GRPOTrainer, micro_batching=policy, entropy_estimator=estimator, **FROZEN
    )
    assert any("left_out" in batch for batch in trainer._buffered_inputs)
    assert sum(trainer.forwarded) == 16
    with torch.no_grad():
        exact, sampled = reference_of(trainer)
    assert abs(exact - sampled) > 0.01
    assert logged(trainer, "entropy") == pytest.approx([exact if estimator == "exact" else sampled], rel=1e-5)


def test_sampled_entropy_is_the_engines_where_rows_are_left_out(model_path, tmp_path):
    _, trainer = train(model_path, tmp_path, E3GRPOTrainer, entropy_estimator="sampled", engine=True, **FROZEN)
    trained = [batch for batch in trainer._buffered_inputs if "completion_ids" in batch]
    num_trained = sum(len(batch["completion_ids"]) for batch in trained)
    assert 0 < num_trained < 16
    assert sum(trainer.forwarded) == num_trained, "no forward pass for the others"
    rows = [batch["left_out"] for batch in trainer._buffered_inputs if "left_out" in batch]
    total = sum(-torch.nan_to_num(part["sampling_per_token_logps"]).sum().item() for part in rows)
    for batch in trainer._buffered_inputs:
        batch.pop("left_out", None)
    with torch.no_grad():
        _, sampled = reference_of(trainer)
    tokens = [sum(part["completion_mask"].sum().item() for part in parts) for parts in (trained, rows)]
    expected = (sampled * tokens[0] + total) / sum(tokens)
    assert logged(trainer, "entropy") == pytest.approx([expected], rel=1e-5)


def test_a_window_without_anything_to_learn(model_path, tmp_path):
    def equal(completions, **kwargs):
        return [1.0] * len(completions)

    settings = {"reward_funcs": equal, "num_iterations": 2, "temperature_schedule": "entropy"}
    gradients, trainer = train(model_path, tmp_path, E3GRPOTrainer, **settings)
    assert all(gradient.eq(0).all() for gradient in gradients)
    sizes = [len(batch.get("completion_ids", [])) for batch in trainer._buffered_inputs]
    assert sizes == [1, 0, 0, 1]
    assert sum(trainer.forwarded) == 3 * 16
    assert min(logged(trainer, "entropy")) > 1


def all_prompts_reward(completions, **kwargs):
    return [float(len(completion)) + index / 100 for index, completion in enumerate(completions)]


@pytest.mark.parametrize(
    ("settings", "stock_rows", "rows"),
    [
        ({}, 16, 16),
        ({"engine": True}, 32, 16),  # old log-probs, and the loss's own
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 24, 16),  # two of four micro-batches after it
        ({"steps_per_generation": 2, "engine": True}, 32, 16),
        ({"num_iterations": 2}, 32, 16),
    ],
    ids=str,
)
def test_each_row_goes_forward_once_where_the_policy_has_not_changed(model_path, tmp_path, settings, stock_rows, rows):
    settings = {"reward_funcs": all_prompts_reward, "max_steps": 1} | settings
    _, stock = train(model_path, tmp_path / "stock", GRPOTrainer, **settings)
    _, trainer = train(model_path, tmp_path / "e3", **settings)
    assert sum(stock.forwarded) == stock_rows
    assert sum(trainer.forwarded) == rows


@pytest.mark.parametrize("policy", ["rows", "tokens"])
@pytest.mark.slow
def test_a_run_resumed_inside_a_window_goes_on_with_the_rows_that_were_left_out(model_path, tmp_path, policy):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 12,
        "micro_batching": policy,
    }
    whole = build_trainer(model_path, tmp_path / "whole", **settings)
    windows = []
    whole.add_callback(OnSave(lambda: windows.append([dict(batch) for batch in whole._buffered_inputs])))
    whole.train()
    resumed = build_trainer(model_path, tmp_path / "resumed", **settings)
    step = next(step for step in (6, 7, 10, 11) if any("left_out" in batch for batch in windows[step - 1]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name in ("loss", "grad_norm", "entropy", "temperature", "clip_ratio/region_mean", "reward"):
        assert logged(resumed, name) == logged(whole, name), name
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_window_is_finished_as_planned_where_the_policy_is_another_by_then(model_path, tmp_path):
    """Micro-steps without rows are none of TRL's."""
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "reward_funcs": half_the_prompts_reward,
    }
    whole = build_trainer(model_path, tmp_path / "whole", **settings)
    windows = []
    whole.add_callback(OnSave(lambda: windows.append([dict(batch) for batch in whole._buffered_inputs])))
    whole.train()
    step = next(step for step in (1, 3) if any("completion_ids" not in batch for batch in windows[step - 1][4:]))
    resumed = build_trainer(model_path, tmp_path / "resumed", **settings | {"micro_batching": "none"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name in ("loss", "grad_norm", "temperature"):
        assert logged(resumed, name)[step] == pytest.approx(logged(whole, name)[step], rel=1e-5), name


class OnSave(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_save(self, args, state, control, **kwargs):
        self.function()
