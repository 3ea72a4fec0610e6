"""`e3-trl prepare-data`. What it shares with `e3-trl evaluate` is tested there too."""

import json
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import build_trainer
from datasets import get_dataset_split_names, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import enough_vowels, write_problems
from transformers import AutoModelForCausalLM
from trl import TrlParser

from e3_trl.commands.prepare_data import PreparationArguments, balance, drop_known, main, split
from e3_trl.evaluation.completions import CompletionSampler
from e3_trl.evaluation.problems import mark_answer, normalize_problem, problem_text


ROOT = Path(__file__).parents[2]
PAPER_DATA = Path(__file__).parents[3] / "shared" / "data"
PROBLEMS = [
    {"problem": f"say {name}:", "answer": str(1 + index % 4), "source": "even" if index % 2 else "odd"}
    for index, name in enumerate("abcdefghijkl")
]
PROBLEMS += [
    {"problem": "Say  A:", "answer": "1", "source": "even"},
    {"problem": "say z:", "answer": "2", "source": "odd"},
]


@pytest.fixture
def settings(model_path, tmp_path) -> dict:
    return {
        "dataset_name": [write_problems(tmp_path / "raw.jsonl", PROBLEMS)],
        "test_sets": [write_problems(tmp_path / "test.jsonl", [{"question": "SAY $z$:"}])],
        "model_name_or_path": model_path,
        "num_samples": 4,
        "max_completion_length": 12,
        "chunk_size": 2,
        "reward_func": "test_evaluate.enough_vowels",
        "validation_per_source": 2,
        "dtype": "float32",
        "use_vllm": False,
        "output_dir": str(tmp_path / "data"),
    }


def read(settings: dict, name: str) -> pd.DataFrame:
    return pd.read_parquet(Path(settings["output_dir"]) / f"{name}.parquet")


def keys(frame: pd.DataFrame) -> set[str]:
    return {normalize_problem(prompt if isinstance(prompt, str) else list(prompt)) for prompt in frame["prompt"]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find  $x$\n.", "find x."),
        (r"What is \(\dfrac{1}{2}\)?", r"What is $\frac{1}{2}$?"),
        (r"\left( 2^{n}\right)", "(2^n)"),
        ("the ﬁrst １0 terms", "the first 10 terms"),
        (r"$90^{\circ}$, 25\%", r"$90^\circ$, $25$%"),
        ("x_{}^{}+1", "x+1"),
        ([{"role": "user", "content": "Find x"}], "Find x."),
        # In the paper's data, one in the training set and the other in a test set.
        (r"$1, 2, \cdots, n$", r"$1,2,\dots,n$"),
        ("a_1, ..., a_n", r"a_1,\ldots,a_n"),
        (r"$x=1 \text { and } y$", "x = 1 and $y$"),
        (r"\[x+1,\quad y\]", "$x+1, y$"),
        (r"$r_1, \overline{r_1}$", r"$r_1,$ $\overline{r}_1$"),
        (r"0 \leqslant x \leq y", r"0 \le x \le y"),
        ("Find all $n$ : [b]all[/b].\n\n[i]Proposed by A. B., USA[/i]", "Find all n, all"),
        (r"\begin{align*} x &= 1 \end{align*}", r"\[\begin{aligned} & x=1 \tag{1} \end{aligned}\]"),
        (r"f: A \to B", r"f: A \rightarrow B"),
    ],
)
def test_writings_of_one_problem(one, other):
    assert normalize_problem(one) == normalize_problem(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{12}", r"\frac{11}{2}"),
        ("x^{12}", "x^{1}2"),
        ("1.5", "15"),
        (r"\arcsin(-1)", r"\arcsin 1"),
        (r"\leftarrow", "arrow"),
        ("find x", "find y"),
        ("1,2", "12"),
        (r"\begin{pmatrix} 1 & 2", r"\begin{pmatrix} 12"),
    ],
)
def test_other_problems(one, other):
    assert normalize_problem(one) != normalize_problem(other)


