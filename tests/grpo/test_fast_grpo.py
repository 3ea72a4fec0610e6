"""FastGRPOTrainer alone: TRL's GRPOTrainer with another class name. Gradients are in test_micro_batches.py."""

import copy
import pickle
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import logged, make_dataset, vowel_reward
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from e3_trl import E3GRPOConfig, E3GRPOTrainer, FastGRPOConfig, FastGRPOTrainer, read_rollouts
from e3_trl.grpo.reward_errors import RewardError
from e3_trl.runs.figures import CURVES, Run


def test_the_defaults_are_trls(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    mine, trls = FastGRPOConfig(**settings), GRPOConfig(**settings)
    own = {field.name for field in fields(FastGRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    assert own == {"micro_batching", "max_tokens_per_micro_batch", "eval_temperature", "vllm_lora_sync"}
    for field in fields(GRPOConfig):
        if field.name not in ("logging_dir", "deepspeed_plugin"):
            assert str(getattr(mine, field.name)) == str(getattr(trls, field.name)), field.name


def test_it_has_nothing_of_e3(make_trainer):
    seen = set()

    class Spied(FastGRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            if isinstance(generation_batch, list):
                seen.update(name for row in generation_batch for name in row)
            return super()._prepare_inputs(generation_batch)

    trainer = make_trainer(Spied, max_steps=5)
    trainer.train()
    assert seen == {"prompt", "threshold"}
    assert not Path(trainer.args.output_dir, "rollouts.jsonl").exists()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert not [name for name in names if name.startswith(("rollouts/", "target_"))]
    assert trainer._name == "GRPO"


@pytest.mark.parametrize("data", ["dataset", "stream"])
@pytest.mark.slow
def test_prompts_come_in_trls_order_pass_for_pass(make_trainer, data):
    seen = {GRPOTrainer: [], FastGRPOTrainer: []}

    def order(trainer_class):
        def reward(prompts, completions, **kwargs):
            seen[trainer_class].append(list(prompts))
            return [float(len(completion)) for completion in completions]

        dataset = make_dataset() if data == "dataset" else make_dataset().to_iterable_dataset()
        make_trainer(trainer_class, reward_funcs=reward, train_dataset=dataset, max_steps=9).train()
        return seen[trainer_class]

    assert order(FastGRPOTrainer) == order(GRPOTrainer)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.1, "num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        # inside a generation window that spans several optimizer steps
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_run_goes_on_number_for_number(make_trainer, settings):
    """In its second pass, of whose order TRL's sampler knows nothing after a resume."""
    settings |= {"save_strategy": "steps", "save_steps": 7, "max_steps": 12}
    whole = make_trainer(FastGRPOTrainer, output_dir="whole", **settings)
    whole.train()
    resumed = make_trainer(FastGRPOTrainer, output_dir="resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-7")
    for name in ("loss", "reward", "entropy", "grad_norm", "completions/mean_length"):
        assert logged(resumed, name) == logged(whole, name), name
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_reward_function_that_raises_costs_nothing(make_trainer):
    def reward(completions, threshold, trainer_state, **kwargs):
        if trainer_state.global_step == 3:
            raise KeyError("no such answer")
        return vowel_reward(completions, threshold)

    trainer = make_trainer(FastGRPOTrainer, reward_funcs=reward, max_steps=6)
    with pytest.raises(RewardError, match="'reward' raised KeyError.*it goes on after step 3, which is saved"):
        trainer.train()
    trainer = make_trainer(FastGRPOTrainer, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_an_evaluation_has_its_temperature_and_pass_at_k(make_trainer):
    settings = {"eval_dataset": make_dataset(5), "per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer = make_trainer(FastGRPOTrainer, eval_temperature=0.7, **settings)
    trainer.temperature = 1.4
    metrics = trainer.evaluate()
    assert logged(trainer, "eval_temperature") == [0.7]
    assert trainer.temperature == 1.4
    assert 0 <= metrics["eval_pass@1"] <= metrics["eval_pass@2"] <= 1
    assert trainer.evaluation is None


def test_each_evaluation_set_has_metrics_of_its_own(make_trainer):
    """They had one name, and the last set's stayed: for the best model and the figures too."""

    def reward(prompts, completions, is_easy, **kwargs):
        return [float(easy) for easy in is_easy]

    sets = {name: make_dataset(4).add_column("is_easy", [name == "easy"] * 4) for name in ("easy", "hard")}
    trainer = make_trainer(
        FastGRPOTrainer,
        reward_funcs=reward,
        train_dataset=make_dataset().add_column("is_easy", [True] * 16),
        eval_dataset=sets,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_easy_pass@1",
        max_steps=2,
        logging_steps=2,
    )
    trainer.train()
    for name, value in {"easy": 1.0, "hard": 0.0}.items():
        for metric in ("pass@1", "pass@2", "reward", "rewards/reward/mean"):
            assert logged(trainer, f"eval_{name}_{metric}") == [value] * 2, metric
        assert len(logged(trainer, f"eval_{name}_loss")) == 2
    assert trainer.state.best_metric == 1.0
    assert not {name for entry in trainer.state.log_history for name in entry} & {"eval_pass@1", "eval_reward"}
    assert logged(trainer, "reward") == [1.0]
    trainer.save_state()
    assert list(Run.read(trainer.args.output_dir).curve(CURVES["validation"][0][0]).values()) == [1.0, 1.0]


def generate_batch(model, prompt_ids, generation_config, **kwargs) -> dict:
    """In the place of transformers' continuous batching, which takes minutes on a CPU: the same answer."""
    tokens = [model.generate(torch.tensor([ids]), generation_config)[0, len(ids) :] for ids in prompt_ids]
    return {row: SimpleNamespace(generated_tokens=ids.tolist()) for row, ids in enumerate(tokens)}


@pytest.mark.parametrize("trainer_class", [FastGRPOTrainer, E3GRPOTrainer])
@pytest.mark.slow
def test_an_evaluation_with_continuous_batching_is_no_training(make_trainer, trainer_class):
    """TRL sets the model to training after each call, and then took the further batches of an evaluation for it."""
    sampled = []

    def reward(prompts, completions, trainer_state, **kwargs):
        sampled.append((trainer.evaluation is None, trainer.model.training, len(prompts)))
        return [float(len(text)) for text in completions]

    trainer = make_trainer(
        trainer_class,
        reward_funcs=reward,
        use_transformers_continuous_batching=True,
        max_steps=2,
        eval_dataset=make_dataset(6),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
    )
    trainer.model.generate_batch = partial(generate_batch, trainer.model)
    trainer.train()
    assert sampled == [(True, True, 16), *[(False, False, 4)] * 3] * 2
    assert trainer.num_generation_batches == 2
    lengths = {name: logged(trainer, name) for name in ("completions/mean_length", "eval_completions/mean_length")}
    assert [len(values) for values in lengths.values()] == [2, 2]
    if trainer_class is E3GRPOTrainer:
        rows = read_rollouts(trainer.args.output_dir)
        assert sum(row["rollouts"] for row in rows) == trainer.difficulty_tracker.num_rollouts.sum() == 32


@pytest.mark.parametrize("bf16", [False, True])
def test_continuous_batching_leaves_the_policy_as_it_was(make_trainer, bf16):
    """For it TRL casts the policy to bfloat16, and trained what was rounded from then on."""
    trainer = make_trainer(
        FastGRPOTrainer, use_transformers_continuous_batching=True, bf16=bf16, max_steps=2, learning_rate=0.0
    )
    types = set()

    def generate(*args, **kwargs):
        types.update(tensor.dtype for tensor in trainer.model.state_dict().values())
        return generate_batch(trainer.model, *args, **kwargs)

    trainer.model.generate_batch = generate
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    before |= {name: value.clone() for name, value in trainer.model.named_buffers()}
    trainer.train()
    assert types == {torch.bfloat16 if bf16 else torch.float32}
    after = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
    assert any("inv_freq" in name for name in after)
    for name, value in after.items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="`make install` brings bitsandbytes")
def test_an_adapter_beside_a_base_in_4_bits_keeps_the_values_that_it_brings(make_trainer, model_path):
    """TRL rounds them to bfloat16. A module that is trained as a whole has the type of the base's computations."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16, quantization_config=four)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, modules_to_save=["lm_head"]))
    adapter = {name: value for name, value in model.named_parameters() if "lora_" in name}
    before = {name: value.data.normal_(std=0.1).clone() for name, value in adapter.items()}
    trainer = make_trainer(FastGRPOTrainer, model=model, max_steps=1, learning_rate=0.0, beta=0.1)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trained = {name: value.dtype for name, value in after.items() if value.requires_grad}
    assert trained == {name: torch.float32 if "lora_" in name else torch.bfloat16 for name in trained}
    assert len(trained) == len(before) + 1
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6), "the reference has what the policy began with"


def test_log_probs_are_those_of_the_temperature_that_is_set(make_trainer):
    """TRL bakes the one that it begins with into the LM head."""
    trainer = make_trainer(FastGRPOTrainer, max_steps=1, learning_rate=0.0)
    trainer.temperature = 0.5
    trainer.train()
    entropies, total = 0.0, 0
    for rows in trainer._buffered_inputs:
        for part in (rows, rows.get("left_out", {})):
            if "completion_ids" in part:
                ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
                mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
                width = part["completion_ids"].size(1)
                with torch.no_grad():
                    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
                logps = (logits / 0.5).log_softmax(-1)
                entropy = -(logps.exp() * logps).sum(-1)
                entropies += (entropy * part["completion_mask"]).sum().item()
                total += part["completion_mask"].sum().item()
    assert logged(trainer, "entropy") == pytest.approx([entropies / total], rel=1e-4)


def test_another_config_is_refused_by_name(make_trainer, tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is a GRPOConfig. Use FastGRPOConfig"):
        FastGRPOTrainer("no/such/model", vowel_reward, config, make_dataset())


def test_e3s_config_trains_without_e3(make_trainer):
    """A recipe's settings of E3 are then without effect, so the command refuses them."""
    trainer = make_trainer(FastGRPOTrainer, E3GRPOConfig, max_steps=2)
    trainer.train()
    assert trainer.temperature == 1.0


def test_a_prediction_leaves_nothing_to_the_next_evaluation(make_trainer):
    """Its pass@1 was averaged into that of the evaluation."""

    def right_for_the_first(prompts, completions, **kwargs):
        return [float(prompt.startswith("say a")) for prompt in prompts]

    data = make_dataset(4)
    trainer = make_trainer(FastGRPOTrainer, reward_funcs=right_for_the_first, eval_dataset=data.select([1, 2, 3]))
    trainer.predict(data.select([0]))
    assert trainer.evaluate()["eval_pass@1"] == 0.0


def test_a_copy_of_the_arguments_keeps_its_tokens_and_the_file_has_none(make_trainer):
    """`copy.deepcopy(args)` lost them: it asks for what is pickled, from which they are removed."""
    args = make_trainer(FastGRPOTrainer, hub_token="t", model_init_kwargs={"token": "t"}).args
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert (copied.hub_token, copied.model_init_kwargs) == ("t", {"token": "t"})
        assert (type(copied), copied) == (type(args), args)
    assert copy.deepcopy(args).model_init_kwargs is not args.model_init_kwargs
    pickled = pickle.loads(pickle.dumps(args))
    assert (pickled.hub_token, pickled.model_init_kwargs) == (None, {})


@pytest.mark.parametrize("trainer_class", [FastGRPOTrainer, E3GRPOTrainer])
def test_what_is_no_dataset_is_refused_in_trls_words(make_trainer, trainer_class):
    with pytest.raises(TypeError, match="train_dataset"):
        make_trainer(trainer_class, train_dataset=DatasetDict(train=make_dataset()))


def test_completions_may_be_asked_for_outside_of_a_batch(make_trainer):
    trainer = make_trainer(E3GRPOTrainer)
    prompt_ids, completion_ids, *_ = trainer._generate(["say a0:"] * 16)
    assert len(prompt_ids) == len(completion_ids) == 16
