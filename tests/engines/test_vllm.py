"""The real vLLM, colocated: on a CPU here, on a GPU where there is one."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import build_trainer, logged, make_dataset, save_tiny_model, trained_rows
from datasets import Dataset
from peft import IA3Config, LoraConfig, LoraModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config
from trl.generation import vllm_generation

from e3_trl import read_rollouts
from e3_trl.commands import train
from e3_trl.evaluation.completions import CompletionSampler, SamplingConfig
from e3_trl.grpo import adapter_sync, checks
from e3_trl.grpo import vllm as e3_vllm
from e3_trl.grpo.checks import LORA_RANKS


ROOT = Path(__file__).parents[2]
SamplingParams = pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it").SamplingParams

pytestmark = [pytest.mark.engine, pytest.mark.slow]

VLLM = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 64,
    "vllm_gpu_memory_utilization": 0.2,
    "use_cpu": not torch.cuda.is_available(),
}


@pytest.fixture(scope="module")
def engines():
    """The engines of this file's tests, by what they were started with."""
    engines = {}
    yield engines
    # vLLM would keep their caches for as long as the process lives.
    for engine in (llm.llm_engine for llm in engines.values()):
        engine.model_executor.driver_worker.model_runner.kv_caches.clear()
        for layer in engine.vllm_config.compilation_config.static_forward_context.values():
            layer.kv_cache = None


@pytest.fixture(autouse=True)
def one_engine_of_a_kind(monkeypatch, engines):
    """
    To start an engine takes longer than what most tests do with it. So trainers that would start the same one get the
    same one, after each other: each brings its weights before the first completion.
    """
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    start = vllm_generation.LLM

    def engine(**settings):
        kind = tuple(sorted(settings.items()))
        if kind not in engines:
            engines[kind] = start(**settings)
        vars(engines[kind]).pop("generate", None)  # what the trainer before has put in its place
        return engines[kind]

    monkeypatch.setattr(vllm_generation, "LLM", engine)


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


def record_texts(trainer) -> list[str]:
    """What vLLM has made of the tokens, completion by completion."""
    texts, generate = [], trainer.vllm_generation._llm_generate

    def spy(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        texts.extend(one.text for output in outputs for one in output.outputs)
        return outputs

    trainer.vllm_generation._llm_generate = spy
    return texts


@pytest.fixture
def float32_engine(monkeypatch):
    """
    vLLM takes float32 models down to bfloat16 unless it is told otherwise, which TRL does not offer. Tests to which
    the type is all the same ask for it too, since that engine is there. Most of its start would be compiling, which
    that of bfloat16 does.
    """
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, dtype="float32", enforce_eager=True))


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
        temperature_target_entropy=3.55,
        temperature_max=9.0,  # beyond where it gets to
        learning_rate=3e-3,
    )
    calls = record_requests(trainer)
    trainer.train()
    batches = [[row for row in read_rollouts(trainer.args.output_dir) if row["step"] == step] for step in range(1, 13)]
    assert len(calls) == 12, "one engine call per generation batch"
    for call, batch in zip(calls, batches, strict=True):
        assert [n for _, n, _, _ in call] == [row["rollouts"] for row in batch]
        assert {temperature for _, _, temperature, _ in call} == {batch[0]["temperature"]}
        assert len({seed for *_, seed in call}) == 1
    assert len({n for call in calls for _, n, _, _ in call}) > 1
    temperatures = logged(trainer, "temperature")
    assert temperatures[-1] > 1.2 * temperatures[0]
    assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1.0] * 12, abs=0.01)


@pytest.mark.parametrize(("rule", "num_calls"), [("pilot", 2), ("vigor", 4)])
def test_each_round_is_a_call_with_a_temperature_for_each_prompt(make_trainer, float32_engine, rule, num_calls):
    """And the engine's log-probs are those that training computes at that temperature."""
    trainer = make_trainer(
        **VLLM,
        rollout_allocation=rule,
        temperature_spread=1.5,
        max_steps=6,
    )
    calls = record_requests(trainer)
    trainer.train()
    rows = read_rollouts(trainer.args.output_dir)
    assert len(calls) == 6 * num_calls
    for step in range(1, 7):
        parts = calls[num_calls * (step - 1) : num_calls * step]
        asked, temperatures = Counter(), {}
        for prompt, number, temperature, _ in sum(parts, []):
            asked[prompt] += number
            assert temperatures.setdefault(prompt, temperature) == temperature
        batch = [row for row in rows if row["step"] == step]
        assert list(asked.values()) == [row["rollouts"] for row in batch]
        assert list(temperatures.values()) == [row["temperature"] for row in batch]
        assert [number for _, number, *_ in parts[0]] == [2] * 4
    assert len({row["temperature"] for row in rows if row["step"] == 6}) > 1
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3


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


