"""The real DeepSpeed ZeRO-3 on two ranks, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from e3_trl import read_rollouts


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")

ROOT = Path(__file__).parent.parent
MEASURED_TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def launch(model_path, output_dir, ddp_backend="gloo", **settings):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    settings = {"model_path": model_path, "output_dir": str(output_dir), "per_device_train_batch_size": 8} | settings
    command = ["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/zero3_cpu.yaml"]
    return subprocess.run(
        [sys.executable, *command, "ranks_run.py", json.dumps(settings | {"ddp_backend": ddp_backend})],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def history(output_dir):
    entries = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k not in MEASURED_TIMES} for entry in entries if "loss" in entry]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_ranks_agree_and_a_resumed_run_is_the_same(model_path, tmp_path, engine):
    settings = {"save_strategy": "steps", "save_steps": 6}
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")
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


def test_a_rank_that_dies_ends_the_job_which_then_resumes(model_path, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    assert launch(model_path, tmp_path / "run", kill_at=5, **settings).returncode != 0
    done = launch(model_path, tmp_path / "run", resume=True, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [entry["step"] for entry in history(tmp_path / "run")] == list(range(1, 13))


def test_a_process_that_does_not_see_the_others_is_stopped(model_path, tmp_path):
    """Without ddp_backend on a CPU each of two processes would train alone."""
    done = launch(model_path, tmp_path / "run", ddp_backend=None)
    assert done.returncode != 0
    assert "The launcher started 2 processes (WORLD_SIZE), but this one trains alone" in done.stderr