def test_answers_that_are_marked_or_prose_stay():
    for answer in (r"$\frac12$", r"\boxed{3}", r"\(c = 2\)", "none of these", r"all $m \neq 1$"):
        assert mark_answer(answer) == answer
    assert mark_answer(r"\$5 ") == r"$\$5$"
    assert mark_answer(r"114\text{ square units}") == r"$114\text{ square units}$"


WRITINGS = [str, str.upper, "  {}".format, "${}$".format, r"\left. {}".format]
problem_frames = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(WRITINGS), st.sampled_from("ab"), st.sampled_from([0.0, 0.5, 1.0])),
    min_size=1,
    max_size=60,
).map(
    lambda rows: pd.DataFrame(
        {
            "prompt": [write(f"problem x{number}") for number, write, _, _ in rows],
            "solution": "$1$",
            "source": [source for *_, source, _ in rows],
            "accuracy": [accuracy for *_, accuracy in rows],
        }
    )
)


@hypothesis.settings(deadline=None)
@given(problem_frames, st.sets(st.integers(0, 30)), st.integers(0, 4), st.integers(0, 9), st.integers(0, 9))
@pytest.mark.slow
def test_parts_are_disjoint_whole_and_balanced(raw, test, per_source, most_solved, most_failed):
    test_prompts = [f"PROBLEM $x{number}$" for number in test]
    args = PreparationArguments(
        dataset_name=["raw"], num_correct_column="n", max_always_solved=most_solved, max_never_solved=most_failed
    )
    rng, counts = np.random.default_rng(0), {}
    unique = drop_known(raw, test_prompts, counts)
    fewest = min([per_source, *unique["source"].value_counts()])
    left, validation = split(unique, fewest, rng)
    train = balance(left, args, rng, counts)

    assert len(keys(train)) == len(train)
    assert len(keys(validation)) == len(validation)
    assert not keys(train) & keys(validation)
    assert not (keys(train) | keys(validation)) & {normalize_problem(prompt) for prompt in test_prompts}
    assert set(validation["source"].value_counts()) <= {fewest}
    solved = train["accuracy"].value_counts().to_dict()
    assert solved.get(1.0, 0) == min(most_solved, (left["accuracy"] == 1).sum())
    assert solved.get(0.0, 0) == min(most_failed, (left["accuracy"] == 0).sum())
    assert solved.get(0.5, 0) == (left["accuracy"] == 0.5).sum()
    dropped = counts["always_solved"]["dropped"] + counts["never_solved"]["dropped"]
    assert counts["rows"] == len(train) + len(validation) + counts["duplicates"] + counts["in_test_sets"] + dropped