@pytest.fixture(
    scope="module",
    params=[(Qwen2Config, "float32"), (LlamaConfig, "bfloat16")],
    ids=["Qwen2 in float32", "Llama in bfloat16"],
)
def tied_model(request, tmp_path_factory) -> tuple[str, str]:
    """Folder and dtype of a model whose LM head is its embedding."""
    config_class, dtype = request.param
    return save_tiny_model(tmp_path_factory.mktemp("tied"), config_class, tie_word_embeddings=True), dtype


# Of LoRA, the layers; the embedding is trained as a whole, and with it the head.
TIED_LORA = {"target_modules": "all-linear", "r": 4, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}


@pytest.mark.parametrize("lora", [None, TIED_LORA], ids=["full", "LoRA"])
def test_a_tied_head_arrives(tmp_path, request, tied_model, lora):
    """
    On a CPU the engine's head stayed at the weights that it was started with: off by 0.2 to 0.3 after 20 updates. In
    bfloat16 that takes a CPU with instructions for it: vLLM repacks for no other.
    """
    path, dtype = tied_model
    if dtype == "float32":
        request.getfixturevalue("float32_engine")
    trainer = build_trainer(
        path,
        tmp_path,
        **VLLM,
        peft_config=lora and LoraConfig(**lora),
        model_init_kwargs={"dtype": dtype},
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        max_steps=21,
    )
    trainer.train()
    assert trainer.model.config.tie_word_embeddings
    differences = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(differences) == 21, "before the first update, and after each of 20"
    assert max(differences) < {"float32": 1e-3, "bfloat16": 0.03}[dtype]


# The adapter alone is sent. Its scale, of rank-stabilised LoRA, is another than that of plain LoRA.
LORA_SYNC = {
    "vllm_lora_sync": True,
    "peft_config": LoraConfig(target_modules="all-linear", r=4, use_rslora=True),
}


def test_an_adapter_arrives_alone(make_trainer, float32_engine, monkeypatch):
    """One that is not sent, or at another scale, makes the engine sample from another policy."""

    def merge(*args, **kwargs):
        raise AssertionError("the adapter was merged into the base")

    monkeypatch.setattr(LoraModel, "merge_adapter", merge)
    trainer = make_trainer(**VLLM, **LORA_SYNC, learning_rate=5e-3, lr_scheduler_type="constant", max_steps=21)
    trainer.train()
    differences = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(differences) == 21, "before the first update, and after each of 20"
    assert max(differences) < (1e-3 if torch.cuda.is_available() else 1e-5)
    assert len(trainer.vllm_generation.llm.llm_engine.list_loras()) == 1, "old ones are gone"
    assert list(adapter_sync.IN_MEMORY.glob("e3-trl-adapter-*")) == [], "and so are their files"


def test_old_completions_are_gone_on_with_as_far_as_each_has_room(make_trainer, float32_engine):
    """Each at its temperature of now, and with log-probs as if it were sampled now, which training computes too."""
    trainer = make_trainer(
        **VLLM, reuse_rollouts=True, temperature_spread=1.0, temperature_schedule="constant", learning_rate=3e-3
    )
    asked, generate = [], trainer.vllm_generation._llm_generate

    def spy(prompts, sampling_params, **kwargs):
        temperatures = dict(zip(known, trainer.temperature_of(trainer._batch, np.arange(16)), strict=True))
        for request, params in zip(prompts, sampling_params, strict=True):
            tokens = tuple(request["prompt_token_ids"])
            prompt = next(prompt for prompt in known if tokens[: len(prompt)] == prompt)
            asked.append(len(tokens) - len(prompt))
            assert params.max_tokens == 8 - asked[-1]
            assert params.temperature == pytest.approx(temperatures[prompt])
        return generate(prompts, sampling_params=sampling_params, **kwargs)

    known = [tuple(trainer.processing_class(prompt)["input_ids"]) for prompt in make_dataset()["prompt"]]
    trainer.vllm_generation._llm_generate = spy
    trainer.train()
    assert sum(map(bool, asked)) > 20
    assert 0.1 < np.mean(logged(trainer, "rollouts/reused")[4:]) < 0.95
    assert max(logged(trainer, "completions/max_length")) == 8
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3


