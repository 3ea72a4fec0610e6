"""Each setting that changes the training is obeyed when a run is resumed with another value, or refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest
from conftest import build_trainer, length_reward, make_dataset, vowel_reward
from trl import GRPOConfig

from e3_trl import E3GRPOConfig


# Some of the values are far from what a run needs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Temperature clamped")]

# Of TRL's settings.
OF_TRL = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "beta", "temperature",
    "num_generations",
}  # fmt: skip
OBEYED = "the numbers change"
COSTS = "the numbers stay, to rounding"
EVALUATED = {"eval_dataset": make_dataset(4), "eval_strategy": "steps", "eval_steps": 2}
# Two of them are left out of each pass, so there are some left whose difficulty nobody has counted.
RATED = make_dataset(18).add_column("difficulty", [(i % 4) / 3 for i in range(18)])

# By field: another value, what comes of it, and what the run needs for the field to matter.
TABLE = {
    "rollout_allocation": ("uniform", OBEYED, {}),
    "success_decay": (0.5, OBEYED, {"max_steps": 20}),
    "success_prior": (5.0, OBEYED, {"rollout_allocation": "variance"}),
    "num_generations_min": (3, OBEYED, {}),
    "num_generations_max": (5, OBEYED, {}),
    "num_generations_step": (1, OBEYED, {}),
    "difficulty_column": ("difficulty", OBEYED, {"train_dataset": RATED}),
    "difficulty_reward_func": (
        "length_reward",
        "difficulty_reward_func is length_reward, and was vowel_reward",
        {"reward_funcs": [vowel_reward, length_reward]},
    ),
    "reuse_rollouts": (True, OBEYED, {}),
    "entropy_estimator": ("sampled", OBEYED, {}),
    "advantage_scale": ("mean", OBEYED, {}),
    "length_bias_coef": (0.5, OBEYED, {"length_bias_fraction": 1.0}),
    "length_bias_fraction": (1.0, OBEYED, {"length_bias_coef": 0.5}),
    "dynamic_sampling": (True, OBEYED, {}),
    "max_resample_rounds": (1, OBEYED, {"dynamic_sampling": True}),
    "prompt_selection_ratio": (0.5, "prompt_selection_ratio is 0.5, and was 1.0", {}),
    "prompt_selection": ("partly_solved", OBEYED, {"prompt_selection_ratio": 0.5}),
    "entropy_weighting": (True, OBEYED, {}),
    "temperature_schedule": ("constant", OBEYED, {}),
    "temperature_target_entropy": (2.5, OBEYED, {}),
    "temperature_target_fraction": (0.5, OBEYED, {}),
    "temperature_warmup_steps": (9, OBEYED, {"temperature_warmup_steps": 8}),
    "temperature_min": (0.99, OBEYED, {"temperature_target_entropy": 1.0}),
    "temperature_max": (1.01, OBEYED, {}),
    "temperature_spread": (0.5, OBEYED, {}),
    "annealing_start": (0.1, OBEYED, {}),
    "annealing_factor": (0.5, OBEYED, {}),
    "micro_batching": ("none", COSTS, {}),
    "max_tokens_per_micro_batch": (64, COSTS, {"micro_batching": "tokens"}),
    "eval_temperature": (0.5, OBEYED, EVALUATED),
    "learning_rate": (2e-3, OBEYED, {}),
    "weight_decay": (0.3, OBEYED, {}),
    "adam_beta1": (0.5, OBEYED, {}),
    "adam_beta2": (0.5, OBEYED, {}),
    "adam_epsilon": (1e-3, OBEYED, {}),
    "beta": (0.3, OBEYED, {"beta": 0.1}),
    "temperature": (0.5, "temperature is 0.5, and was 1.0", {}),
    "num_generations": (8, "num_generations is 8, and was 4", {}),
}


# Whether it is obeyed is seen in the engine, where test_vllm.py resumes with it.
IN_THE_ENGINE = {"vllm_lora_sync"}


def test_no_field_is_missing():
    own = {field.name for field in fields(E3GRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    assert set(TABLE) | IN_THE_ENGINE == own | OF_TRL, (
        "say what comes of the field where a resumed run has another value of it"
    )


@pytest.fixture(scope="module")
def whole_runs(model_path, tmp_path_factory):
    """By what it needs, a run that was not interrupted, with checkpoints."""
    runs: dict[str, tuple] = {}

    def run(needs: dict):
        if str(needs) not in runs:
            trainer = build_trainer(model_path, tmp_path_factory.mktemp("whole"), **settings_of(needs))
            trainer.train()
            runs[str(needs)] = trainer
        return runs[str(needs)]

    return run


def settings_of(needs: dict) -> dict:
    return {"save_strategy": "steps", "save_steps": 6, "max_steps": 14, **needs}


def numbers(trainer, first_step: int) -> list[dict]:
    """What was logged after a step, without times."""
    rows = [row for row in trainer.state.log_history if row["step"] > first_step and "train_loss" not in row]
    return [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]


@pytest.mark.parametrize("field", TABLE)
def test_a_changed_setting_is_obeyed_or_refused_by_name(model_path, whole_runs, tmp_path, field):
    value, expected, needs = TABLE[field]
    whole, settings = whole_runs(needs), settings_of(needs)
    checkpoint = f"{whole.args.output_dir}/checkpoint-{settings['save_steps']}"
    resumed = build_trainer(model_path, tmp_path, **settings | {field: value})
    if expected not in (OBEYED, COSTS):
        with pytest.raises(ValueError, match=expected):
            resumed.train(resume_from_checkpoint=checkpoint)
        return
    resumed.train(resume_from_checkpoint=checkpoint)
    before, after = (numbers(run, settings["save_steps"]) for run in (whole, resumed))
    assert len(before) == len(after)
    if expected == OBEYED:
        assert before != after
    else:
        assert [row["loss"] for row in after] == pytest.approx([row["loss"] for row in before], abs=1e-4)


@pytest.mark.parametrize("needs", [{}, {"beta": 0.1}], ids=str)
def test_with_the_same_settings_nothing_changes(model_path, whole_runs, tmp_path, needs):
    whole = whole_runs(needs)
    resumed = build_trainer(model_path, tmp_path, **settings_of(needs))
    resumed.train(resume_from_checkpoint=Path(whole.args.output_dir) / "checkpoint-6")
    assert numbers(resumed, 6) == numbers(whole, 6)