def test_samples_measures_and_writes(settings, capsys):
    main(PreparationArguments(**settings))
    folder = Path(settings["output_dir"])
    train, validation = read(settings, "train"), read(settings, "validation")
    assert list(train) == ["prompt", "solution", "source", "accuracy", "difficulty"]
    assert (len(train), len(validation)) == (8, 4)
    assert validation["source"].value_counts().to_dict() == {"even": 2, "odd": 2}

    rows = [json.loads(line) for line in (folder / "sampling" / "completions.jsonl").read_text().splitlines()]
    expected = {
        problem["problem"]: np.mean(enough_vowels(row["completions"], [problem["answer"]] * 4))
        for row, problem in zip(rows, PROBLEMS[:12], strict=True)
    }
    both = pd.concat([train, validation])
    assert {problem_text(prompt): value for prompt, value in zip(both.prompt, both.accuracy, strict=True)} == expected
    assert len(set(expected.values())) > 2
    np.testing.assert_array_equal(both["difficulty"], 1 - both["accuracy"])

    counts = json.loads((folder / "report.json").read_text())["counts"]
    assert (counts["rows"], counts["duplicates"], counts["in_test_sets"]) == (14, 1, 1)
    assert np.add(counts["train"]["by_correct"], counts["validation"]["by_correct"]).tolist() == [
        sum(value == correct / 4 for value in expected.values()) for correct in range(5)
    ]
    assert "8 for training, 4 for validation" in capsys.readouterr().out
    assert (folder / "difficulty.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_card_names_the_splits_and_the_trainer_takes_them(settings, model_path, tmp_path):
    main(PreparationArguments(**settings))
    assert set(get_dataset_split_names(settings["output_dir"])) == {"train", "validation"}
    # Not the folder: datasets 5.2 caches one whose card names its files by the folder's name alone.
    files = {name: f"{settings['output_dir']}/{name}.parquet" for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files)
    trainer = build_trainer(
        model_path, tmp_path / "run", train_dataset=data["train"], reward_funcs=enough_vowels,
        difficulty_column="difficulty",
    )  # fmt: skip
    rank, accuracy = trainer.difficulty_tracker.difficulty, np.array(data["train"]["accuracy"])
    assert accuracy.min() < accuracy.max()
    assert rank[accuracy.argmin()] > rank[accuracy.argmax()], "the problem that is solved least is the hardest"
    trainer.args.max_steps = 1
    trainer.train()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_ends_alike(settings, monkeypatch):
    whole = settings | {"output_dir": settings["output_dir"] + "-whole"}
    main(PreparationArguments(**whole))
    calls, generate = [], CompletionSampler._generate_copies

    def stop(self, model, prompt, seed):
        calls.append(seed)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return generate(self, model, prompt, seed)

    monkeypatch.setattr(CompletionSampler, "_generate_copies", stop)
    with pytest.raises(KeyboardInterrupt):
        main(PreparationArguments(**settings))
    calls.clear()
    calls += [None] * 6  # never again
    main(PreparationArguments(**settings))
    assert len(calls) - 6 == 12 - 4, "two chunks of two were on disk"
    for name in ("train", "validation"):
        pd.testing.assert_frame_equal(read(settings, name), read(whole, name))


def test_answers_that_nobody_can_compare_are_left_out_of_given_counts_too(settings, tmp_path):
    """63 problems of the published data were prepared so, and `unscorable` was 0."""
    bad = ["none of these", "a positive integer", ""]
    rows = [{"problem": f"bad {index}", "answer": answer, "source": "odd"} for index, answer in enumerate(bad)]
    rows = [row | {"level": 4} for row in PROBLEMS + rows]
    settings["dataset_name"] = [write_problems(tmp_path / "levels.jsonl", rows)]
    settings |= {"model_name_or_path": None, "num_correct_column": "level", "apply_chat_template": False}
    for name in ("math_accuracy_reward", "math_reasoning_accuracy_reward"):
        main(PreparationArguments(**settings | {"reward_func": name}))
        counts = json.loads((Path(settings["output_dir"]) / "report.json").read_text())["counts"]
        assert counts["unscorable"] == 3
        both = pd.concat([read(settings, "train"), read(settings, "validation")])
        assert len(both) == 12
        assert not both["prompt"].str.startswith("bad").any()
    assert "no answer can be compared with theirs: 3." in (Path(settings["output_dir"]) / "README.md").read_text()


def test_shares_are_not_taken_for_counts(settings, tmp_path):
    """An always solved problem, 1.0, had difficulty 0.9."""
    rows = [{**problem, "share": 0.25 * (index % 5)} for index, problem in enumerate(PROBLEMS)]
    settings["dataset_name"] = [write_problems(tmp_path / "shares.jsonl", rows)]
    settings |= {"model_name_or_path": None, "num_correct_column": "share"}
    message = r"holds 0.25, which is no number of right answers out of num_samples \(10\). If .* set num_samples to 1"
    with pytest.raises(ValueError, match=message):
        main(PreparationArguments(**settings | {"num_samples": 10}))
    main(PreparationArguments(**settings | {"num_samples": 1}))
    both = pd.concat([read(settings, "train"), read(settings, "validation")])
    assert sorted(both["accuracy"]) == sorted(row["share"] for row in rows[:12])


def test_a_given_count_takes_the_place_of_sampling(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    rows = [{**problem, "level": index % 11} for index, problem in enumerate(PROBLEMS)]
    given_level = settings | {
        "dataset_name": [write_problems(tmp_path / "levels.jsonl", rows)],
        "model_name_or_path": None,
        "num_correct_column": "level",
        "num_samples": 10,
        "apply_chat_template": False,
    }
    main(PreparationArguments(**given_level))
    both = pd.concat([read(settings, "train"), read(settings, "validation")])
    assert dict(zip(both["prompt"], both["accuracy"], strict=True)) == {
        row["problem"]: row["level"] / 10 for row in rows[:12]
    }


@pytest.mark.parametrize(
    ("named", "limit", "longest"),
    # The template's "user:" is of one-character tokens; 6,000 / 2,048 characters for each of 40 tokens are 117.
    [(True, "40 tokens", 40 - len("user:")), (False, "117 characters", 117)],
)
@pytest.mark.slow
def test_prompts_that_are_too_long_are_not_sampled_and_are_counted(
    settings, model_path, tmp_path, capsys, named, limit, longest
):
    """A prompt of 9,009 characters was kept, and stopped every run with `vllm_max_model_length: 8192`."""
    problems = [{"problem": "a" * length, "answer": "1", "source": "odd"} for length in (longest, longest + 1)]
    settings["dataset_name"] = [write_problems(tmp_path / "long.jsonl", PROBLEMS + problems)]
    settings |= {"max_prompt_tokens": 40, "tokenizer_name_or_path": model_path if named else None}
    main(PreparationArguments(**settings))
    kept = keys(pd.concat([read(settings, "train"), read(settings, "validation")]))
    assert "a" * longest in kept
    assert len(kept) == 13
    folder = Path(settings["output_dir"])
    assert len((folder / "sampling" / "completions.jsonl").read_text().splitlines()) == 13
    counts = json.loads((folder / "report.json").read_text())["counts"]
    assert counts["too_long"] == {"limit": limit, "dropped": 1}
    assert f"- Left out as longer than {limit}: 1." in (folder / "README.md").read_text()
    assert "1 in test sets, 1 too long" in capsys.readouterr().out


def test_the_validation_data_are_drawn_before_the_balancing(settings, tmp_path):
    """They were drawn after it: with the paper's 2,000 of 4,085 always solved, half of those were missing there."""
    levels = [0] * 200 + [5] * 40 + [10] * 160
    rows = [
        {"problem": f"say {source} {index}", "answer": "1", "source": source, "level": level}
        for source in ("even", "odd")
        for index, level in enumerate(levels)
    ]
    settings |= {
        "dataset_name": [write_problems(tmp_path / "levels.jsonl", rows)],
        "model_name_or_path": None,
        "num_correct_column": "level",
        "num_samples": 10,
        "max_always_solved": 20,
        "max_never_solved": 30,
        "validation_per_source": 30,
    }
    main(PreparationArguments(**settings))
    validation = read(settings, "validation")["accuracy"].value_counts()
    off = validation - pd.Series({0.0: 30, 0.5: 6, 1.0: 24})  # as found
    assert off.abs().max() < 11, "three standard deviations"
    counts = json.loads((Path(settings["output_dir"]) / "report.json").read_text())["counts"]
    assert counts["train"]["by_correct"] == [30, *[0] * 4, 80 - validation[0.5], *[0] * 4, 20]
    assert counts["always_solved"] == {"found": 320 - validation[1.0], "dropped": 300 - validation[1.0]}


def test_unscorable_problems_are_left_out_and_counted(settings, monkeypatch):
    def some_none(completions, solution, **kwargs):
        return [None if answer == "4" else 1.0 for answer in solution]

    monkeypatch.setattr("test_evaluate.enough_vowels", some_none)
    main(PreparationArguments(**settings | {"max_always_solved": 5, "validation_per_source": 1}))
    counts = json.loads((Path(settings["output_dir"]) / "report.json").read_text())["counts"]
    assert counts["unscorable"] == 3
    assert counts["always_solved"] == {"found": 7, "dropped": 2}, "two are set aside"
    assert "4" not in set(read(settings, "train")["solution"])


def reads_level(completions, solution, level, **kwargs):
    return [float(number) for number in level]


@pytest.mark.slow
def test_the_columns_that_the_reward_function_names_are_kept(settings, tmp_path):
    """Training asks for them too."""
    rows = [{**problem, "level": index % 2, "other": 1} for index, problem in enumerate(PROBLEMS)]
    settings["dataset_name"] = [write_problems(tmp_path / "levels.jsonl", rows)]
    main(PreparationArguments(**settings | {"reward_func": "test_prepare_data.reads_level"}))
    train = read(settings, "train")
    assert list(train) == ["prompt", "solution", "source", "level", "accuracy", "difficulty"]
    assert train["accuracy"].tolist() == train["level"].tolist()
    assert set(train["solution"]) <= set("1234"), "as they stand"
    main(PreparationArguments(**settings | {"reward_func": "math_accuracy_reward"}))
    assert set(read(settings, "train")["solution"]) <= {f"${answer}$" for answer in "1234"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_name": []}, "dataset_name is empty. Name"),
        ({"dataset_name": ["missing.parquet"]}, "no file 'missing.parquet'. Check"),
        ({"model_name_or_path": None}, "model_name_or_path is None and num_correct_column is None. Set one"),
        ({"num_correct_column": "level"}, "num_correct_column is 'level'. Set one of them"),
        ({"num_correct_column": "level", "model_name_or_path": None}, r"no column 'level' \(num_correct\), only"),
        ({"num_correct_column": "problem", "model_name_or_path": None}, r"holds 'say a:', not a number in \[0, 4\]"),
        ({"num_correct_column": "answer", "model_name_or_path": None, "num_samples": 2}, r"holds '3', not a number"),
        ({"answer_column": "solution"}, r"no column 'solution' \(solution\), only \['problem', 'answer', 'source'\]"),
        ({"validation_per_source": 7}, "validation_per_source is 7, and source '.*' has 6 problems. Lower it"),
        ({"max_always_solved": -1}, "max_always_solved is -1. Set it to 0 or more"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0. Set it to 1 or more, or to None"),
        ({"reward_func": "nothing"}, "There is no reward function 'nothing'"),
        ({"hub_dataset_id": "me/data"}, "hub_dataset_id is 'me/data', and nobody is logged in. Run `hf auth login`"),
        ({"hub_dataset_id": "me/my data"}, "me/my data"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(settings, change, message, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr("e3_trl.commands.prepare_data.get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        main(PreparationArguments(**settings | change))


def test_a_failed_push_leaves_the_data_and_says_what_to_do(settings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(SystemExit, match="hub_dataset_id is 'me/data'.*could not be pushed.*(?s:.)*Log in with"):
        main(PreparationArguments(**settings, hub_dataset_id="me/data"))
    assert len(read(settings, "train")) == 8


def test_the_recipe_is_the_papers():
    (args,) = TrlParser(PreparationArguments).parse_args_and_config(
        ["--config", str(ROOT / "recipes/prepare_data.yaml"), "--use_vllm", "false"]
    )
    assert (args.num_samples, args.max_always_solved, args.validation_per_source) == (10, 2000, 128)


@pytest.mark.slow
@pytest.mark.skipif(not PAPER_DATA.is_dir(), reason="the paper's data are not there")
def test_the_papers_data(tmp_path):
    """The published configuration leaves the paper's 10,240 problems, none of them longer than the recipes allow."""
    recipe = yaml.safe_load((ROOT / "recipes/prepare_data_published.yaml").read_text())
    settings = recipe | {
        "dataset_name": [f"{PAPER_DATA}/all_data.parquet"],
        "test_sets": [f"{PAPER_DATA}/test.json"],
        "output_dir": str(tmp_path),
    }
    main(PreparationArguments(**settings))
    train, validation = read(settings, "train"), read(settings, "validation")
    test = pd.read_json(PAPER_DATA / "test.json", lines=True)
    assert len(keys(train)) == len(train) == 10_240
    assert not keys(train) & keys(validation)
    assert not (keys(train) | keys(validation)) & keys(test)
    assert validation["source"].value_counts().to_dict() == dict.fromkeys(["aime", "amc", "math", "omni_math"], 128)
    assert (train["accuracy"] == 1).sum() == 2000
    counts = json.loads((tmp_path / "report.json").read_text())["counts"]
    assert counts["too_long"] == {"limit": "6,000 characters", "dropped": 1}
    # 14 test problems were not found for their LaTeX, and 63 problems that cannot be scored were prepared.
    assert counts["in_test_sets"] == 22
    assert counts["unscorable"] > 100