@pytest.mark.parametrize("sync", [{}, LORA_SYNC], ids=["full", "adapter alone"])
def test_a_resumed_run_draws_the_same_completions(make_trainer, float32_engine, sync):
    """Whatever its engine has drawn before; test_zero3.py resumes with new ones."""
    settings = {**VLLM, **sync, "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    resumed = make_trainer(output_dir="resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert read_rollouts(resumed.args.output_dir) == [
        row for row in read_rollouts(whole.args.output_dir) if row["step"] > 6
    ]
    assert logged(resumed, "reward") == logged(whole, "reward")


def test_the_recipe_with_a_base_in_4_bits(tmp_path, monkeypatch):
    """In small, but with its base in 4 bits on either side, and only the adapter sent. Then resumed."""
    path = save_tiny_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)  # both sides round it alike
    make_dataset().to_json(tmp_path / "train.jsonl")
    settings = {
        "model_name_or_path": path,
        "dataset_name": str(tmp_path / "train.jsonl"),
        "reward_funcs": "tests.conftest.vowel_reward",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "num_generations": 4,
        "num_generations_min": 2,
        "num_generations_max": 8,
        "max_completion_length": 8,
        "vllm_max_model_length": 64,
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_enable_sleep_mode": False,
        "learning_rate": 5e-3,
        "max_steps": 12,
        "save_steps": 6,
        "eval_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
    }

    def run(folder, checkpoint=None):
        given = {**settings, "output_dir": str(tmp_path / folder)}
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        recipe = str(ROOT / "recipes" / "DeepSeek-R1-Distill-Qwen-7B" / "config_e3_qlora_24gb.yaml")
        trainer = train.make_trainer(*train.make_parser().parse_args_and_config(["--config", recipe, *arguments]))
        trainer.train(checkpoint)
        return trainer

    whole = run("whole")
    assert {parameter.dtype for parameter in whole.model.parameters() if parameter.requires_grad} == {torch.float32}
    differences = logged(whole, "sampling/sampling_logp_difference/mean")
    assert len(differences) == 12
    assert 0 < max(differences) < 0.03
    resumed = run("resumed", f"{tmp_path}/whole/checkpoint-6")
    assert read_rollouts(tmp_path / "resumed") == [row for row in read_rollouts(tmp_path / "whole") if row["step"] > 6]
    assert logged(resumed, "loss") == logged(whole, "loss")
    trained = {name: value for name, value in whole.model.state_dict().items() if "lora_" in name}
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in trained.items())


def test_copies_of_a_prompt_differ(make_trainer, float32_engine):
    """One seed for a whole request would draw the same completion n times."""
    trainer = make_trainer(**VLLM, max_steps=1)
    trainer.train()
    rows = Counter(
        row
        for part in trained_rows(trainer._buffered_inputs)
        for row in zip(*(map(tuple, part[name].tolist()) for name in ("prompt_ids", "completion_ids")), strict=True)
    )
    assert max(rows.values()) == 1


@pytest.fixture
def call_seeds(monkeypatch) -> list[int]:
    """The seed of each engine call."""
    seeds, seeded_engine = [], e3_vllm.seeded_engine

    def spy(seed, device):
        seeds.append(seed)
        return seeded_engine(seed, device)

    monkeypatch.setattr(e3_vllm, "seeded_engine", spy)
    return seeds


EVALUATION = {
    "eval_dataset": make_dataset(12),
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 8,
    "num_generations_eval": 2,
}


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_an_evaluation_is_one_engine_call_and_every_call_has_a_seed_of_its_own(
    make_trainer, float32_engine, call_seeds, stream
):
    """With a stream every batch after the first evaluation had one same seed, or was an IndexError."""
    settings = {"train_dataset": make_dataset().to_iterable_dataset(), "rollout_allocation": "uniform"}
    trainer = make_trainer(**VLLM, **EVALUATION, **settings if stream else {}, max_steps=3)
    calls = record_requests(trainer)
    syncs, sync_weights = [], trainer.vllm_generation.sync_weights
    trainer.vllm_generation.sync_weights = lambda: (syncs.append(trainer.state.global_step), sync_weights())
    trainer.train()
    # Each step, four prompts are trained on, and the three batches of four are evaluated together.
    assert [len(call) for call in calls] == [4, 12] * 3
    assert all(n == 2 for call in calls[1::2] for _, n, _, _ in call)
    assert [temperature for call in calls[1::2] for _, _, temperature, _ in call] == [1.0] * 36
    assert len(set(call_seeds)) == len(call_seeds) == 6
    assert len(logged(trainer, "eval_pass@2")) == 3
    assert syncs == [0, 1, 2, 3]
    assert trainer.vllm_generation._seeds is None, "no seed outlives its round"


