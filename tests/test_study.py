"""The study of benchmarks/study, with a model that has learned nothing: what counts is that all of it is there."""

import json

import numpy as np
import pytest
import yaml

from benchmarks.study import foretell, report, run
from e3_trl.runs.rollout_log import RolloutLog
from recipes.quickstart.task import RuleTask


@pytest.fixture
def small_study(tmp_path):
    study = run.read_study(run.STUDY)
    of_rules = {"problems": {"train": 1, "test": 1}, "steps": 2, "seeds": 1, "methods": ["grpo", "e3"]}
    study["tasks"] = {"rules": study["tasks"]["rules"] | of_rules}
    study["settings"] |= {"num_train_epochs": 8, "eval_steps": 2}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return run.Arguments(config=str(path), output_dir=str(tmp_path / "study"), processes=1)


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_killed_and_reports_what_is_there(small_study, tmp_path, capsys):
    bases, runs, many = run.all_jobs(small_study, run.read_study(small_study.config))
    assert [job.method for job in runs] == ["grpo", "e3"]
    for job in (bases[0], runs[0]):
        job.folder.mkdir(parents=True, exist_ok=True)
        run.run_job(job)
    (runs[1].folder / "e3").mkdir()  # killed in the middle of it
    before = runs[0].result.stat().st_mtime_ns
    run.main(small_study)
    assert runs[0].result.stat().st_mtime_ns == before
    e3 = json.loads(runs[1].result.read_text())
    assert sum(e3["rollouts"]) == 8 * 128
    assert e3["log"]["temperature"][-1] != 1
    assert len(e3["correct"]) == 24
    assert [job.result.exists() for job in many] == [True] * 3

    folders = {"results_dir": str(tmp_path / "results"), "figures_dir": str(tmp_path / "figures")}
    folders["config"] = small_study.config
    report.main(report.Arguments(study_dir=small_study.output_dir, **folders))
    assert "| e3 | 1 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "study.json").read_text())
    assert found["runs"]["rules"]["e3"]["0"]["rollouts"] == 8 * 128
    assert {name for name, of_seeds in found["runs"]["rules"].items() if "pass@256" in of_seeds["0"]} == {
        "base",
        "grpo",
        "e3",
    }
    # Of one seed there is no interval.
    assert found["difference_to_grpo"]["rules"] == {}
    # Where the runs are gone, what was reported of them stays.
    (tmp_path / "gone" / "rules" / "seed0").mkdir(parents=True)
    report.main(report.Arguments(study_dir=str(tmp_path / "gone"), **folders))
    assert json.loads((tmp_path / "results" / "study.json").read_text()) == found
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"study_pass_at_k.png", "study_runs.png"}


def test_what_replay_foretells_is_set_beside_what_runs_had(tmp_path):
    rows = {"grpo": [(4, 0), (4, 2)] * 2, "e3_knapsack": [(2, 0), (6, 3)] * 2}
    for seed in range(2):
        for method, budgets in rows.items():
            log = RolloutLog(tmp_path / "rules" / f"seed{seed}" / method)
            for step in range(2):
                (first, right), (second, others) = budgets[2 * step : 2 * step + 2]
                names = ("prompt_id", "rollouts", "correct", "tokens")
                columns = map(np.array, ([0, 1], [first, second], [right, others], [1, 1]))
                difficulty = np.full(2, 0.5 if step else np.nan)
                log.append((step + 1, step, step), dict(zip(names, columns, strict=True)), difficulty, np.ones(2))
    output = tmp_path / "foretell.json"
    foretell.main(foretell.Arguments(study_dir=str(tmp_path), output=str(output)))
    (found,) = json.loads(output.read_text()).values()
    assert found["signal"]["measured"] == pytest.approx(6 / 8 - 4 / 8)
    assert found["all_wrong"]["measured"] == 0
    assert found["signal"]["foretold"] > 0, "more for the prompt that is sometimes solved"


def test_learning_rates_are_tried_on_every_method(small_study):
    small_study.learning_rates = [1e-4, 4e-4]
    _, runs, many = run.all_jobs(small_study, run.read_study(small_study.config))
    assert [job.name for job in runs] == ["grpo@0.0001", "grpo@0.0004", "e3@0.0001", "e3@0.0004"]
    assert {job.result.name for job in runs} == {f"{job.name}.json" for job in runs}
    assert not many


