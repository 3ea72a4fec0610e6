"""The quickstart from end to end, shortened: the full one is `make quickstart`."""

import json
import os
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study.tasks import ChainTask, SumTask
from recipes.quickstart.prepare import make_tokenizer
from recipes.quickstart.report import frequent
from recipes.quickstart.task import LEVELS, RuleTask, answer_reward


ROOT = Path(__file__).parents[2]
FIGURES = {"entropy", "temperature", "budgets", "all_wrong", "all_wrong_difference", "reward", "pass_at_k"}


def run(folder, *command, run, **environment):
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = run(*command, cwd=folder, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prepared(forks, tmp_path_factory):
    """The folder that `make quickstart` runs in, with a base model that was taught for less long."""
    folder = tmp_path_factory.mktemp("quickstart")
    run(folder, "-m", "recipes.quickstart.prepare", "--steps", "20", run=forks.run)
    return folder


@pytest.fixture
def run_here(prepared, monkeypatch, capsys):
    """Run a module or a script as `python` does, without another process, which would import everything anew."""

    def run_here(name, *arguments):
        monkeypatch.chdir(prepared)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
        return capsys.readouterr().out

    return run_here


@pytest.mark.slow
def test_trains_and_reports(prepared, run_here):
    for config in ("best", "grpo"):
        recipe = f"{ROOT}/recipes/quickstart/config_{config}.yaml"
        run_here(f"{ROOT}/recipes/train.py", "--config", recipe, "--max_steps", "36")
    table = run_here("recipes.quickstart.report", "outputs/quickstart", "outputs/quickstart-grpo")
    assert "pass@64" in table
    assert "Most frequent answers of 64" in table
    folder = prepared / "outputs" / "quickstart"
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() >= {"before", "quickstart", "grpo"}
    assert report["seed"] == 0
    assert report["settings"]["temperature_schedule"] == "entropy"
    assert report["settings"]["advantage_scale"] == "mean"
    assert set(report["before"]["pass@1"]) == {*RuleTask.levels, "all"}
    assert report["answers"].keys() == {"before", "quickstart", "grpo"}
    assert set(report["answers"]["before"]) == set(RuleTask.levels)
    base = json.loads((prepared / "outputs/quickstart-base/report.json").read_text())  # a line of the figure
    assert base["benchmarks"]["held-out problems"]["pass@k"].keys() == {"1", "2", "4", "8", "16", "32", "64"}


@pytest.mark.slow
def test_no_problem_is_both_trained_on_and_tested(prepared):
    train, test = (
        {json.loads(line)["prompt"] for line in (prepared / f"outputs/quickstart-base/{name}.jsonl").open()}
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (432, 192)
    assert not train & test


@pytest.mark.slow
def test_a_base_model_is_not_made_twice(run_here):
    assert "is there already" in run_here("recipes.quickstart.prepare")


def test_the_most_frequent_answers_are_shown_with_the_right_ones_marked():
    problem = {"answer": "12"}
    assert frequent(problem, ["a12", "b34", "a12", "c1"]) == "a12 ✓ 2x, b34 1x"
    assert frequent(problem, ["a2"] * 3) == "a2 3x"


GREEDY = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    # Most of its start would be compiling, and importing everything in another process.
    quick = {"enforce_eager": True, "distributed_executor_backend": "uni"}
    engine = LLM(model=sys.argv[1], dtype="float32", max_model_len=32, **quick)
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    print("GREEDY", [list(output.outputs[0].token_ids) for output in engine.generate(["A12:", "B789:"], greedy)])
"""


WITHOUT_INFERENCE = """
import runpy, sys
from benchmarks.gpu.sharding import leave_out_inference
leave_out_inference()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.engine
@pytest.mark.slow
def test_trains_with_zero3_and_vllm_and_vllm_loads_the_saved_model(prepared, forks, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")
    if torch.cuda.is_available():
        pytest.skip("vLLM's build for GPUs does not run on a CPU, which this recipe is for")
    (tmp_path / "without_inference.py").write_text(WITHOUT_INFERENCE)
    launch = ["accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/zero3_cpu.yaml"]
    launch += ["--main_process_port", "0", str(tmp_path / "without_inference.py"), f"{ROOT}/recipes/train.py"]
    recipe = ["--config", f"{ROOT}/recipes/quickstart/config_e3_zero3_vllm.yaml", "--max_steps", "3"]
    run(prepared, "-m", *launch, *recipe, run=forks.run, TORCH_COMPILE_DISABLE="1")
    folder = prepared / "outputs" / "quickstart-zero3-vllm"
    history = [
        entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    assert len(history) == 3
    for entry in history:
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.01)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt in ("A12:", "B789:"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected.append(model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :].tolist())
    (tmp_path / "greedy.py").write_text(GREEDY)
    said = run(tmp_path, "-m", "greedy", str(folder), run=forks.run, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert f"GREEDY {expected}" in said


def test_the_reward_takes_the_digits_alone():
    completions = ["c906", "a906", "906", "", "c9061", "c907"]
    assert answer_reward(completions, ["906"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_every_family_has_one_right_rule_and_is_taught_to_try_it_as_often_as_its_level_says():
    task = RuleTask(3)
    for family, level in task.level.items():
        prior = task.prior(family)
        assert sum(prior.values()) == pytest.approx(1)
        assert prior[task.choices[family][0]] == level
        assert max(prior, key=prior.get) in task.choices[family]
    assert sorted(task.level.values()) == sorted(4 * LEVELS)
    assert task.permutations != RuleTask(4).permutations


@pytest.mark.parametrize("task", [RuleTask(0), ChainTask(0), SumTask(0)])
def test_what_a_lesson_teaches_and_nothing_else_is_learned(task):
    rng = random.Random(0)
    test = task.problems(4, rng)
    prompts = {row["prompt"] for row in test}
    assert not prompts & {row["prompt"] for row in task.problems(4, rng, prompts)}
    for text, start, stop in task.lessons(200, rng, prompts):
        prompt = text[: text.index("=" if isinstance(task, SumTask) else ":") + 1]
        assert prompt not in prompts
        learned = text[start:stop]
        if isinstance(task, RuleTask) and stop == len(text):  # which rule
            assert (start, learned in task.permutations) == (len(prompt), True)
        else:  # the digits under the rule that stands before, or all of the answer; and where to end
            assert stop == len(text) + 1
            assert start == len(prompt) + isinstance(task, RuleTask)
    right = [task.choices[row["family"]][0] + row["answer"] for row in test] if isinstance(task, RuleTask) else None
    answers = right or [row["answer"] for row in test]
    assert task.reward(["=" * isinstance(task, SumTask) + text for text in answers], [r["answer"] for r in test]) == [
        1.0
    ] * len(test)


def test_every_character_survives_the_tokenizer_that_a_saved_model_is_loaded_with(tmp_path):
    make_tokenizer(RuleTask.characters).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(RuleTask.characters).input_ids
    assert len(set(ids)) == len(RuleTask.characters)
    assert tokenizer.decode(ids) == RuleTask.characters
