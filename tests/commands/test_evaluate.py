"""
`e3-trl evaluate`, and the sampling and scoring that it shares with `e3-trl prepare-data`. With vLLM: test_vllm.py.
"""

import importlib.util
import json
import linecache
import os
import shlex
import shutil
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich import box
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from e3_trl.commands.evaluate import EvaluationArguments, compare_table, main, write_report
from e3_trl.evaluation.completions import CompletionSampler, SamplingConfig, score_completions, write_in_chunks
from e3_trl.evaluation.problems import load_problems, mark_answer


ROOT = Path(__file__).parents[2]
PROBLEMS = [
    {"problem": f"say {name}:", "answer": str(index % 3), "source": "short" if index < 4 else "long"}
    for index, name in enumerate("abcdef")
]


def enough_vowels(completions, solution, **kwargs):
    """1 if a completion has at least as many vowels as the solution says."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(sum(c in "aeiou" for c in t) >= int(s.strip("$"))) for t, s in zip(texts, solution, strict=True)]


def write_problems(path: Path, problems: list[dict] = PROBLEMS) -> str:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return str(path)


@pytest.fixture
def settings(model_path, tmp_path) -> dict:
    return {
        "model_name_or_path": [model_path],
        "benchmarks": [write_problems(tmp_path / "benchmark.jsonl")],
        "num_samples": 4,
        "max_completion_length": 30,
        "chunk_size": 2,
        "reward_func": "test_evaluate.enough_vowels",
        "dtype": "float32",
        "use_vllm": False,
        "output_dir": str(tmp_path / "evaluation"),
    }


@pytest.fixture
def generated(monkeypatch) -> list[int]:
    """The seeds of the problems that transformers has sampled."""
    seeds, generate = [], CompletionSampler._generate_copies

    def count(self, model, prompt, seed):
        seeds.append(seed)
        return generate(self, model, prompt, seed)

    monkeypatch.setattr(CompletionSampler, "_generate_copies", count)
    return seeds


def run_folder(settings: dict, seed: int = 0) -> Path:
    name = settings["model_name_or_path"][0].strip("/").replace("/", "--")
    return Path(settings["output_dir"]) / f"{name}-seed{seed}"


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_lengths(texts: list[str], tokens: list[int], truncated: list[bool]) -> None:
    for text, length, cut_off in zip(texts, tokens, truncated, strict=True):
        # One token per character, but padding that was sampled is not in the text, nor is the token that ends it.
        assert len(text) + (not cut_off) <= length <= 30
        assert length == 30 or not cut_off


def test_the_report_says_what_the_completions_hold(settings, generated):
    main(EvaluationArguments(**settings, seeds=[0, 1], method="tiny"))
    folder = Path(settings["output_dir"])
    report = json.loads((folder / "report.json").read_text())["benchmarks"]
    assert list(report) == ["short", "long", "average"]
    for name, rows in (("short", slice(0, 4)), ("long", slice(4, 6))):
        runs = [read_rows(run_folder(settings, seed) / "completions.jsonl")[rows] for seed in (0, 1)]
        for k in (1, 2, 4):
            shares = []
            for run in runs:
                for row, problem in zip(run, PROBLEMS[rows], strict=True):
                    right = enough_vowels(row["completions"], [problem["answer"]] * 4)
                    draws = list(combinations(right, k))
                    shares.append(sum(map(any, draws)) / len(draws))
            assert report[name]["pass@k"][str(k)]["mean"] == pytest.approx(np.mean(shares))
        assert 0 < report[name]["pass@k"]["1"]["mean"] < 1
        tokens, truncated = (
            [value for run in runs for row in run for value in row[key]] for key in ("tokens", "truncated")
        )
        assert report[name]["tokens"] == pytest.approx(np.mean(tokens))
        assert report[name]["truncated"] == pytest.approx(np.mean(truncated))
        assert 0 < np.mean(truncated) < 1
        texts = [text for run in runs for row in run for text in row["completions"]]
        check_lengths(texts, tokens, truncated)
    assert len(set(generated)) == len(generated) == 12
    assert len(set(texts)) == len(texts), "copies and runs differ"

    table = (folder / "table.md").read_text()
    assert "| tiny " in table
    assert "pass@1 / pass@4" in table
    assert (folder / "pass_at_k.png").stat().st_size > 5000


def test_what_is_on_disk_is_not_sampled_again_and_compares(settings, generated, monkeypatch, capsys):
    main(EvaluationArguments(**settings, method="first"))
    generated.clear()
    # Without the weights, even.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    main(EvaluationArguments(**settings, method="first"))
    shutil.copytree(settings["output_dir"], settings["output_dir"] + "-other")
    main(EvaluationArguments(**settings, method="second", compare_with=[settings["output_dir"] + "-other"]))
    assert generated == []
    out = capsys.readouterr().out
    assert "first" in out.rsplit("pass@1 / pass@4", 1)[1]


@pytest.mark.slow
def test_two_methods_of_one_name_both_stand_in_the_table(settings):
    """`outputs/grpo/checkpoint-480` and `outputs/e3/checkpoint-480`: one of them was lost."""
    names = {}
    for name in ("grpo", "e3", "dapo"):
        names[name] = settings | {"output_dir": f"{settings['output_dir']}-{name}"}
        compare_with = [other["output_dir"] for other in names.values()][:-1]
        method = "dapo" if name == "dapo" else "checkpoint-480"
        main(EvaluationArguments(**names[name], method=method, compare_with=compare_with))
    table = (Path(names["dapo"]["output_dir"]) / "table.md").read_text().split("[95%")[0]
    folders = [names[name]["output_dir"] for name in ("grpo", "e3")]
    assert [
        line.split(" | ")[0].rstrip() for line in table.splitlines() if "checkpoint" in line or "| dapo" in line
    ] == [
        *(f"| checkpoint-480 ({folder})" for folder in folders),
        "| dapo",
    ]


def test_a_trainings_folder_is_no_evaluation(settings, tmp_path):
    """A bare KeyError."""
    (tmp_path / "report.json").write_text('{"seed": 0, "step": 480, "settings": {}, "metrics": {}}')
    with pytest.raises(ValueError, match="whose report.json is of a training. Name the output_dir of its evaluation"):
        main(EvaluationArguments(**settings, compare_with=[str(tmp_path)]))


def test_methods_of_other_benchmarks_stand_side_by_side_and_their_averages_do_not():
    def result(share):
        return {"pass@k": {"1": {"mean": share, "low": share, "high": share}}}

    reports = {
        "other": {"aime": result(0.1), "average": result(0.15)},
        "mine": {"aime": result(0.2), "math": result(0.6), "average": result(0.4)},
    }
    table = compare_table(reports, 1, box.MARKDOWN)
    assert [column.header for column in table.columns] == ["method", "aime", "math", "average"]
    assert [list(column.cells)[0] for column in table.columns] == ["other", "10.00 / 10.00", "- / -", "- / -"]
    assert [list(column.cells)[1] for column in table.columns][1:] == [
        "20.00 / 20.00",
        "60.00 / 60.00",
        "40.00 / 40.00",
    ]


@pytest.mark.slow
def test_an_adapter_alone_is_refused_with_the_command_that_merges_it(settings, model_path, forks, tmp_path):
    adapter = tmp_path / "run" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(model_path)
    get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(adapter)
    with pytest.raises(ValueError, match="is an adapter without its base. Merge it") as error:
        main(EvaluationArguments(**settings | {"model_name_or_path": [str(adapter)]}))
    python, *command = shlex.split(str(error.value).splitlines()[1])
    assert python == "python"
    forks.run(*command).check_returncode()
    main(EvaluationArguments(**settings | {"model_name_or_path": [f"{adapter}-merged"], "chunk_size": 3}))


def test_olympiad_benchs_own_columns(tmp_path):
    row = {
        "question": "x?",
        "solution": ["We get $x=2$ since ..."],
        "final_answer": ["2"],
        "is_multiple_answer": False,
    }
    problems = load_problems(write_problems(tmp_path / "olympiad.jsonl", [row]))
    assert problems["solution"].tolist() == ["2"]
    assert problems["question"].tolist() == ["x?"], "for reward functions"
    with pytest.raises(ValueError, match=r"has a row with 2 answers, \['1', '2'\]. Join them"):
        load_problems(write_problems(tmp_path / "two.jsonl", [row | {"final_answer": ["1", "2"]}]))


def test_rows_without_a_source_belong_to_the_whole_dataset(settings, tmp_path):
    """They vanished from the report, and ended `prepare-data` in a TypeError when all was sampled."""
    sources = ["short", None, "short", None, None, "2024"]
    rows = [problem | {"source": source} for problem, source in zip(PROBLEMS, sources, strict=True)]
    settings["benchmarks"] = [write_problems(tmp_path / "mixed.jsonl", rows)]
    assert load_problems(settings["benchmarks"][0])["source"].tolist() == [source or "mixed" for source in sources]
    main(EvaluationArguments(**settings))
    report = json.loads((Path(settings["output_dir"]) / "report.json").read_text())["benchmarks"]
    assert {name: row["problems"] for name, row in report.items()} == {"short": 2, "mixed": 3, "2024": 1, "average": 6}


def test_a_completion_that_could_not_be_checked_is_told(settings, tmp_path, monkeypatch, caplog):
    def reward(completions, log_metric, **kwargs):
        log_metric("rewards/reward/unchecked", 0.25)
        return [0.0] * len(completions)

    monkeypatch.setattr("e3_trl.evaluation.completions.load_reward_func", lambda name: reward)
    config = SamplingConfig(num_samples=4)
    score_completions({"prompt": ["a"]}, [{"completions": ["b"] * 4}], tmp_path / "rewards.jsonl", config)
    assert "rewards/reward/unchecked is 25.00% in problems 0 to 0" in caplog.text


def test_a_mended_reward_function_is_run_again(settings, generated, tmp_path, monkeypatch):
    """Scores were kept under its name, and a mended one gave those of the broken one."""
    monkeypatch.chdir(tmp_path)
    source = "share = lambda: {}\n\ndef mended_reward(completions, **kwargs): return [share()] * len(completions)"
    for share, expected in ((0.0, 0), (1.0, 1)):
        Path("mended.py").write_text(source.format(share))
        sys.modules.pop("mended", None)
        importlib.invalidate_caches()
        linecache.checkcache()
        main(EvaluationArguments(**settings | {"reward_func": "mended.mended_reward"}))
        report = json.loads((Path(settings["output_dir"]) / "report.json").read_text())
        assert report["benchmarks"]["average"]["pass@k"]["1"]["mean"] == expected
    assert len(generated) == len(PROBLEMS), "sampled once"


def reads_columns(completions, solution, answer, level, **kwargs):
    """Compares text, and reads a column of its own."""
    assert list(solution) == list(answer) == list(kwargs["problem"])
    return [float(text == "x y" and number == 3) for text, number in zip(answer, level, strict=True)]


def test_a_reward_function_gets_the_columns_and_the_answer_as_it_stands(settings, tmp_path):
    rows = [
        {"problem": text, "answer": text, "level": level, "completions": "not the model's"}
        for text, level in (("x y", 3), ("7", 3), ("x y", 2))
    ]
    settings |= {"reward_func": "test_evaluate.reads_columns"}
    settings["benchmarks"] = [write_problems(tmp_path / "levels.jsonl", rows)]
    main(EvaluationArguments(**settings))
    report = json.loads((Path(settings["output_dir"]) / "report.json").read_text())
    assert report["benchmarks"]["levels"]["pass@k"]["1"]["mean"] == pytest.approx(1 / 3)


KILLED = """
import json, os, signal, sys
from e3_trl.evaluation.completions import CompletionSampler
from e3_trl.commands.evaluate import EvaluationArguments, main

