"""The real DeepSpeed ZeRO-3 on two ranks, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_trainer, length_reward, uneven_reward
from ranks_run import Recorder, force_completions, save_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from e3_trl import read_rollouts


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")

ROOT = Path(__file__).parent.parent
MEASURED_TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def launch(model_path, output_dir, ddp_backend="gloo", num_processes=2, **settings):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "CUDA_VISIBLE_DEVICES": ""}  # both ranks on the CPU
    environment |= {"PYTHONFAULTHANDLER": "1"}  # a rank that aborts says where
    settings = {"model_path": model_path, "output_dir": str(output_dir), "per_device_train_batch_size": 8} | settings
    command = ["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/zero3_cpu.yaml"]
    command += ["--num_processes", str(num_processes), "--main_process_port", "0"]  # a free one
    return subprocess.run(
        [sys.executable, *command, "ranks_run.py", json.dumps(settings | {"ddp_backend": ddp_backend})],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def recorded(output_dir, rank=0):
    """What [`ranks_run.Recorder`] wrote: the state after each step, and this rank's completions with advantages."""
    state, advantages = (
        [json.loads(line) for line in (output_dir / f"{name}{rank}.jsonl").read_text().splitlines()]
        for name in ("rank", "advantages")
    )
    return state, advantages


def assert_same_state(one, other):
    for a, b in zip(one, other, strict=True):
        assert [a[name] for name in ("step", "difficulty", "rollouts", "rewards")] == [
            b[name] for name in ("step", "difficulty", "rollouts", "rewards")
        ]
        assert a["target"] == pytest.approx(b["target"], rel=1e-6)
        assert a["temperature"] == pytest.approx(b["temperature"], rel=1e-6)


def assert_same_advantages(two_ranks, expected):
    halves = zip(*(recorded(two_ranks, rank)[1] for rank in range(2)), strict=True)
    for whole, (first, second) in zip(expected, halves, strict=True):
        (forced, values), (completions, found) = (zip(*sorted(rows), strict=True) for rows in (whole, first + second))
        assert completions == forced
        # Of values above 1, a few roundings in float32: weights by entropy come from rows padded to other lengths.
        assert found == pytest.approx(values, rel=1e-6, abs=1e-6)


def assert_same_update(start, one, other, rel):
    start, one, other = (
        torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())]) for path in (start, one, other)
    )
    assert torch.linalg.norm(one - start) > 0
    assert torch.linalg.norm(one - other) <= rel * torch.linalg.norm(one - start)


