"""A run that learns nothing says so, once, and one that learns says nothing."""

import re

import pytest
from conftest import make_dataset, vowel_reward

from e3_trl import E3GRPOTrainer, FastGRPOTrainer
from e3_trl.grpo import watch
from e3_trl.runs.report import read_report


def equal_reward(completions, **kwargs):
    return [1.0] * len(completions)


def no_reward(completions, **kwargs):
    return [None] * len(completions)


def unchecked_reward(completions, log_metric, **kwargs):
    log_metric("rewards/unchecked_reward/unchecked", 0.75)
    return vowel_reward(completions, **kwargs)


ENDLESS = {"generation_kwargs": {"suppress_tokens": [0, 1]}}
LONG = {"max_completion_length": 20}


# Which it is, with these limits.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Temperature clamped")]


@pytest.fixture
def warned(caplog):
    """What was said of this kind."""
    return lambda: [message for message in caplog.messages if "logs in a row" in message]


@pytest.mark.parametrize(
    ("trainer_class", "settings", "metric", "remedy"),
    [
        *(
            (trainer_class, settings, metric, remedy)
            for trainer_class in (FastGRPOTrainer, E3GRPOTrainer)
            for settings, metric, remedy in (
                ({"reward_funcs": equal_reward, **LONG}, "frac_reward_zero_std 1", "no group had.*num_generations"),
                ({"reward_funcs": no_reward, **LONG}, "reward nan", "no completion had a reward.*reward_funcs"),
                (
                    {"reward_funcs": unchecked_reward, **LONG},
                    "rewards/unchecked_reward/unchecked 0.75",
                    "the checker gave up.*reward_funcs",
                ),
                (ENDLESS, "completions/clipped_ratio 1", "nearly all completions were cut off.*max_completion_length"),
            )
        ),
        (
            E3GRPOTrainer,
            {"temperature_target_entropy": 10.0, "temperature_max": 1.2, **LONG},
            "temperature 1.2",
            r"the temperature was at temperature_max \(1.2\).*Set a lower temperature_target_entropy",
        ),
        (
            E3GRPOTrainer,
            {"temperature_target_entropy": 0.01, "temperature_min": 0.9, **LONG},
            "temperature 0.9",
            r"the temperature was at temperature_min \(0.9\).*Set a higher temperature_target_entropy",
        ),
    ],
)
def test_what_keeps_a_run_from_learning_is_said_once(make_trainer, warned, trainer_class, settings, metric, remedy):
    trainer = make_trainer(trainer_class, max_steps=12, learning_rate=1e-6, **settings)
    trainer.train()
    assert len(warned()) == 1, warned()
    assert re.search(rf"For 10 logs in a row \({metric}\) {remedy}", warned()[0])
    assert trainer.state.global_step == 12, "it is not stopped"


@pytest.mark.parametrize("trainer_class", [FastGRPOTrainer, E3GRPOTrainer])
def test_a_run_that_learns_says_nothing(make_trainer, warned, trainer_class):
    trainer = make_trainer(trainer_class, max_steps=20, learning_rate=1e-3, **LONG)
    trainer.train()
    assert warned() == []


@pytest.fixture
def three_in_a_row(monkeypatch):
    monkeypatch.setattr(watch, "IN_A_ROW", 3)


def equal_in(*steps):
    """A reward function that tells completions apart in all steps but these."""

    def reward(completions, threshold, trainer_state, **kwargs):
        is_equal = trainer_state.global_step + 1 in steps
        return equal_reward(completions) if is_equal else [float(len(text)) for text in completions]

    return reward


@pytest.mark.usefixtures("three_in_a_row")
def test_a_row_that_is_broken_begins_anew_and_an_evaluation_does_not_break_it(make_trainer, warned):
    evaluated = {"eval_dataset": make_dataset(4), "eval_strategy": "steps", "eval_steps": 2}
    settings = {"per_device_eval_batch_size": 16, "max_steps": 11, **LONG, **evaluated}
    steps = [1, 2, 4, 5, 7, 8, 10, 11]
    make_trainer(FastGRPOTrainer, reward_funcs=equal_in(*steps), **settings).train()
    assert warned() == []
    steps = [1, 2, 3, 4, 5, 6, 9, 10, 11]
    make_trainer(FastGRPOTrainer, reward_funcs=equal_in(*steps), output_dir="b", **settings).train()
    assert len(warned()) == 1, "once"


@pytest.mark.usefixtures("three_in_a_row")
def test_a_log_between_generation_batches_does_not_count(make_trainer, warned):
    settings = {"steps_per_generation": 2, "reward_funcs": equal_reward, **LONG}
    make_trainer(FastGRPOTrainer, max_steps=4, **settings).train()
    assert warned() == []
    make_trainer(FastGRPOTrainer, max_steps=5, output_dir="b", **settings).train()
    assert len(warned()) == 1


@pytest.mark.usefixtures("three_in_a_row")
def test_a_run_that_goes_on_counts_anew(make_trainer, warned, caplog):
    settings = {"reward_funcs": equal_reward, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **LONG}
    make_trainer(FastGRPOTrainer, **settings).train()
    assert len(warned()) == 1
    caplog.clear()
    trainer = make_trainer(FastGRPOTrainer, **settings)
    for _ in range(2):
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
        assert trainer.state.global_step == 4
        assert warned() == [], "two logs"
    trainer.train(resume_from_checkpoint=False)
    assert len(warned()) == 1


@pytest.mark.usefixtures("three_in_a_row")
def test_the_report_says_what_was_warned_of_also_before_a_run_went_on(make_trainer, warned):
    settings = {"reward_funcs": equal_reward, "save_strategy": "steps", "save_steps": 4, **LONG}
    trainer = make_trainer(FastGRPOTrainer, max_steps=4, **settings)
    trainer.train()
    (message,) = warned()
    expected = [{"step": 3, "message": message.removeprefix("[RANK 0] ")}]
    assert read_report(trainer.args.output_dir)["warnings"] == expected
    resumed = make_trainer(FastGRPOTrainer, max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=True)
    resumed.create_model_card()
    assert read_report(trainer.args.output_dir)["warnings"] == expected
    resumed.train(resume_from_checkpoint=False)
    assert [one["step"] for one in resumed.watch.warnings] == [3], "of a new run"
