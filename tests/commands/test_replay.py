"""What other budget rules would have given, from `rollouts.jsonl` alone."""

import json
import re

import numpy as np
import pytest
from conftest import make_dataset, uneven_reward

from e3_trl import RolloutBudgetSchedule
from e3_trl.commands.replay import (
    Batch,
    Bounds,
    budgets_by_rule,
    chance_of_none,
    fit_beta,
    main,
    measured,
    read_batches,
    replay,
    replay_rounds,
    sample_in_rounds,
)


NAN_20 = np.full(20, np.nan)


def made_up_run(num_prompts=2000, num_passes=4, rollouts=8, seed=0):
    """Batches of a policy that does not change, and every prompt's success rate."""
    rng = np.random.default_rng(seed)
    rate = rng.beta(0.5, 1.0, num_prompts)
    batches = []
    for number in range(num_passes):
        for ids in rng.permutation(num_prompts).reshape(-1, 20):
            batches.append(Batch(number, ids, np.full(20, rollouts), rng.binomial(rollouts, rate[ids]), NAN_20))
    return batches, rate


def test_the_chance_that_none_is_right_is_that_of_the_distribution():
    rng = np.random.default_rng(0)
    p = rng.beta(1.5, 4.0, 200_000)
    for n in (1, 3, 12):
        found = chance_of_none(np.array([1.5]), np.array([4.0]), np.array([n]))[0]
        assert found == pytest.approx(((1 - p) ** n).mean(), abs=3e-3)


def test_the_distribution_of_success_rates_is_found():
    batches, _ = made_up_run(num_passes=1)
    alpha, beta = fit_beta(np.concatenate([b.correct for b in batches]), np.full(2000, 8))
    assert (alpha, beta) == pytest.approx((0.5, 1.0), rel=0.15)


@pytest.mark.parametrize("rule", ["uniform", "rank", "variance", "knapsack"])
def test_it_predicts_what_a_second_run_of_the_same_policy_gives(rule):
    batches, rate = made_up_run()
    schedule = RolloutBudgetSchedule(8)
    budgets = list(budgets_by_rule(batches, rule, schedule))
    assert all(budget.sum() == 160 for budget in budgets)
    predicted = replay(batches, budgets)
    rng = np.random.default_rng(1)
    second = [
        Batch(batch.number, batch.prompt_ids, n, rng.binomial(n, rate[batch.prompt_ids]), batch.difficulty)
        for batch, n in zip(batches, budgets, strict=True)
    ]
    for name, value in measured(second).items():
        assert predicted[name] == pytest.approx(value, abs=0.03)
    # The right order, of rules that differ by 0.04 and more.
    as_it_was = replay(batches, [b.rollouts for b in batches])["signal"]
    assert np.sign(round(predicted["signal"] - as_it_was, 6)) == {"rank": -1, "uniform": 0, "knapsack": 1}.get(rule, 1)


@pytest.mark.parametrize(("rule", "favoured"), [("pilot", "0.05-0.25"), ("vigor", "0.25-0.5")])
def test_rules_that_follow_first_rewards_are_drawn(rule, favoured):
    """They are foretold what a second run of the same policy gives them, sampled by true success rates."""
    batches, rate = made_up_run(num_prompts=1000)
    schedule, rng = RolloutBudgetSchedule(8, 2, 16), np.random.default_rng(1)
    second = []
    for batch in batches:
        bounds = Bounds(schedule.num_generations, *schedule.bounds(batch.number))
        drawn = []

        def draw(number, batch=batch, drawn=drawn):
            drawn.append((number, rng.binomial(number, rate[batch.prompt_ids])))
            return drawn[-1][1]

        rollouts, correct = sample_in_rounds(rule, bounds, draw, 20)
        assert np.array_equal([rollouts, correct], np.sum(drawn, axis=0)), "all that was drawn, and nothing else"
        assert rollouts.sum() == 160
        assert bounds.num_generations_min <= rollouts.min()
        assert rollouts.max() <= bounds.num_generations_max
        second.append(Batch(batch.number, batch.prompt_ids, rollouts, correct, batch.difficulty))
    foretold = replay_rounds(batches, rule, schedule)
    for name, value in measured(second).items():
        assert foretold[name] == pytest.approx(value, abs=0.03)
    equal = replay(batches, [batch.rollouts for batch in batches])
    if rule == "vigor":
        assert foretold["signal"] > equal["signal"] + 0.02
    else:
        assert foretold["all_wrong"] < equal["all_wrong"]
    by_rate = foretold["rollouts"]
    assert max(by_rate, key=by_rate.get) == favoured
    assert by_rate["0.75-0.95"] < 7.5