def test_an_evaluation_in_one_call_scores_each_prompt_with_its_own_completions(make_trainer, float32_engine):
    """Another prompt's completion would have another probability."""
    trainer = make_trainer(**VLLM, **EVALUATION | {"eval_strategy": "no"})
    metrics = trainer.evaluate()
    assert metrics["eval_sampling/sampling_logp_difference/max"] < 1e-3
    assert 0 <= metrics["eval_pass@1"] <= metrics["eval_pass@2"] <= 1


def test_tokens_are_turned_into_text_only_where_it_is_read(make_trainer, float32_engine):
    """The completions are the same; a function before the engine, which may read it, gets the text."""
    completions, texts = [], []

    def reward(completion_ids, **kwargs):
        completions[-1].extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    for is_read in (True, False):
        trainer = make_trainer(
            **VLLM,
            **EVALUATION,
            reward_funcs=reward,
            rollout_allocation="uniform",
            max_steps=2,
            output_dir=str(is_read),
        )
        completions.append([])
        texts.append(record_texts(trainer))
        if is_read:
            trainer.vllm_generation.llm.generate = partial(trainer.vllm_generation.llm.generate)
        trainer.train()
    assert completions[0] == completions[1]
    assert len(texts[0]) == len(texts[1]) == 2 * (16 + 24)
    assert any(texts[0])
    assert not any(texts[1])


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"stop": ["e"]}, "[^e]*e?"),
        ({"bad_words": ["e"]}, "[^e]*"),
        ({"structured_outputs": {"regex": "[aeiou]+"}}, "[aeiou]+"),
    ],
    ids=["stop", "bad_words", "regex"],
)
def test_text_that_stops_or_constrains_is_made(make_trainer, float32_engine, settings, written):
    """vLLM refuses stop strings without it."""
    trainer = make_trainer(**VLLM, generation_kwargs=settings, max_steps=1)
    texts = record_texts(trainer)
    trainer.train()
    assert any(texts)
    completions = [
        completion
        for rows in trained_rows(trainer._buffered_inputs)
        for completion in trainer.processing_class.batch_decode(rows["completion_ids"], skip_special_tokens=True)
    ]
    assert len(completions) == 16
    for completion in completions:
        assert re.fullmatch(written, completion)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_a_rollout_function_that_asks_in_trls_form_may_read_the_text(make_trainer, float32_engine):
    read = []

    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        trainer.vllm_generation.generate(ids, None, 1)  # the tokens alone
        asked = [{"prompt_token_ids": row} for row in ids]
        params = SamplingParams(n=1, max_tokens=4, logprobs=0)
        outputs = trainer.vllm_generation.llm.generate(asked, sampling_params=params, use_tqdm=False)
        completions = [one for output in outputs for one in output.outputs]
        completion_ids = [list(one.token_ids) for one in completions]
        texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        read.extend(zip([one.text for one in completions], texts, strict=True))
        logprobs = [[0.0] * len(row) for row in completion_ids]
        return {"prompt_ids": ids, "completion_ids": completion_ids, "logprobs": logprobs}

    trainer = make_trainer(**VLLM, rollout_func=rollout, max_steps=1)
    texts = record_texts(trainer)
    trainer.train()
    assert len(read) == 16
    assert all(text == decoded for text, decoded in read)
    assert [any(texts[:16]), any(texts[16:])] == [False, True]


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_two_calls_of_a_rollout_function_draw_different_completions(make_trainer, float32_engine):
    """The seeds of the first call stayed for the second: 16 of 16 completions were the same."""
    drawn = []

    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        first, second = (trainer.vllm_generation.generate(ids, None, 1) for _ in range(2))
        drawn.append((first[1], second[1]))
        return {
            "prompt_ids": ids,
            "completion_ids": second[1],
            "logprobs": [[token[0] for token in row] for row in second[2]],
        }

    trainer = make_trainer(**VLLM, rollout_func=rollout, max_steps=2)
    trainer.train()
    assert sum(a == b for first, second in drawn for a, b in zip(first, second, strict=True)) < 4
    assert drawn[0][0] != drawn[1][0]


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_what_a_rollout_function_asks_the_engine_for_is_left_as_it_is(make_trainer, float32_engine):
    """Requests for several completions were turned into requests for one."""

    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        asked = [{"prompt_token_ids": row} for row in ids[::4]]
        params = SamplingParams(n=4, max_tokens=4, logprobs=0)
        outputs = trainer.vllm_generation.llm.generate(asked, params, use_tqdm=False)
        completions = [one for output in outputs for one in output.outputs]
        assert [len(output.outputs) for output in outputs] == [4] * 4
        return {
            "prompt_ids": ids,
            "completion_ids": [list(one.token_ids) for one in completions],
            "logprobs": [[0.0] * len(one.token_ids) for one in completions],
        }

    trainer = make_trainer(**VLLM, rollout_func=rollout, rollout_allocation="uniform", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


SEVERAL_STEPS = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}


