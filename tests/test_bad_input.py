"""Each mistake is one error that names the field, its value and the remedy, before a model is loaded."""

import warnings
from types import SimpleNamespace

import pytest
from conftest import length_reward, make_dataset, vowel_reward
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.generation import vllm_generation

from e3_trl import E3GRPOConfig, E3GRPOTrainer, read_rollouts
from e3_trl.checks import check_run
from e3_trl.grpo import checks
from e3_trl.grpo.adapter_sync import engine_for_adapter


NO_MODEL = "no/such/model"


def make_config(tmp_path, **settings):
    return E3GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations_min": 1}, "num_generations_min is 1.*2 or more"),
        ({"num_generations_min": 9}, r"num_generations_min is 9, above num_generations \(8\). Lower"),
        ({"num_generations_max": 7}, r"num_generations_max is 7, below num_generations \(8\). Raise"),
        ({"num_generations_step": -1}, "num_generations_step is -1. Set"),
        ({"rollout_allocation": "best"}, "rollout_allocation is 'best', and there is no such rule.*Set.*'knapsack'"),
        ({"rollout_allocation": "conftest.no_rule"}, "rollout_allocation is 'conftest.no_rule', and there is no.*Set"),
        (
            {"rollout_allocation": "pilot", "dynamic_sampling": True},
            "rollout_allocation is 'pilot' and dynamic.*Set one",
        ),
        ({"temperature_spread": 2.0}, r"temperature_spread is 2.0. Set it in \[0, 2\)"),
        (
            {"temperature_spread": 0.5, "temperature": 2.5, "temperature_schedule": "constant"},
            "temperature_spread is 0.5 and temperature 2.5, outside.*Widen",
        ),
        (
            {"temperature_spread": 0.5, "use_vllm": True, "vllm_mode": "server"},
            "temperature_spread is 0.5, and a vLLM server.*Set vllm_mode to 'colocate'",
        ),
        (
            {"temperature_spread": 0.5, "use_transformers_continuous_batching": True},
            "temperature_spread is 0.5, and.*Set use_transformers_continuous_batching to False",
        ),
        ({"reuse_rollouts": True, "top_p": 0.9}, "reuse_rollouts is True and top_p 0.9.*Leave top_p out"),
        ({"reuse_rollouts": True, "generation_kwargs": {"stop": "a"}}, "reuse_rollouts is True and generation_kwargs"),
        ({"reuse_rollouts": True, "vllm_structured_outputs_regex": "a"}, "reuse_rollouts is True and vllm_struct"),
        (
            {"reuse_rollouts": True, "use_transformers_continuous_batching": True},
            "reuse_rollouts is True, and.*Set use_transformers_continuous_batching",
        ),
        ({"success_decay": 0.0}, "success_decay is 0.0. Set"),
        ({"success_prior": -1.0}, "success_prior is -1.0. Set"),
        ({"temperature_schedule": "cosine"}, "temperature_schedule is 'cosine'. Set"),
        ({"temperature": 0.0}, "temperature is 0.0.*temperature_schedule to 'constant'"),
        ({"temperature_max": 0.9}, "temperature is 1.0.*temperature_max 0.9. Set"),
        ({"temperature_min": 1.1}, "temperature is 1.0, temperature_min 1.1.*Set"),
        ({"temperature_target_entropy": -1.0}, "temperature_target_entropy is -1.0. Set"),
        ({"temperature_warmup_steps": 0}, "temperature_warmup_steps is 0. Set"),
        ({"annealing_start": 2.0}, "annealing_start is 2.0. Set"),
        ({"temperature_target_fraction": 0.0}, "temperature_target_fraction is 0.0. Set"),
        (
            {"temperature_target_fraction": 0.5, "temperature_target_entropy": 1.0},
            "temperature_target_fraction is 0.5 and temperature_target_entropy 1.0: .*Set one",
        ),
        ({"annealing_factor": 1.5}, "annealing_factor is 1.5. Set"),
        ({"eval_temperature": 0.0}, "eval_temperature is 0.0. Set"),
        ({"length_bias_coef": -0.1}, "length_bias_coef is -0.1. Set"),
        ({"length_bias_fraction": 1.1}, "length_bias_fraction is 1.1. Set"),
        ({"micro_batching": "columns"}, "micro_batching is 'columns'. Set"),
        ({"loss_type": "gropo"}, "loss_type is 'gropo'. Set it to 'grpo', .* or 'vespo'"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level is 'row'. Set it to 'token' or 'sequence'"),
        ({"scale_rewards": "groups"}, "scale_rewards is 'groups'. Set it to 'group', 'batch' or 'none'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation is 'sum'. Set it to 'sum_then_norm"),
        ({"vllm_mode": "serve"}, "vllm_mode is 'serve'. Set it to 'colocate' or 'server'"),
        ({"vllm_importance_sampling_mode": "mask"}, "vllm_importance_sampling_mode is 'mask'. Set it to 'token_tr"),
        ({"micro_batching": "tokens", "max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch is 0 .*Set"),
        ({"max_tokens_per_micro_batch": 9}, "max_tokens_per_micro_batch is 9 and micro_batching is 'rows'. Set"),
        ({"entropy_estimator": "guessed"}, "entropy_estimator is 'guessed'. Set"),
        *(
            (
                {"entropy_estimator": "sampled", **given},
                f"entropy_estimator is 'sampled' and {name} .*{value}.*Set entropy_estimator to 'exact', or",
            )
            for name, value in {"top_k": 20, "top_p": 0.5, "min_p": 0.5, "repetition_penalty": 1.25}.items()
            for given in ({name: value}, {"generation_kwargs": {name: value}})
        ),
        ({"max_resample_rounds": 0}, "max_resample_rounds is 0. Set"),
        ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs sets temperature to 0.5.*Set `temperature`"),
    ],
)
def test_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        make_config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size is 2, which does not divide the 1.*Set"),
        (
            {"vllm_max_model_length": 256, "max_completion_length": 256},
            r"vllm_max_model_length is 256, which leaves no room.*max_completion_length \(256\). Set",
        ),
    ],
)
def test_vllm_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_config(tmp_path, use_vllm=True, **settings)


