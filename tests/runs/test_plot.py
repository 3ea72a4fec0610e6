"""The figures of run folders, and what goes into them."""

import json

import numpy as np
import pytest

from e3_trl import TemperatureSchedule
from e3_trl.commands.plot import main
from e3_trl.method.temperature import exact_temperature, mean_entropy
from e3_trl.runs.figures import Run, draw_formula, draw_runs, group_runs
from e3_trl.runs.report import read_benchmarks
from e3_trl.runs.rollout_log import RolloutLog


CURVES = {"entropy", "temperature", "all_wrong", "reward"}


@pytest.fixture
def write_run(tmp_path):
    """Write the folder of a run of 20 steps, 5 a pass, annealed from step 13."""

    def write(name, seed=None, offset=0.0, place=".", **settings):
        folder = tmp_path / name
        (folder / place).mkdir(parents=True)
        log = [
            {
                "step": step,
                "epoch": step / 5,
                "loss": 0.0,
                "entropy": 0.5 + offset,
                "target_entropy": 0.5 if step < 13 else 0.4,
                "temperature": 1.0 + offset,
                "reward": 0.1,
                "rollouts/all_wrong": 0.2 + offset,
            }
            for step in range(1, 21)
        ]
        (folder / place / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": log}))
        if seed is not None:
            arguments = {"seed": seed, "output_dir": name, **settings}
            (folder / "training_args.json").write_text(json.dumps(arguments))
        return folder

    return write


def drawn(figure_lines):
    return {line.get_label(): line.get_ydata() for line in figure_lines}


def test_runs_that_differ_in_their_seed_alone_are_one_method(write_run):
    folders = [write_run("a-0", 0, beta=0), write_run("b-0", 0, beta=1), write_run("a-1", 1, beta=0)]
    methods = group_runs(folders)
    assert {name: [run.path.name for run in runs] for name, runs in methods.items()} == {
        "a (2 seeds)": ["a-0", "a-1"],
        "b-0": ["b-0"],
    }


def test_without_settings_the_name_tells_the_seed(write_run):
    folders = [write_run(name) for name in ("grpo-seed0", "grpo_seed1", "grpo", "e3-seed0")]
    assert list(group_runs(folders)) == ["grpo (3 seeds)", "e3-seed0"]


def test_rounding_of_a_mean_is_not_annealing(write_run):
    folder = write_run("run")
    state = json.loads((folder / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        if entry["step"] == 4:
            entry["target_entropy"] = np.nextafter(0.5, 0)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert Run.read(folder).annealing_step == 13


def test_the_log_of_a_killed_run_is_in_its_last_checkpoint(write_run):
    run = Run.read(write_run("run", place="checkpoint-20"))
    assert (len(run.log), run.steps_per_pass, run.annealing_step) == (20, 5, 13)


def test_draws_mean_range_target_and_red_lines(write_run, monkeypatch, tmp_path):
    figures = {}
    monkeypatch.setattr(
        "e3_trl.runs.figures.Figure.savefig", lambda self, path, **kwargs: figures.update({path.stem: self})
    )
    draw_runs([write_run("a-0", 0), write_run("a-1", 1, offset=0.2), write_run("b", 0, beta=1)], tmp_path / "figures")
    assert set(figures) == CURVES | {"all_wrong_difference"}
    axes = figures["entropy"].axes[0]
    lines = drawn(axes.lines)
    np.testing.assert_allclose(lines["a (2 seeds)"], 0.6)
    np.testing.assert_allclose(lines["target of a (2 seeds)"][[0, -1]], [0.5, 0.4])
    band = axes.collections[0].get_datalim(axes.transData)
    assert (band.ymin, band.ymax) == pytest.approx((0.5, 0.7))
    red = [line.get_xdata()[0] for line in axes.lines if line.get_color() == "red"]
    assert red == [5, 10, 15, 13]
    # The run of b has seed 0, so it is compared with the run of a that has too.
    np.testing.assert_allclose(drawn(figures["all_wrong_difference"].axes[0].lines)["a (2 seeds) - b"], 0, atol=1e-12)


def test_draws_validation_and_pass_at_k(write_run, monkeypatch, tmp_path):
    figures = {}
    monkeypatch.setattr(
        "e3_trl.runs.figures.Figure.savefig", lambda self, path, **kwargs: figures.update({path.stem: self})
    )
    folder = write_run("a")
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 10, "eval_rewards/f/mean": 0.3, "eval_reward": 0.9}]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    report = tmp_path / "report_of_dapo.json"
    pass_at_k = {"1": {"mean": 0.2, "runs": [0.1, 0.3]}, "16": {"mean": 0.5, "runs": [0.4, 0.6]}}
    report.write_text(json.dumps({"method": "DAPO", "benchmarks": {"AIME": {"pass@k": pass_at_k}}}))
    assert read_benchmarks(report) == {"AIME": [{1: 0.1, 16: 0.4}, {1: 0.3, 16: 0.6}]}
    draw_runs([folder, report], tmp_path)
    np.testing.assert_allclose(drawn(figures["validation"].axes[0].lines)["a"], [0.3])
    np.testing.assert_allclose(drawn(figures["pass_at_k"].axes[0].lines)["DAPO"], [0.2, 0.5])


@pytest.mark.slow
def test_budgets_of_a_long_run(write_run, monkeypatch, tmp_path):
    """A panel per pass, but not of a hundred passes, nor with a hundred thousand points."""
    figures = {}
    monkeypatch.setattr(
        "e3_trl.runs.figures.Figure.savefig", lambda self, path, **kwargs: figures.update({path.stem: self})
    )
    folder = write_run("a")
    counts = {name: np.arange(3000) % 5 for name in ("prompt_id", "rollouts", "correct", "tokens")}
    log = RolloutLog(folder)
    for step in (1, 4, 6, 11, 16):
        log.append((step, step, (step - 1) // 5), counts, np.full(3000, np.nan if step < 6 else 0.5), np.ones(3000))
    draw_runs([folder], tmp_path / "figures")
    assert [axes.get_title() for axes in figures["budgets"].axes] == ["pass 1", "pass 2", "pass 3", "pass 4"]
    for axes in figures["budgets"].axes:
        points = axes.collections[0].get_offsets()
        assert len(points) == 2000
        assert set(points[:, 1]) == {0, 1, 2, 3, 4}
    for step in range(21, 500, 5):
        log.append((step, step, (step - 1) // 5), counts, np.full(3000, 0.5), np.ones(3000))
    draw_runs([folder], tmp_path / "figures")
    titles = [axes.get_title() for axes in figures["budgets"].axes]
    assert (titles[0], titles[-1], len(titles)) == ("pass 1", "pass 100", 8)


def test_writes_png_and_removes_what_no_longer_holds(write_run, tmp_path):
    folder = tmp_path / "figures"
    runs = [write_run("a"), write_run("b")]
    draw_runs(runs, folder)
    draw_runs(runs[:1], folder)
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in CURVES}
    assert (folder / "entropy.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds neither"):
        draw_runs([tmp_path], tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        draw_runs([tmp_path / "none"], tmp_path)


def test_the_exact_temperature_reaches_the_target():
    logits = np.random.default_rng(0).normal(scale=4, size=(50, 100))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=1).mean()
    assert mean_entropy(logits, 1.0) == pytest.approx(entropy)
    for alpha in (0.5, 1.0, 1.5):
        temperature = exact_temperature(logits, alpha * entropy)
        assert mean_entropy(logits, temperature) == pytest.approx(alpha * entropy, rel=1e-4)
    with pytest.raises(ValueError, match="target_entropy"):
        exact_temperature(logits, np.log(100))
    assert mean_entropy(np.array([[0.0, -np.inf], [0.0, 0.0]]), 1.0) == pytest.approx(np.log(2) / 2)


def test_the_formula_is_exact_where_nothing_is_to_change(tmp_path):
    logits = np.random.default_rng(0).normal(scale=4, size=(50, 100))
    result = draw_formula(logits, tmp_path / "formula.png")
    middle = result["alpha"].index(1.0)
    assert result["formula"][middle] == 1.0
    assert result["exact"][middle] == pytest.approx(1.0, abs=1e-5)
    expected = [TemperatureSchedule(100, target_entropy=alpha).step(1.0) for alpha in result["alpha"]]
    assert result["formula"] == pytest.approx(expected)
    assert (tmp_path / "formula.png").exists()


def test_the_command_draws_with_a_model(write_run, model_path, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say a0:"}\n{"prompt": "say b1:"}\n')
    arguments = ["--model", model_path, "--prompts", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "4"]
    main([str(write_run("a")), "--output_dir", str(tmp_path / "figures"), *arguments])
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == CURVES | {"formula"}


def test_the_command_draws_of_a_model_alone_and_says_what_it_needs(model_path, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say a0:"}\n')
    arguments = ["--model", model_path, "--output_dir", str(tmp_path / "figures"), "--max_new_tokens", "4"]
    main([*arguments, "--prompts", str(tmp_path / "prompts.jsonl")])
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"formula"}
    with pytest.raises(ValueError, match="no file .*test.jsonl.* Name one with --prompts"):
        main(arguments)
    with pytest.raises(SystemExit):
        main([])
    assert "nothing to draw. Name run folders" in capsys.readouterr().err