def history(output_dir):
    entries = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k not in MEASURED_TIMES} for entry in entries if "loss" in entry]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_ranks_agree_and_a_resumed_run_is_the_same(model_path, tmp_path, engine):
    settings = {"save_strategy": "steps", "save_steps": 6}
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")
        if torch.cuda.is_available():
            pytest.skip("vLLM's build for GPUs does not run on a CPU, where these ranks are")
        settings |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
    done = launch(model_path, tmp_path / "whole", **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [(tmp_path / "whole" / f"rank{rank}.jsonl").read_text() for rank in range(2)]
    assert ranks[0] == ranks[1], "temperature, target, difficulty and counts are equal on all ranks at every step"
    steps = [json.loads(line) for line in ranks[0].splitlines()]
    assert len(steps) == 12
    assert len({step["temperature"] for step in steps}) > 6
    assert [sum(step["rollouts"]) for step in steps] == [16 * (i + 1) for i in range(12)]
    assert len({row["rollouts"] for row in read_rollouts(tmp_path / "whole")}) > 1, "budgets did differ"

    done = launch(model_path, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-6"), **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    start = AutoModelForCausalLM.from_pretrained(model_path)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


# Three groups of eight on two ranks of twelve rows: the second group lies on both.
STRADDLING = {
    "num_generations": 8,
    "num_generations_max": 16,
    "lr_scheduler_type": "constant",
    "loss_type": "grpo",
    "max_grad_norm": 0.0,
}


def one_rank(model_path, output_dir, **settings):
    trainer = build_trainer(model_path, output_dir, **{"per_device_train_batch_size": 24} | settings)
    force_completions(trainer)
    trainer.add_callback(Recorder(trainer))
    trainer.train()
    save_weights(trainer)


def test_two_ranks_compute_the_gradient_of_one(model_path, tmp_path):
    settings = STRADDLING | {"max_steps": 1, "optim": "sgd", "learning_rate": 10.0}  # SGD's update is the gradient
    one_rank(model_path, tmp_path / "one", **settings | {"reward_funcs": length_reward})
    # The second does not count towards the gradient, but towards pass@1.
    settings |= {"reward_funcs": ["length_reward", "easy_prompt_reward"], "reward_weights": [1.0, 0.0]}
    settings |= {"difficulty_reward_func": "easy_prompt_reward", "per_device_train_batch_size": 12}
    settings |= {"eval_prompts": 5, "num_generations_eval": 4, "per_device_eval_batch_size": 8}
    done = launch(model_path, tmp_path / "two", forced=True, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(value != 0 for _, value in recorded(tmp_path / "one")[1][0]), "of the group that lies on both, too"
    weights = [tmp_path / name / "weights.safetensors" for name in ("one", "two")]
    assert_same_update(Path(model_path) / "model.safetensors", *weights, rel=1e-5)
    # Two of five prompts. accelerate fills the last batch up with the first ones, which are not to count twice.
    assert json.loads((tmp_path / "two" / "eval.json").read_text())["eval_pass@1"] == pytest.approx(2 / 5)


def test_two_ranks_do_what_one_does_and_go_on_as_one(model_path, tmp_path):
    # With its usual epsilon, Adam turns the rounding error of a gradient near zero into a whole step.
    settings = STRADDLING | {"adam_epsilon": 1e-3, "learning_rate": 1e-3}
    one_rank(model_path, tmp_path / "one", **settings)
    settings["save_strategy"], settings["save_steps"] = "steps", 6
    done = launch(model_path, tmp_path / "two", forced=True, **settings | {"per_device_train_batch_size": 12})
    assert done.returncode == 0, done.stderr[-4000:]
    steps, advantages = recorded(tmp_path / "one")
    assert len({count for step in steps for count in step["rollouts"]}) > 3, "budgets did differ"
    assert_same_state(recorded(tmp_path / "two")[0], steps)
    halves = zip(*(recorded(tmp_path / "two", rank)[1] for rank in range(2)), strict=True)
    for whole, (first, second) in zip(advantages, halves, strict=True):
        (forced, expected), (completions, found) = (
            zip(*sorted(rows), strict=True) for rows in (whole, first + second)
        )
        assert completions == forced
        assert found == pytest.approx(expected, abs=1e-6)

    checkpoint = tmp_path / "two" / "checkpoint-6"
    settings |= {"resume": str(checkpoint), "num_processes": 1, "per_device_train_batch_size": 24, "forced": True}
    done = launch(model_path, tmp_path / "refused", **settings)
    assert done.returncode != 0
    assert f"{checkpoint} was saved by 2 processes with DeepSpeed; this run has 1" in done.stderr

    tag = checkpoint / "global_step6"
    command = [
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        tag,
        "--output_folder",
        f"{tag}_universal",
    ]
    subprocess.run([sys.executable, *command], env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=True)
    done = launch(model_path, tmp_path / "on", **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_state(recorded(tmp_path / "on")[0], steps[6:])
    weights = [tmp_path / name / "weights.safetensors" for name in ("one", "on")]
    assert_same_update(Path(model_path) / "model.safetensors", *weights, rel=1e-4)


@pytest.mark.parametrize(("policy", "steps"), [("rows", {"loss_type": "grpo"}), ("tokens", {"num_iterations": 2})])
def test_two_ranks_keep_in_step_where_one_has_less_to_learn(model_path, tmp_path, policy, steps):
    """Four prompts a rank: all rows of three of the first's have no advantage, and of one of the second's.

    Micro-steps have no rows then. DeepSpeed added the gradients of the step before to those that came next.
    """
    settings = {
        **steps,
        "gradient_accumulation_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 4,
        "rollout_allocation": "uniform",
        "shuffle_dataset": False,
    }
    one = {"per_device_train_batch_size": 8, "reward_funcs": uneven_reward, "micro_batching": "none"}
    one_rank(model_path, tmp_path / "one", **settings | one)
    two = {"per_device_train_batch_size": 4, "reward_funcs": ["uneven_reward"], "micro_batching": policy}
    done = launch(model_path, tmp_path / "two", forced=True, **settings | two)
    assert done.returncode == 0, done.stderr[-4000:]
    equal = [sum(value == 0 for _, value in recorded(tmp_path / "two", rank)[1][0]) for rank in range(2)]
    assert equal == [12, 4]
    found, expected = ([step["temperature"] for step in recorded(tmp_path / name)[0]] for name in ("two", "one"))
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(found)) > 1, "it follows the entropy of all rows"
    weights = [tmp_path / name / "weights.safetensors" for name in ("one", "two")]
    assert_same_update(Path(model_path) / "model.safetensors", *weights, rel=1e-4)


def test_two_ranks_choose_the_prompts_that_one_chooses(model_path, tmp_path):
    """PREPO: seven candidates on two ranks, and weights relative to the whole batch's mean."""
    settings = STRADDLING | {"prompt_selection_ratio": 3 / 7, "entropy_weighting": True, "adam_epsilon": 1e-3}
    one_rank(model_path, tmp_path / "one", **settings)
    done = launch(model_path, tmp_path / "two", forced=True, **settings | {"per_device_train_batch_size": 12})
    assert done.returncode == 0, done.stderr[-4000:]
    steps, advantages = recorded(tmp_path / "one")
    assert_same_state(recorded(tmp_path / "two")[0], steps)
    assert_same_advantages(tmp_path / "two", advantages)


@pytest.mark.parametrize(
    "policy",
    [
        {"dynamic_sampling": True, "max_resample_rounds": 4},
        {"rollout_allocation": "pilot", "temperature_spread": 0.5, "rerank_every": 2},
    ],
    ids=str,
)
def test_two_ranks_keep_the_groups_that_one_keeps(model_path, tmp_path, policy):
    """Dynamic sampling, and what follows a pilot, move groups from rank to rank."""
    settings = STRADDLING | {"adam_epsilon": 1e-3} | policy
    one_rank(model_path, tmp_path / "one", **settings)
    done = launch(model_path, tmp_path / "two", forced=True, **settings | {"per_device_train_batch_size": 12})
    assert done.returncode == 0, done.stderr[-4000:]
    steps, advantages = recorded(tmp_path / "one")
    if "dynamic_sampling" in policy:
        assert sum(steps[-1]["rollouts"]) > 12 * 24, "batches were sampled anew"
    else:
        assert len({row["temperature"] for row in read_rollouts(tmp_path / "two") if row["step"] == 8}) > 1
    assert_same_state(recorded(tmp_path / "two")[0], steps)
    assert_same_advantages(tmp_path / "two", advantages)


def test_a_rank_that_dies_ends_the_job_which_then_resumes(model_path, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    assert launch(model_path, tmp_path / "run", kill_at=5, **settings).returncode != 0
    done = launch(model_path, tmp_path / "run", resume=True, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [entry["step"] for entry in history(tmp_path / "run")] == list(range(1, 13))


def test_a_reward_function_that_raises_on_one_rank_ends_both_and_the_run_is_saved(model_path, tmp_path):
    done = launch(model_path, tmp_path / "run", reward_funcs=["reward_that_fails_on_the_last_rank"])
    assert done.returncode != 0
    message = "RewardError: Reward function 'reward_that_fails_on_the_last_rank' raised KeyError: 'a', for row 0 of 8"
    assert done.stderr.count(message) == 2, done.stderr[-4000:]
    assert (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").exists(), "its last file"


def test_a_process_that_does_not_see_the_others_is_stopped(model_path, tmp_path):
    """Without ddp_backend on a CPU each of two processes would train alone."""
    done = launch(model_path, tmp_path / "run", ddp_backend=None)
    assert done.returncode != 0
    assert "The launcher started 2 processes (WORLD_SIZE), but this one trains alone" in done.stderr


def test_a_prompt_too_long_for_the_engine_of_one_rank_stops_both(model_path, tmp_path):
    """Each looks at its half of the prompts; those of the second have a character more."""
    pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")
    done = launch(model_path, tmp_path / "run", use_vllm=True, vllm_mode="colocate", vllm_max_model_length=14)
    assert done.returncode != 0
    assert done.stderr.count("vllm_max_model_length is 14, less than the longest prompt (7 tokens)") == 2