generate, calls = CompletionSampler._generate_copies, []

def die(self, *args):
    calls.append(args)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(self, *args)

CompletionSampler._generate_copies = die
main(EvaluationArguments(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(settings, generated, forks):
    whole = settings | {"output_dir": settings["output_dir"] + "-whole"}
    main(EvaluationArguments(**whole))
    generated.clear()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    done = forks.run("-c", KILLED, json.dumps(settings), env=environment)
    assert done.returncode == -9, done.stderr
    path = run_folder(settings) / "completions.jsonl"
    assert len(read_rows(path)) == 4, "two chunks of two"
    main(EvaluationArguments(**settings))
    assert len(generated) == 2, "the chunk that was lost, and no other"
    for name in ("completions.jsonl", "rewards.jsonl"):
        assert (run_folder(settings) / name).read_bytes() == (run_folder(whole) / name).read_bytes()


def test_half_a_row_is_made_anew(tmp_path):
    calls = []

    def square(chunk):
        calls.append(list(chunk))
        return [{"square": row**2} for row in chunk]

    path = tmp_path / "rows.jsonl"
    rows = write_in_chunks(square, 5, path, {}, 2, "")
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert write_in_chunks(square, 5, path, {}, 2, "") == rows
        assert path.read_bytes() == whole
    assert calls[:3] == [[0, 1], [2, 3], [4]]


@pytest.mark.slow
def test_a_problem_is_answered_alike_beside_others(settings):
    main(EvaluationArguments(**settings | {"chunk_size": 3}))
    all_rows = read_rows(run_folder(settings) / "completions.jsonl")
    alone = settings | {"output_dir": settings["output_dir"] + "-alone", "chunk_size": 64}
    main(EvaluationArguments(**alone, sources=["long"]))
    assert read_rows(run_folder(alone) / "completions.jsonl") == all_rows[4:]


def test_samples_are_of_the_model_at_the_temperature(model_path, tmp_path):
    """A checkpoint's generation_config.json must not bring its own top-p, temperature or penalties."""
    path = shutil.copytree(model_path, tmp_path / "model")
    own = {
        "do_sample": True,
        "temperature": 0.1,
        "top_p": 0.1,
        "top_k": 3,
        "repetition_penalty": 3.0,
        "eos_token_id": 1,
    }
    (path / "generation_config.json").write_text(json.dumps(own))
    config = SamplingConfig(
        num_samples=4000, temperature=0.7, max_completion_length=1, batch_size=1000, use_vllm=False,
        apply_chat_template=False,
    )  # fmt: skip
    rows = CompletionSampler(str(path), ["say aab:"], config).sample(0, tmp_path / "rows.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        logits = model(**tokenizer("say aab:", return_tensors="pt")).logits[0, -1]
    expected = torch.softmax(logits / 0.7, dim=-1).numpy()
    expected[1] += expected[0]  # neither the end nor padding is text
    expected[0] = 0
    ids = [1 if text == "" else tokenizer.convert_tokens_to_ids(text) for text in rows[0]["completions"]]
    counts = np.bincount(ids, minlength=len(expected))
    assert 0.5 * np.abs(counts / 4000 - expected).sum() < 0.05
    assert np.count_nonzero(counts) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"temperature": 0.5},
            "comes from temperature 1.0, and it is 0.5 now. Delete .*, or choose another output_dir",
        ),
        ({"num_samples": 2}, "num_samples 4, and it is 2"),
    ],
)
@pytest.mark.slow
def test_other_settings_do_not_go_on(settings, change, message):
    main(EvaluationArguments(**settings))
    with pytest.raises(ValueError, match=message):
        main(EvaluationArguments(**settings | change))