@pytest.mark.parametrize("settings", [{}, {"generation_batch_size": 64}])
def test_a_world_size_that_does_not_divide_the_batch(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(E3GRPOConfig, "world_size", 3)
    message = r"must be divisible by.*3 processes \(world size\) x per_device_train_batch_size \(4\).*Change one"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1, **settings)


def test_vllm_of_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.33.1")
    with pytest.raises(ValueError, match="vLLM 0.33.1 is installed.*0.22 to 0.31"):
        make_config(tmp_path, use_vllm=True)


def test_an_entropy_estimate_of_what_is_sampled_from_the_policy_is_taken(tmp_path):
    make_config(tmp_path, entropy_estimator="sampled", top_k=-1, min_p=0.0, generation_kwargs={"top_p": 1.0})
    make_config(tmp_path, entropy_estimator="exact", top_k=20, top_p=0.9)


def test_bounds_do_not_matter_to_a_run_without_budgets(tmp_path):
    make_config(tmp_path, num_generations=2, rollout_allocation="uniform")
    make_config(tmp_path, temperature_max=0.9, temperature_schedule="constant")


def stop_training(args, state, control, **kwargs):
    control.should_training_stop = True


def with_column(name, values):
    return make_dataset(len(values)).add_column(name, values)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (make_dataset(7), {}, "train_dataset has 7 prompts, fewer than the 8 .*num_generations 8.*Add prompts"),
        (
            make_dataset().to_iterable_dataset(),
            {"rollout_allocation": "uniform"},
            "annealing_start is 0.6, but max_steps is -1.*Set max_steps",
        ),
        (
            with_column("image", ["a.png"] * 16),
            {"dynamic_sampling": True},
            "dynamic_sampling is True.*Set it to False",
        ),
        (make_dataset().rename_column("prompt", "question"), {}, r"no column 'prompt'.*\['question', 'threshold'\]"),
        (make_dataset().remove_columns("threshold"), {}, "'vowel_reward' needs a column 'threshold'.*Add or rename"),
        (make_dataset(), {"difficulty_column": "level"}, "difficulty_column is 'level', but the dataset has only"),
        *(
            (with_column(name, ["a"] * 16), {}, f"The dataset has a column '{name}', the name of what.*Rename it")
            for name in ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
        ),
        (with_column("e3_prompt_id", list(range(16))), {}, "column 'e3_prompt_id', the name under.*Rename it"),
        (with_column("level", [0.5] * 15 + [10.0]), {"difficulty_column": "level"}, "'level' holds 10.0. Scale it"),
        (with_column("level", [-0.5] * 16), {"difficulty_column": "level"}, "'level' holds -0.5. Scale it"),
        (with_column("level", ["easy"] * 16), {"difficulty_column": "level"}, "'level' does not hold numbers.*Scale"),
        (
            make_dataset(),
            {"difficulty_reward_func": "accuracy"},
            r"difficulty_reward_func is 'accuracy', which is none of.*\['vowel_reward'\]. Set",
        ),
    ],
)
def test_data(tmp_path, dataset, settings, message):
    config = make_config(tmp_path, per_device_train_batch_size=64, **settings)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        E3GRPOTrainer(NO_MODEL, vowel_reward, config, dataset)