def test_the_health_of_the_engine_is_logged_without_the_correction_too(make_trainer, float32_engine):
    """From the loss's own log-probs; with the correction TRL makes a forward pass for it."""
    means = []
    for correction in (True, False):
        trainer = make_trainer(
            **VLLM,
            vllm_importance_sampling_correction=correction,
            learning_rate=0.0,
            max_steps=3,
            output_dir=str(correction),
        )
        trainer.train()
        means.append([logged(trainer, f"sampling/sampling_logp_difference/{name}") for name in ("mean", "max")])
        assert ("sampling/importance_sampling_ratio/mean" in trainer.state.log_history[0]) == correction
    assert np.shape(means) == (2, 2, 3)
    np.testing.assert_allclose(means[0], means[1], rtol=0.05, atol=1e-7)
    assert 0 < means[1][0][0] < 1e-5

    # Of weights that the engine does not have: the second step of each generation batch is trained on later ones.
    trainer = make_trainer(
        **VLLM, **SEVERAL_STEPS, vllm_importance_sampling_correction=False, learning_rate=0.1, max_steps=4
    )
    trainer.train()
    healthy = ["sampling/sampling_logp_difference/max" in entry for entry in trainer.state.log_history[:4]]
    assert healthy == [True, False, True, False]
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3

    trainer = make_trainer(**VLLM, vllm_importance_sampling_correction=False, learning_rate=0.1, max_steps=3)
    trainer.vllm_generation.sync_weights()  # the engine had those of the trainer before
    trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    assert logged(trainer, "sampling/sampling_logp_difference/mean")[2] > 0.05, "stale weights show"


@pytest.fixture
def no_engine(monkeypatch):
    """The mistake has to be found before vLLM is started, which takes long and a lot of memory."""

    def start(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(vllm_generation, "LLM", start)


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
)
def test_an_adapter_on_one_half_of_a_tied_pair_is_refused(tmp_path, no_engine, lora):
    """vLLM has one tensor for both: off by 0.05 to 0.5 after eight steps."""
    path = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    lora = {"target_modules": "all-linear", "r": 4} | lora
    with pytest.raises(ValueError, match="has tie_word_embeddings, one tensor for both.*set ensure_weight_tying"):
        build_trainer(path, tmp_path / "run", **VLLM, peft_config=LoraConfig(**lora))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, "vllm_lora_sync is True, and peft_config is None.*LoraConfig"),
        (IA3Config(), "peft_config is IA3.*LoraConfig"),
        (LoraConfig(use_dora=True), "use_dora of peft_config is True.*Set it to False"),
        (LoraConfig(modules_to_save=["lm_head"]), r"modules_to_save of peft_config is \['lm_head'\].*Set it to None"),
        (LoraConfig(bias="all"), "bias of peft_config is 'all'.*Set it to 'none'"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights of peft_config is 'pissa'.*Set it to True"),
        (LoraConfig(rank_pattern={"q_proj": 4}), "rank_pattern of peft_config is.*Set it to None"),
        (LoraConfig(r=513), "r of peft_config is 513. Set it to 512"),
    ],
    ids=["none", "another kind", "DoRA", "modules_to_save", "bias", "PiSSA", "rank_pattern", "rank"],
)
def test_an_adapter_that_vllm_cannot_apply_is_refused_before_a_model_is_loaded(tmp_path, no_engine, lora, message):
    with pytest.raises(ValueError, match=message):
        build_trainer("no/model", tmp_path, **VLLM, vllm_lora_sync=True, peft_config=lora)


