"""The real vLLM, colocated: on a CPU here, on a GPU where there is one."""

from collections import Counter
from functools import partial

import pytest
import torch
from conftest import build_trainer, logged, make_dataset, save_tiny_model
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from e3_trl import read_rollouts


pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")

VLLM = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 64,
    "vllm_gpu_memory_utilization": 0.2,
    "use_cpu": not torch.cuda.is_available(),
}


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def record_requests(trainer) -> list[list[tuple[tuple[int, ...], int, float, int]]]:
    """The engine's calls, each a list of (prompt, completions asked for, temperature, seed)."""
    calls, generate = [], trainer.vllm_generation._llm_generate

    def spy(prompts, sampling_params, **kwargs):
        calls.append(
            [
                (tuple(prompt["prompt_token_ids"]), params.n, params.temperature, params.seed)
                for prompt, params in zip(prompts, sampling_params, strict=True)
            ]
        )
        return generate(prompts, sampling_params=sampling_params, **kwargs)

    trainer.vllm_generation._llm_generate = spy
    return calls


@pytest.fixture
def float32_engine(monkeypatch):
    """vLLM takes float32 models down to bfloat16 unless it is told otherwise, which TRL does not offer."""
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, dtype="float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_prompt_gets_its_own_number_of_completions_at_the_live_temperature(make_trainer, request, dtype):
    if dtype == "float32":
        request.getfixturevalue("float32_engine")
    trainer = make_trainer(
        **VLLM,
        model_init_kwargs={"dtype": dtype},
        per_device_train_batch_size=256,
        num_generations=16,
        num_generations_max=32,
        num_generations_step=8,
        vllm_request_seeds=dtype == "float32",
        temperature_target_entropy=3.55,
        learning_rate=3e-3,
    )
    calls = record_requests(trainer)
    trainer.train()
    batches = [[row for row in read_rollouts(trainer.args.output_dir) if row["step"] == step] for step in range(1, 13)]
    assert len(calls) == 12, "one engine call per generation batch"
    for call, batch in zip(calls, batches, strict=True):
        assert [n for _, n, _, _ in call] == [row["rollouts"] for row in batch]
        assert {temperature for _, _, temperature, _ in call} == {batch[0]["temperature"]}
        assert len({seed for *_, seed in call}) == (len(call) if dtype == "float32" else 1)
    assert len({n for call in calls for _, n, _, _ in call}) > 1
    temperatures = logged(trainer, "temperature")
    assert temperatures[-1] > 1.2 * temperatures[0]
    assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1.0] * 12, abs=0.01)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear", r=4)], ids=["full", "LoRA"])
def test_log_probs_agree_after_large_updates(make_trainer, float32_engine, peft_config):
    """Weights that do not arrive make the engine sample from an older policy: of one layer norm alone, by 0.1."""
    trainer = make_trainer(
        **VLLM, peft_config=peft_config, learning_rate=0.1, max_steps=6, temperature_schedule="constant"
    )
    assert trainer.vllm_generation.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    moved = max((a - b).abs().max().item() for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert moved > 0.1
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < (
        1e-3 if torch.cuda.is_available() else 1e-4
    )


@pytest.mark.parametrize("request_seeds", [False, True])
def test_a_resumed_run_draws_the_same_completions(make_trainer, request_seeds):
    settings = {**VLLM, "vllm_request_seeds": request_seeds, "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    resumed = make_trainer(output_dir="resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert read_rollouts(resumed.args.output_dir) == [
        row for row in read_rollouts(whole.args.output_dir) if row["step"] > 6
    ]
    assert logged(resumed, "reward") == logged(whole, "reward")


@pytest.mark.parametrize("request_seeds", [False, True])
def test_copies_of_a_prompt_differ(make_trainer, request_seeds):
    """One seed for a whole request would draw the same completion n times."""
    trainer = make_trainer(**VLLM, vllm_request_seeds=request_seeds, max_steps=1)
    trainer.train()
    batch = trainer._buffered_inputs[0]
    rows = Counter(zip(*(map(tuple, batch[name].tolist()) for name in ("prompt_ids", "completion_ids")), strict=True))
    assert max(rows.values()) == 1


def test_every_evaluation_batch_has_seeds_of_its_own(make_trainer):
    trainer = make_trainer(
        **VLLM,
        vllm_request_seeds=True,
        eval_dataset=make_dataset(12),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        max_steps=2,
    )
    calls = record_requests(trainer)
    trainer.train()
    # Each step, four prompts are trained on and three batches of four evaluated on.
    assert [len(call) for call in calls] == [4] * 8
    evaluations = [calls[1:4], calls[5:8]]
    assert all(n == 2 for batches in evaluations for call in batches for _, n, _, _ in call)
    seeds = [seed for call in calls for *_, seed in call]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture
def no_engine(monkeypatch):
    """The mistake has to be found before vLLM is started, which takes long and a lot of memory."""

    def start(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(vllm_generation, "LLM", start)


@pytest.mark.skipif(torch.cuda.is_available(), reason="TRL's own sync handles tied models on a GPU")
def test_a_tied_model_on_a_cpu_is_refused(tmp_path, no_engine):
    path = save_tiny_model(tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(path, tie_word_embeddings=True)
    model.save_pretrained(path)
    with pytest.raises(ValueError, match="tie_word_embeddings.*Use an untied model"):
        build_trainer(path, tmp_path / "run", **VLLM)


@pytest.mark.parametrize("chat", [False, True])
def test_a_length_too_short_for_the_longest_prompt(make_trainer, no_engine, chat):
    prompts = ["a" * 9, "a" * 57, "a" * 8, "a" * 7]
    if chat:  # the role and the colon are 5 tokens
        prompts = [[{"role": "user", "content": prompt[5:]}] for prompt in prompts]
    dataset = Dataset.from_dict({"prompt": prompts, "threshold": [1] * 4})
    message = r"vllm_max_model_length is 64.*longest prompt \(57 tokens\).*max_completion_length \(8\).*Set it to 65"
    with pytest.raises(ValueError, match=message):
        make_trainer(**VLLM, train_dataset=dataset)


def test_without_a_length_the_models_own_context_counts(make_trainer, no_engine):
    settings = VLLM | {"vllm_max_model_length": None, "max_completion_length": 250}
    with pytest.raises(ValueError, match=r"vllm_max_model_length is None.*max_position_embeddings\) 256, less than"):
        make_trainer(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, request seeds go with chunked prefill")
def test_request_seeds_for_lengths_that_would_wait_for_ever(make_trainer, no_engine):
    settings = VLLM | {"vllm_max_model_length": 8192, "max_completion_length": 4096, "vllm_request_seeds": True}
    with pytest.raises(ValueError, match="vllm_request_seeds is True.*at most 4096 tokens.*Set it to False"):
        make_trainer(**settings)