def test_a_corrected_answer_is_scored_and_not_sampled_again(settings, generated):
    main(EvaluationArguments(**settings))
    generated.clear()
    write_problems(Path(settings["benchmarks"][0]), [{**problem, "answer": "99"} for problem in PROBLEMS])
    main(EvaluationArguments(**settings))
    report = json.loads((Path(settings["output_dir"]) / "report.json").read_text())
    assert report["benchmarks"]["average"]["pass@k"]["4"]["mean"] == 0
    assert generated == []


@pytest.mark.slow
def test_another_model_in_the_same_folder_is_not_taken_for_the_first(settings, model_path, tmp_path):
    settings["model_name_or_path"] = [str(shutil.copytree(model_path, tmp_path / "trained"))]
    main(EvaluationArguments(**settings))
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="comes from weights"):
        main(EvaluationArguments(**settings))


def no_chat_template(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": []}, "model_name_or_path is empty. Name"),
        ({"benchmarks": ["missing.jsonl"]}, "no file 'missing.jsonl'. Check"),
        ({"benchmarks": [{"text": "1 + 1", "answer": "2"}]}, "no column 'one of problem, prompt, question'.*'text'"),
        ({"benchmarks": [{"problem": "1 + 1"}]}, "one has no answers. Add a column 'answer'"),
        ({"benchmarks": [*PROBLEMS, {"problem": "1 + 1", "source": "a"}]}, "no solution in row 6. Fill it in or drop"),
        ({"benchmarks": [*PROBLEMS, {"problem": "a" * 300, "answer": "1"}]}, "problem of 3.. tokens leaves no room"),
        ({"sources": ["aime"]}, r"sources names \['aime'\], and there are only \['long', 'short'\]"),
        ({"temperature": 0.0}, "temperature is 0.0.*Set it above 0"),
        ({"num_samples": 0}, "num_samples is 0. Set it to 1 or more"),
        (
            {"reward_func": "test_evaluate.reads_columns"},
            "'reads_columns' needs a column 'level', but the",
        ),
        ({"reward_func": "no.such.reward"}, "There is no reward function 'no.such.reward'.*Choose one of"),
        ({"model_name_or_path": no_chat_template}, "apply_chat_template is True, and .* has no chat template. Set"),
        ({"compare_with": ["nowhere"]}, "'nowhere', which holds no report.json. Evaluate"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(settings, model_path, tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    if isinstance(rows := change.get("benchmarks", [""])[0], dict):
        change = {"benchmarks": [write_problems(tmp_path / "other.jsonl", change["benchmarks"])]}
        assert rows
    if callable(change.get("model_name_or_path")):
        change = {"model_name_or_path": [model_path, no_chat_template(shutil.copytree(model_path, tmp_path / "bare"))]}
    with pytest.raises(ValueError, match=message):
        main(EvaluationArguments(**settings | change))


def test_vllm_is_taken_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert SamplingConfig().use_vllm is True
    assert SamplingConfig(use_vllm=False).use_vllm is False
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert SamplingConfig().use_vllm is False
    with pytest.raises(ValueError, match="vLLM is not installed. Install it"):
        SamplingConfig(use_vllm=True)


def test_the_recipe_is_the_papers_and_an_unknown_key_is_named(tmp_path):
    parser = TrlParser(EvaluationArguments)
    (args,) = parser.parse_args_and_config(
        ["--config", str(ROOT / "recipes/evaluate.yaml"), "--model_name_or_path", "a", "b"]
    )
    assert (args.num_samples, args.temperature, args.max_completion_length) == (16, 1.0, 6144)
    assert args.model_name_or_path == ["a", "b"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": ["a"], "benchmarks": ["b"], "num_sample": 3}))
    with pytest.raises(ValueError, match="num_sample"):
        TrlParser(EvaluationArguments).parse_args_and_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        *((same, same) for same in (r"2\sqrt{5}", r"(-\infty, 2)", "1,3,5", "x^2+4x+1", r"10,\!080", "25")),
        (r"\frac65", r"\frac{6}{5}"),
        ("5e-05", "0.00005"),  # what JSON's numbers become as text: they were read as 5e - 5
        ("1e+16", "10^{16}"),
        ("-2.5E-7", r"-2.5 \cdot 10^{-7}"),
    ],
)
def test_bare_answers_are_scored_as_formulas(tmp_path, answer, written):
    """Without delimiters, math-verify reads 2 in `2\\sqrt{5}` and 1.35 in `1,3,5`."""
    rows = [{"completions": [rf"It is \boxed{{{written}}}.", r"It is \boxed{2}.", ""]}]
    problems = {"prompt": ["?"], "solution": [mark_answer(answer)]}
    rewards = score_completions(problems, rows, tmp_path / "rewards.jsonl", SamplingConfig(num_samples=3))
    assert rewards.tolist() == [[1.0, 0.0, 0.0]]


def test_an_evaluation_into_a_runs_folder_adds_to_its_report(tmp_path):
    """It was written over: seed, settings and metrics of the training were gone, from the card too."""
    of_the_run = {"seed": 7, "step": 4, "settings": {"beta": 0.1}, "metrics": {"reward": 0.5}}
    (tmp_path / "report.json").write_text(json.dumps(of_the_run))
    for value in (0.5, 0.75):
        write_report(tmp_path, "e3", {"aime": {"pass@k": {"1": value}}}, {"num_samples": 4})
        assert json.loads((tmp_path / "report.json").read_text()) == of_the_run | {
            "method": "e3",
            "benchmarks": {"aime": {"pass@k": {"1": value}}},
            "evaluation": {"num_samples": 4},
        }
    write_report(tmp_path / "other", "e3", {}, {"num_samples": 4})
    report = json.loads((tmp_path / "other" / "report.json").read_text())
    assert report == {"method": "e3", "benchmarks": {}, "settings": {"num_samples": 4}}