def test_what_is_not_in_the_study_is_named(small_study):
    small_study.methods = ["gpro"]
    with pytest.raises(ValueError, match="gpro.*Choose from.*grpo"):
        run.main(small_study)


def made_up(correct, **changes) -> dict:
    """A run of four steps of 10 rollouts and 100 tokens, evaluated at the second and the last."""
    log = {"entropy": [0.2, 0.2, 0.1, 0.3], "target_entropy": [0.2] * 4, "temperature": [1.0] * 4}
    log["rollouts/all_wrong"] = [0.5, 0.4, 0.3, 0.1]
    made = {"correct": correct, "correct_at_own_temperature": correct, "last_temperature": 1.0, "seconds": 1.0}
    made |= {"rollouts": [0, 10, 10, 10, 10], "tokens": [0, 100, 100, 100, 100], "log": log}
    return made | {"evaluated_at": [2, 4], "pass@1": [0.5, 0.9]} | changes


def test_the_numbers_of_a_run():
    base = {"correct": [64, 0, 0, 0], "level": ["1", "1", "2", "2"], "family": ["A", "A", "B", "C"]}
    numbers = report.measure(made_up([64, 64, 32, 0]), base, ["1", "2"], goal=0.6)
    assert numbers["pass@1"] == pytest.approx(0.625)
    assert (numbers["easy pass@1"], numbers["hard pass@1"]) == (1.0, 0.25)
    assert numbers["pass@64"] == 0.75
    assert numbers["families solved"] == pytest.approx(2 / 3)
    assert numbers["all-wrong"] == 0.1
    assert numbers["entropy error"] == pytest.approx(0.5)
    assert (numbers["rollouts to goal"], numbers["tokens to goal"]) == (40, 400)
    assert report.measure(made_up([64, 64, 32, 0]), base, ["1", "2"], goal=0.5)["rollouts to goal"] == 20
    assert report.measure(made_up([64, 64, 32, 0]), base, ["1", "2"], goal=0.95)["rollouts to goal"] is None


def test_the_report_compares_with_e3_and_with_maxrl_alone(tmp_path, capsys):
    correct = {"grpo": 16, "e3": 32, "e3_mean": 64, "grpo_mean": 48}
    methods = {name: {} for name in correct}
    study = {"tasks": {"rules": {"task": "recipes.quickstart.task.RuleTask"}}, "methods": methods}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    for seed in range(3):
        folder = tmp_path / "rules" / f"seed{seed}"
        folder.mkdir(parents=True)
        base = {"correct": [8, 8], "level": list(RuleTask.levels)[::3][:2], "family": ["A", "B"]}
        runs = {"base": base} | {name: made_up([count] * 2) for name, count in correct.items()}
        for name, made in runs.items():
            (folder / f"{name}.json").write_text(json.dumps(made))
    folders = {name: str(tmp_path / "out") for name in ("results_dir", "figures_dir")}
    report.main(report.Arguments(config=str(tmp_path / "study.yaml"), study_dir=str(tmp_path), **folders))
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    means = {
        reference: {name: one["pass@1"]["mean"] for name, one in found[f"difference_to_{reference}"]["rules"].items()}
        for reference in ("grpo", "e3", "grpo_mean")
    }
    assert means["grpo"] == {"e3": 0.25, "grpo_mean": 0.5, "e3_mean": 0.75}
    assert means["e3"] == {"e3_mean": 0.5}
    assert means["grpo_mean"] == {"e3_mean": 0.25}
    assert "| less grpo_mean on the same seed |" in capsys.readouterr().out


def test_methods_are_compared_seed_by_seed():
    base = {"correct": [32, 32], "level": ["1", "2"], "family": ["A", "B"]}
    measured = {
        name: {seed: report.measure(made_up(correct), base, ["1", "2"], 0.6) for seed, correct in runs.items()}
        for name, runs in {"grpo": {0: [64, 0], 1: [0, 0]}, "e3": {0: [64, 64], 1: [64, 0], 7: [0, 0]}}.items()
    }
    difference = report.compare(measured["e3"], measured["grpo"])["pass@1"]
    assert difference == {"mean": 0.5, "low": 0.5, "high": 0.5}  # seed 7 has no partner
    assert np.isclose(report.cost(measured["e3"], measured["grpo"])["rollouts to goal"], 1)
    assert report.cost(measured["e3"], measured["grpo"])["reached"] == 2
