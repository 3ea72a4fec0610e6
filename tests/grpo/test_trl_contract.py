"""
What e3_trl hooks in TRL, transformers and accelerate. None of them promises to keep it, so an upgrade has to fail
here, by name, and not in a training run.
"""

import ast
import configparser
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import trainer as transformers_trainer
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer, utils

import e3_trl
from e3_trl import E3GRPOTrainer, FastGRPOConfig, FastGRPOTrainer
from e3_trl.grpo import trl_names
from e3_trl.runs import run_folder


PACKAGE = Path(e3_trl.__file__).parent
# `make compat-oldest` looks at everything else.
trains = pytest.mark.skipif(
    Version(version("trl")) < Version("1.16"), reason="TRL 1.15 computes log-probs on a GPU alone, and tests use a CPU"
)


def test_version_is_the_tested_one():
    """Of every package, however it was installed: `make compat` is on the ends of what setup.cfg allows."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    for line in setup["options"]["install_requires"].split("\n")[1:]:
        requirement = Requirement(line)
        installed = version(requirement.name)
        assert installed in requirement.specifier, (
            f"{requirement.name} is {installed}. Run the whole suite with it, then widen setup.cfg."
        )


@pytest.mark.parametrize(
    "name", ["PREFIX_CHECKPOINT_DIR", "SAFE_WEIGHTS_INDEX_NAME", "SAFE_WEIGHTS_NAME", "TRAINER_STATE_NAME"]
)
def test_a_checkpoints_files_have_the_names_that_are_read(name):
    assert getattr(run_folder, name) == getattr(transformers_trainer, name)


def named(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        (f"{owner}.{name}", ("self", *parameters))
        for owner, methods in trl_names.METHODS.items()
        for name, parameters in methods.items()
    ]
    + list(trl_names.FUNCTIONS.items()),
)
def test_signature(path, parameters):
    owner, _, name = path.rpartition(".")
    function = getattr(named(owner), name) if owner in trl_names.METHODS else named(path)
    found = tuple(inspect.signature(function).parameters)
    if parameters[-1] == "kwargs":  # whatever else another version takes is handed on
        assert found[-1] == "kwargs"
        found = (*found[: len(parameters) - 1], "kwargs")
    assert found == parameters


@pytest.mark.parametrize("trainer_class", [FastGRPOTrainer, E3GRPOTrainer])
def test_the_first_arguments_keep_their_places(trainer_class):
    """They may be passed by position."""
    mine = list(inspect.signature(trainer_class.__init__).parameters)[:-1]
    assert list(inspect.signature(GRPOTrainer.__init__).parameters)[: len(mine)] == mine


def test_the_fused_head_reads_the_temperature_from_its_closure():
    code = next(
        constant
        for constant in utils.add_fused_lm_head.__code__.co_consts
        if getattr(constant, "co_name", "") == "_fused_forward"
    )
    assert "temperature" in code.co_freevars


def overrides(trainer_class) -> dict:
    """Methods of TRL's, and its attributes that are properties here."""
    names = {**dict.fromkeys(dir(GRPOTrainer)), **trl_names.ATTRIBUTES, "temperature": None}
    kinds = (inspect.isfunction, inspect.isdatadescriptor)
    members = vars(trainer_class).items()
    return {n: member for n, member in members if n in names and any(is_kind(member) for is_kind in kinds)}


@pytest.mark.parametrize("trainer_class", [FastGRPOTrainer, E3GRPOTrainer])
def test_every_override_calls_super_and_stands_in_the_docstring_and_among_the_names(trainer_class):
    assert len(overrides(trainer_class)) >= 6
    for name, member in overrides(trainer_class).items():
        if name.startswith("__") and name != "__init__":
            continue
        assert f"`{name}`" in trainer_class.__doc__, name
        if inspect.isfunction(member):
            assert f"super().{name}" in inspect.getsource(member), name
            assert name == "__init__" or name in trl_names.METHODS["trl.GRPOTrainer"], name
    assert set(overrides(E3GRPOTrainer)) <= {
        "__init__", "_get_train_sampler", "_get_dataloader", "_generate_and_score_completions", "_generate",
        "_generate_single_turn", "_calculate_rewards",
    }, "E3 hooks no more than its pipeline needs"  # fmt: skip


def test_every_private_name_that_is_used_is_the_packages_own_or_among_the_names():
    known = {*trl_names.ATTRIBUTES, *trl_names.MODEL_ATTRIBUTES, *trl_names.GENERATION_ATTRIBUTES, "_exit"}
    known |= {name for methods in trl_names.METHODS.values() for name in methods}
    used, own = {}, set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(attr=name, ctx=context) if name.startswith("_") and not name.startswith("__"):
                    used.setdefault(name, path.name)
                    if isinstance(context, ast.Store) and name not in known:
                        own.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    own.add(name)
    assert len(used) > 50
    assert {name: place for name, place in used.items() if name not in own | known} == {}


