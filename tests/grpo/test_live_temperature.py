"""One temperature for sampling and for every log-prob, entropy and ratio, whenever it changes."""

import inspect

import pytest
import torch
from conftest import logged, make_dataset
from peft import LoraConfig


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 38, (3, 12), generator=generator)


def fused(trainer, model, tokens):
    log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model, tokens, torch.ones_like(tokens), 8, compute_entropy=model is not trainer.ref_model
    )
    return log_probs, entropies


def plain(model, tokens, temperature):
    logits = model(input_ids=tokens).logits[:, -9:-1] / temperature
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, tokens[:, -8:].unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_log_probs_and_entropies_are_those_of_the_tempered_policy(make_trainer, tokens, peft_config, temperature):
    trainer = make_trainer(beta=0.1, peft_config=peft_config)
    trainer.temperature = temperature
    log_probs, entropies = fused(trainer, trainer.model, tokens)
    expected_log_probs, expected_entropies = plain(trainer.model, tokens, temperature)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    if peft_config is None:
        log_probs, _ = fused(trainer, trainer.ref_model, tokens)
        torch.testing.assert_close(log_probs, plain(trainer.ref_model, tokens, temperature)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_reference_model_follows_through_accelerates_wrapper(make_trainer, mixed_precision):
    """At step 1 policy and reference are equal, so is their KL, whatever the temperature was set to."""
    trainer = make_trainer(beta=0.1, bf16=mixed_precision, max_steps=1)
    trainer.temperature = 0.5
    trainer.train()
    assert logged(trainer, "kl") == pytest.approx([0.0], abs=1e-6)


def test_gradient_is_that_of_the_tempered_policy(make_trainer, tokens):
    trainer = make_trainer()
    trainer.temperature = 0.6
    gradients = []
    for log_probs in (fused(trainer, trainer.model, tokens)[0], plain(trainer.model, tokens, 0.6)[0]):
        trainer.model.zero_grad()
        log_probs.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


def test_the_next_batch_is_sampled_at_the_new_temperature(make_trainer):
    """Near temperature 0 all completions of a prompt are the greedy one."""
    trainer = make_trainer(max_steps=1)
    rows = [dict(row) for row in trainer.train_dataset.select([0] * 8)]
    trainer.model.train()
    warm = trainer._generate_and_score_completions(rows)["completion_ids"]
    assert len({tuple(ids) for ids in warm.tolist()}) > 1
    trainer.temperature = 1e-3
    cold = trainer._generate_and_score_completions(rows)
    assert len({tuple(ids) for ids in cold["completion_ids"].tolist()}) == 1
    ids = cold["prompt_ids"][:1]
    for token in cold["completion_ids"][0]:
        assert trainer.model(input_ids=ids).logits[0, -1].argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


def depth(forward) -> int:
    return 1 + depth(forward.__wrapped__) if hasattr(forward, "__wrapped__") else 0


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_a_thousand_changes_leave_the_forward_as_it_was(make_trainer, tokens, mixed_precision):
    """`add_fused_lm_head` once per change wraps its own wrapper, up to the recursion limit."""
    trainer = make_trainer(max_steps=1, bf16=mixed_precision)
    trainer.train()
    forward, before = trainer.model.forward, depth(trainer.model.forward)
    for step in range(1000):
        trainer.temperature = 0.5 + step / 1000
    assert trainer.model.forward == forward
    assert depth(trainer.model.forward) == before

    frames = []
    trainer.model.model.layers[0].register_forward_hook(lambda *_: frames.append(inspect.stack()))
    dtypes = []
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    log_probs, _ = fused(trainer, trainer.model, tokens)
    assert sum(frame.function == "_fused_forward" for frame in frames[0]) == 1
    assert dtypes == [torch.bfloat16 if mixed_precision else torch.float32]
    tolerance = 0.1 if mixed_precision else 1e-5
    torch.testing.assert_close(log_probs, plain(trainer.model, tokens, 1.499)[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [{"num_iterations": 2}, {"beta": 0.1}], ids=str)
def test_ratios_and_kl_are_one_at_the_first_use_of_a_batch(make_trainer, settings):
    """Old, new and reference log-probs of an unchanged policy agree only if all are at the same temperature."""
    trainer = make_trainer(learning_rate=1e-12, max_steps=6, temperature_target_entropy=3.4, **settings)
    batches = []
    compute_loss = trainer._compute_loss

    def spy(model, inputs):
        if "old_per_token_logps" in inputs:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                new, _, _ = trainer._get_per_token_logps_and_entropies(
                    model, ids, mask, inputs["completion_ids"].size(1)
                )
            batches.append(((new - inputs["old_per_token_logps"]) * inputs["completion_mask"]).abs().max().item())
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert len(set(logged(trainer, "temperature"))) > 2
    assert max(batches, default=0.0) < 1e-5
    assert max(logged(trainer, "kl"), default=0.0) < 1e-9
    assert bool(batches) == ("num_iterations" in settings)


def test_continuous_batching_and_plain_generation_read_the_same_setting(make_trainer):
    trainer = make_trainer(train_dataset=make_dataset(), max_steps=1)
    trainer.temperature = 0.4
    assert trainer.generation_config.temperature == trainer.generation_kwargs["temperature"] == trainer.temperature
