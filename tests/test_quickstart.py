"""The quickstart from end to end, shortened: the full one is `make quickstart`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from recipes.quickstart.task import exact_answer_reward, write_solution


ROOT = Path(__file__).parent.parent
FIGURES = {"entropy.png", "temperature.png", "budgets.png", "all_wrong.png", "reward.png"}


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
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
    assert {path.name for path in (folder / "figures").iterdir()} == FIGURES
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() >= {"before", "quickstart", "quickstart-grpo"}
    assert set(report["before"]["pass@1"]) == {"2", "3", "4", "5", "6", "7", "8", "all"}
    train, test = (
        {json.loads(line)["prompt"] for line in (tmp_path / f"outputs/quickstart-base/{name}.jsonl").open()}
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (560, 140)
    assert not train & test
    assert "is there already" in run(tmp_path, "recipes.quickstart.prepare")


def test_the_reward_takes_the_last_result_alone():
    assert write_solution("4+7+5=", random.Random(0)) == "4+7=1 1+5=6"
    completions = ["4+7=1 1+5=6", "4+7=1 1+5=7", "6", "", "4+7=1 1+5=66"]
    assert exact_answer_reward(completions, ["6"] * 5) == [1.0, 0.0, 1.0, 0.0, 0.0]