def test_grpo_knows_nothing_of_e3_and_no_arrow_runs_back_up():
    """What each folder may import, from the bottom to the top."""
    below = {
        "method": {"method", "dotted_path"},
        "runs": {"runs", "method", "scrub"},
        "grpo": {"grpo", "runs", "rewards.columns", "evaluation.metrics", "scrub"},
        "batch": {"batch", "grpo", "method"},
    }
    for folder, allowed in below.items():
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = [folder] if node.level == 1 else []
                    modules = [".".join([*base, *(node.module or "").split(".")])] if node.module else []
                    modules = modules or [".".join([*base, name.name]) for name in node.names]
                    for module in modules:
                        parts = module.strip(".").split(".")
                        assert {parts[0], ".".join(parts[:2])} & allowed, f"{folder}/{path.name} imports {module}"


def test_attributes_of_generation():
    source = inspect.getsource(vllm_generation.VLLMGeneration)
    for name in trl_names.GENERATION_ATTRIBUTES:
        assert f"self.{name} = " in source, name
    assert "self._dist.gather_params(" in source
    assert "self.llm = LLM(" in source, "the name that the engine is started by"
    assert "in self._iter_named_params():" in source, "what a sync sends"


@trains
def test_attributes(make_trainer):
    trainer = make_trainer(FastGRPOTrainer, max_steps=1)
    assert "self._last_loaded_step" in inspect.getsource(GRPOTrainer), "with vLLM alone"
    for name in trl_names.ATTRIBUTES.keys() - {"_last_loaded_step"}:
        assert hasattr(trainer, name), name
    trainer.train()
    assert trainer._step == 1
    assert isinstance(trainer._buffered_inputs, list)
    assert set(trainer._buffered_inputs[0]) >= {"advantages", "completion_mask", "completion_ids", "prompt_ids"}
    assert trainer._logs["advantages"].maxlen == 16, "the right advantages push TRL's out"


@trains
def test_rewards_come_gathered_one_column_per_function(make_trainer):
    trainer = make_trainer(max_steps=1)
    shapes, calculate = [], trainer._calculate_rewards

    def spy(*args):
        shapes.append(calculate(*args).shape)
        return calculate(*args)

    trainer._calculate_rewards = spy
    trainer.train()
    assert shapes == [(16, 1)]


@trains
def test_metrics_of_the_batch_are_the_last_entries(make_trainer):
    trainer = make_trainer(max_steps=3, logging_steps=3)
    trainer._metrics["train"].clear()
    seen = []
    compute_loss = trainer._compute_loss

    def spy(model, inputs):
        loss = compute_loss(model, inputs)
        metrics = trainer._metrics["train"]
        seen.append((len(metrics["entropy"]), len(metrics["frac_reward_zero_std"])))
        return loss

    trainer._compute_loss = spy
    trainer.train()
    assert seen == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    "setting",
    ["loss_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation", "vllm_mode"]
    + ["vllm_importance_sampling_mode"],
)
def test_every_word_that_trl_takes_is_taken(setting):
    source = inspect.getsource(grpo_trainer) + inspect.getsource(vllm_generation)
    of_vllm = r"|self\.mode" if setting == "vllm_mode" else ""
    uses = re.findall(rf"(?:(?:self|args)\.{setting}{of_vllm}) (?:==|!=|in) (\[.*?\]|\".*?\")", source)
    words = {word for use in uses for word in re.findall(r'"(\w+)"', use)}
    assert len(words) > 1
    (is_right,) = [is_right for name, is_right, _ in FastGRPOConfig._settings if name == setting]
    assert {word for word in words if not is_right(word)} == set()


@trains
def test_trl_buffers_a_generation_batch_once_and_trains_on_what_it_reads_back(make_trainer):
    """Its rows are planned when they are buffered, and no other place of TRL's keeps them."""
    buffered, trained = [], []

    class Spied(FastGRPOTrainer):
        @property
        def _buffered_inputs(self):
            return FastGRPOTrainer._buffered_inputs.fget(self)

        @_buffered_inputs.setter
        def _buffered_inputs(self, batches):
            FastGRPOTrainer._buffered_inputs.fset(self, batches)
            buffered.append(self._buffered_inputs)

        def _compute_loss(self, model, inputs):
            trained.append(inputs)
            return super()._compute_loss(model, inputs)

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    make_trainer(Spied, max_steps=2, **settings).train()
    batches = [batches for batches in buffered if batches is not None]
    assert len(batches) == 2
    assert [id(batch) for batch in trained] == [id(batch) for window in batches for batch in window]


@trains
def test_the_loss_asks_for_log_probs_once_and_takes_what_it_gets(make_trainer):
    """So the forward pass can be made before it. With others' log-probs the loss is another one."""
    asked = []

    class Spied(FastGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            if self.logps_answer is None:
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            asked.append((args, kwargs))
            logps, *rest = self.logps_answer(*args, **kwargs)
            return logps * 0, *rest

    trainer = make_trainer(Spied, max_steps=1, micro_batching="none", beta=0.1)
    trainer.train()
    assert len(asked) == 1
    assert trainer.state.log_history[0]["grad_norm"] == 0
    assert torch.is_tensor(asked[0][0][1])