def test_an_adapter_of_an_embedding_is_refused_before_an_engine_is_started(make_trainer, no_engine):
    lora = LoraConfig(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="the model trains .*embed_tokens. Train one adapter, of linear layers alone"):
        make_trainer(**VLLM, vllm_lora_sync=True, peft_config=lora)


@pytest.mark.parametrize(
    ("bits", "settings", "message"),
    [
        (4, {}, "load_in_4bit is True, and use_vllm.*vllm_lora_sync to True"),
        (8, {"vllm_lora_sync": True}, "load_in_8bit is True, and use_vllm.*Set load_in_4bit"),
        (4, {"vllm_lora_sync": True}, "in 4 bits.*pip install --no-deps vllm-bnb-plugin"),
    ],
)
@pytest.mark.parametrize("is_loaded", [False, True], ids=["to be loaded", "loaded"])
def test_a_base_that_vllm_cannot_have_in_few_bits_is_refused(
    make_trainer, model_path, no_engine, monkeypatch, bits, settings, message, is_loaded
):
    """Its packed weights are sent without their scales: log-probs were off by 0.5 after one update."""
    monkeypatch.setattr(checks, "find_spec", {"vllm": "is there"}.get)
    given = {**VLLM, **settings, "peft_config": LoraConfig(target_modules="all-linear", r=4)}
    if is_loaded:
        given["model"] = AutoModelForCausalLM.from_pretrained(model_path)
        setattr(given["model"], f"is_loaded_in_{bits}bit", True)
    else:
        given |= {"model": "no/model", "quantization_config": SimpleNamespace(**{f"load_in_{bits}bit": True})}
    with pytest.raises(ValueError, match=message):
        make_trainer(**given)


def test_a_base_that_vllm_quantizes_otherwise_is_refused(make_trainer, no_engine):
    four = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="bnb_4bit_quant_type is 'fp4'.*Set it to 'nf4'"):
        make_trainer(**VLLM, **LORA_SYNC, model="no/model", quantization_config=four)


def test_an_engine_with_room_for_an_adapter_keeps_its_base_asleep(monkeypatch):
    """TRL's level 2 throws it away, and a sync that sends the adapter alone would not bring it back."""
    engine = Mock()
    start, put_to_sleep = Mock(return_value=engine), engine.sleep
    monkeypatch.setattr(vllm_generation, "LLM", start)
    with adapter_sync.engine_for_adapter(9):
        vllm_generation.LLM(model="name").sleep(level=2)
    assert vllm_generation.LLM is start
    start.assert_called_once_with(model="name", enable_lora=True, max_lora_rank=16, max_loras=1)
    put_to_sleep.assert_called_once_with(level=1)
    of_vllm = pytest.importorskip("vllm.config.lora").MaxLoRARanks
    assert set(LORA_RANKS) <= set(get_args(of_vllm))


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


def test_an_evaluation_of_a_saved_model_goes_on(model_path, tmp_path, monkeypatch):
    """What `e3-trl evaluate` samples with; test_evaluate.py has the rest of it."""
    # Its start would be mostly compiling, and importing everything in another process.
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    problems = [f"say {name}:" for name in "abcdef"]
    config = SamplingConfig(num_samples=4, max_completion_length=30, chunk_size=2, dtype="float32", use_vllm=True)
    sampler = CompletionSampler(model_path, problems, config)
    path = tmp_path / "completions.jsonl"
    rows = sampler.sample(0, path)
    whole = path.read_bytes()
    for row in rows:
        assert len(set(row["completions"])) == 4, "copies differ"
        for text, length, cut_off in zip(row["completions"], row["tokens"], row["truncated"], strict=True):
            # One token per character, but padding that was sampled is not in the text, nor is the token that ends it.
            assert len(text) + (not cut_off) <= length <= 30
            assert length == 30 or not cut_off
    assert len({cut for row in rows for cut in row["truncated"]}) == 2
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert sampler.sample(0, path) == rows
    assert path.read_bytes() == whole
    assert sampler.sample(1, tmp_path / "other.jsonl") != rows