def test_a_stream_cannot_be_ranked_and_trains_without(make_trainer):
    """As in TRL, whose users change the class name alone."""
    message = "rollout_allocation is 'rank', but train_dataset is a IterableDataset.*'uniform'"
    with pytest.warns(UserWarning, match=message):
        trainer = make_trainer(train_dataset=make_dataset().to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert {row["rollouts"] for row in read_rollouts(trainer.args.output_dir)} == {4}


def test_without_data_trls_own_message_stands(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset` is required unless an `environment_factory` is provided"):
        make_trainer(train_dataset=None)


def test_trls_config_is_refused_by_name(tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is a GRPOConfig, which has none of E3's settings. Use E3GRPOConfig"):
        E3GRPOTrainer(NO_MODEL, vowel_reward, config, make_dataset())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, r"has 1 prompt\(s\)"),
        ({"per_device_train_batch_size": 64, "num_generations_min": 8}, "num_generations_min is 8"),
        ({"per_device_train_batch_size": 64, "num_generations_max": 8}, "num_generations_max 8"),
    ],
)
def test_budgets_that_cannot_differ_are_noticed(tmp_path, settings, message):
    config = make_config(tmp_path, **settings)
    with pytest.warns(UserWarning, match=rf"every prompt will get num_generations \(8\) rollouts.*{message}"):
        check_run(config, [vowel_reward], make_dataset())


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        ({"max_steps": 4}, True),
        ({"max_steps": -1, "num_train_epochs": 1}, True),
        ({"max_steps": 8, "per_device_train_batch_size": 8, "steps_per_generation": 2}, True),
        ({"max_steps": 5}, False),
        ({"max_steps": 4, "rollout_allocation": "pilot"}, False),
        ({"max_steps": 4, "rollout_allocation": "uniform"}, False),
        ({"max_steps": 4, "difficulty_column": "level", "train_dataset": with_column("level", [0.5] * 16)}, False),
    ],
)
def test_a_run_that_ends_in_its_first_pass_has_no_budgets_and_that_is_said(make_trainer, settings, is_said):
    trainer = make_trainer(**settings)
    callback = TrainerCallback()
    callback.on_step_begin = stop_training
    trainer.add_callback(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in caught if "ends in its first pass" in str(one.message)]
    assert len(said) == is_said
    if is_said:
        assert f"max_steps {trainer.state.max_steps}, and a pass has {trainer.state.max_steps}" in said[0]
        assert "Name a difficulty_column, set rollout_allocation to 'pilot'" in said[0]


def test_evaluation_data_are_checked_too(tmp_path):
    config = make_config(tmp_path, per_device_train_batch_size=64)
    with pytest.raises(ValueError, match="'vowel_reward' needs a column 'threshold'"):
        E3GRPOTrainer(
            NO_MODEL, [length_reward, vowel_reward], config, make_dataset(),
            eval_dataset={"hard": make_dataset().remove_columns("threshold")},
        )  # fmt: skip


def test_an_unknown_starting_difficulty_is_null(make_trainer):
    dataset = Dataset.from_dict(make_dataset().to_dict() | {"level": [None, 0.0, 1.0] + [None] * 13})
    trainer = make_trainer(train_dataset=dataset, difficulty_column="level")
    assert trainer.difficulty_tracker.difficulty[1] < trainer.difficulty_tracker.difficulty[2]


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"reward_funcs": ["a/reward-model"]}])
def test_a_model_that_one_process_alone_would_load_is_refused(make_trainer, monkeypatch, settings):
    """On two ranks the KL term of the first step was 1.6. FSDP with this setting takes several processes and a GPU."""
    monkeypatch.setattr(checks, "is_fsdp_enabled", lambda: True)
    make_trainer()
    with pytest.raises(ValueError, match="is true, and of the re.* model .* the first process alone would get"):
        make_trainer(**settings)


def test_a_row_without_a_prompt_is_named_before_a_model_is_loaded(make_trainer):
    prompts = ["say a:"] * 1500
    prompts[1207] = None
    dataset = Dataset.from_dict({"prompt": prompts, "threshold": [1] * 1500})
    with pytest.raises(ValueError, match="The dataset's row 1207 has no prompt. Fill it in, or drop the row."):
        make_trainer(model="no/such/model", train_dataset=dataset)
    with pytest.raises(ValueError, match="row 7 has no prompt"):
        make_trainer(model="no/such/model", train_dataset=dataset.select(range(1200, 1300)))
    make_trainer(train_dataset=dataset.filter(lambda row: row["prompt"] is not None))


def test_where_vllm_is_not_installed_trl_says_where_to_get_it(monkeypatch):
    """Neither an adapter nor a base in 4 bits is in the way of its message."""
    monkeypatch.delattr(vllm_generation, "LLM", raising=False)
    with engine_for_adapter(8):
        assert not hasattr(vllm_generation, "LLM")
    # Of a package that is not there, parts cannot be asked for.
    monkeypatch.setattr(checks, "find_spec", {"vllm": None, "vllm_bnb_plugin": None}.__getitem__)
    args = SimpleNamespace(use_vllm=True, vllm_mode="colocate", vllm_lora_sync=True)
    checks.check_quantized_base(args, SimpleNamespace(load_in_4bit=True))