def test_it_gives_the_budgets_that_the_run_had(make_trainer):
    trainer = make_trainer(rollout_allocation="knapsack")
    trainer.train()
    batches = read_batches(trainer.args.output_dir)
    assert [batch.number for batch in batches] == [0] * 4 + [1] * 4 + [2] * 4
    schedule = trainer.args.make_budget_schedule()
    for batch, budgets in zip(batches, budgets_by_rule(batches, "knapsack", schedule), strict=True):
        assert batch.rollouts.tolist() == budgets.tolist()


@pytest.mark.slow
def test_a_prompt_that_is_drawn_twice_in_a_pass_begins_no_other_one(make_trainer):
    """Dynamic sampling draws among all prompts, those to come in the same pass among them."""
    trainer = make_trainer(dynamic_sampling=True, reward_funcs=uneven_reward, max_resample_rounds=3)
    trainer.train()
    batches = read_batches(trainer.args.output_dir)
    assert [batch.number for batch in batches] == [0] * 4 + [1] * 4 + [2] * 4
    of_first = np.concatenate([batch.prompt_ids for batch in batches[:4]])
    assert len(of_first) > len(np.unique(of_first)), "else it shows nothing"


def test_batches_of_one_optimizer_step_stay_apart(make_trainer):
    trainer = make_trainer(steps_per_generation=1, gradient_accumulation_steps=2, per_device_train_batch_size=16)
    trainer.train()
    batches = read_batches(trainer.args.output_dir)
    assert len(batches) == trainer.num_generation_batches > trainer.state.global_step
    assert [len(batch.prompt_ids) for batch in batches] == [4] * len(batches)


def test_what_difficulty_was_made_of_is_read_back(make_trainer, tmp_path):
    level = [(7 * index % 16) / 15 for index in range(16)]
    data = make_dataset().add_column("level", level)
    trainer = make_trainer(
        train_dataset=data, difficulty_column="level", success_decay=0.5, success_prior=1.0, save_strategy="epoch"
    )
    trainer.train()
    results = main([trainer.args.output_dir, "--rules", "rank"])
    assert results["rank"] == results["as it was"]
    for setting, value in (("--success_decay", "1"), ("--success_prior", "0.1")):
        other = main([trainer.args.output_dir, "--rules", "variance", setting, value])
        assert other["variance"] != main([trainer.args.output_dir, "--rules", "variance"])["variance"]


def test_rows_of_an_earlier_version_are_refused(tmp_path):
    row = {"step": 1, "prompt_id": 0, "rollouts": 8, "correct": 1, "tokens": 9, "difficulty": None, "temperature": 1.0}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="do not say their batch"):
        main([str(tmp_path)])


def test_the_command(make_trainer, tmp_path, capsys):
    trainer = make_trainer(save_strategy="epoch")  # which writes its arguments
    trainer.train()
    folder = trainer.args.output_dir
    rules = ["uniform", "rank", "conftest.more_for_the_easy"]
    main([folder, "--rules", *rules, "--figure", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.json")])
    results = json.loads((tmp_path / "a.json").read_text())
    assert set(results) == {"measured", "as it was", *rules}
    assert results["rank"] == results["as it was"]  # with the bounds that stand in the folder
    assert results["uniform"] != results["as it was"]
    assert "with a signal" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 0
    for arguments, message in (([str(tmp_path / "nowhere")], "nowhere is not there. Name"),):
        with pytest.raises(SystemExit):
            main(arguments)
        assert re.search(message, capsys.readouterr().err)
