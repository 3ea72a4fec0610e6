"""The quickstart from end to end, shortened: the full one is `make quickstart`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.quickstart.task import exact_answer_reward, write_solution


ROOT = Path(__file__).parent.parent
FIGURES = {"entropy", "temperature", "budgets", "all_wrong", "all_wrong_difference", "reward", "pass_at_k"}


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prepares_trains_and_reports(tmp_path):
    run(tmp_path, "recipes.quickstart.prepare", "--steps", "20")
    launch = ["accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/cpu.yaml"]
    for name in ("e3", "grpo"):
        config = f"{ROOT}/recipes/quickstart/config_{name}.yaml"
        run(tmp_path, *launch, f"{ROOT}/recipes/train.py", "--config", config, "--max_steps", "36")
    table = run(tmp_path, "recipes.quickstart.report", "outputs/quickstart", "outputs/quickstart-grpo")
    assert "pass@16" in table
    folder = tmp_path / "outputs" / "quickstart"
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() >= {"before", "quickstart", "quickstart-grpo"}
    assert report["seed"] == 0
    assert report["settings"]["temperature_schedule"] == "entropy"
    assert set(report["before"]["pass@1"]) == {"2", "3", "4", "5", "6", "7", "8", "all"}
    train, test = (
        {json.loads(line)["prompt"] for line in (tmp_path / f"outputs/quickstart-base/{name}.jsonl").open()}
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (560, 140)
    assert not train & test
    assert "is there already" in run(tmp_path, "recipes.quickstart.prepare")


GREEDY = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    engine = LLM(model=sys.argv[1], dtype="float32", max_model_len=96)
    greedy = SamplingParams(temperature=0.0, max_tokens=16)
    print("GREEDY", [list(output.outputs[0].token_ids) for output in engine.generate(["1+2=", "7+8+9="], greedy)])
"""


def test_trains_with_zero3_and_vllm_and_vllm_loads_the_saved_model(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")
    if torch.cuda.is_available():
        pytest.skip("vLLM's build for GPUs does not run on a CPU, which this recipe is for")
    run(tmp_path, "recipes.quickstart.prepare", "--steps", "20")
    launch = ["accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/zero3_cpu.yaml"]
    config = f"{ROOT}/recipes/quickstart/config_e3_zero3_vllm.yaml"
    run(tmp_path, *launch, f"{ROOT}/recipes/train.py", "--config", config, "--max_steps", "3")
    folder = tmp_path / "outputs" / "quickstart-zero3-vllm"
    history = [
        entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    assert len(history) == 3
    for entry in history:
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.01)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt in ("1+2=", "7+8+9="):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected.append(model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :].tolist())
    (tmp_path / "greedy.py").write_text(GREEDY)
    assert f"GREEDY {expected}" in run(tmp_path, "greedy", str(folder))


def test_the_reward_takes_the_last_result_alone():
    assert write_solution("4+7+5=", random.Random(0)) == "4+7=1 1+5=6"
    completions = ["4+7=1 1+5=6", "4+7=1 1+5=7", "6", "", "4+7=1 1+5=66"]
    assert exact_answer_reward(completions, ["6"] * 5) == [1.0, 0.0, 1.0, 0.0, 0.0]
