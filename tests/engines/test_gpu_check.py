"""`make gpu-check` in miniature: every part runs before there is a GPU."""

import json
import os
import random
import time
from functools import cache, partial
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from trl.generation import vllm_generation

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import engine, learning, memory, optimizer, sharding, step
from benchmarks.gpu.report import Case, Number
from e3_trl.grpo.vllm import RolloutGeneration
from recipes.quickstart.task import RuleTask


pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the miniature is for a CPU; here is a GPU to check"),
]


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts have the same tiny model, so that they can have the same engine."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def start_once():
    """One engine for all parts; a process's first one takes longer than all that is done with it."""
    pytest.importorskip("vllm", reason="vLLM is not installed: `make install` brings it")
    return partial(step.one_engine, cache(vllm_generation.LLM))


@pytest.fixture
def one_engine(monkeypatch, start_once):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(vllm_generation, "LLM", start_once)


def measured(module, folder, name="all", **settings) -> dict[str, Number]:
    """The numbers of a case in this process, by their words."""
    case = Case(name, str(folder), miniature=True, **settings)
    module.measure(case)
    return {number.what: number for number in case.numbers}


def test_engine(folder, one_engine):
    numbers = measured(engine, folder, "no sleep")
    assert all(number.is_held for number in numbers.values())
    assert numbers["log-prob difference, no sleep: after 20 updates"].at_most == 0.03
    assert numbers["temperature, no sleep: at the end"].value == 2


def test_an_engine_with_old_weights_breaks_the_limits(folder, one_engine, monkeypatch):
    """The updates are large enough for it to show."""
    monkeypatch.setattr(RolloutGeneration, "sync_weights", lambda self: None)
    monkeypatch.setattr(engine, "UPDATES", 10)
    numbers = measured(engine, folder, "no sleep")
    assert not numbers["log-prob difference, no sleep: after 10 updates"].is_held
    assert not numbers["importance ratio, no sleep: at worst"].is_held


def test_step(folder, one_engine):
    numbers = measured(step, folder)
    for name in ("stock", "FastGRPOTrainer"):
        whole, *phases = (numbers[f"{name}: {phase}"].value for phase in ("step", *step.PHASES))
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(whole, rel=0.2), "medians of each"
    assert PartialState().distributed_type == DistributedType.NO, "DistributedDataParallel for the second alone"


def test_the_step_of_stock_asks_for_each_row(folder, one_engine, monkeypatch):
    """The two share an engine, in front of which FastGRPOTrainer has a function of its own."""
    calls, merge = [], RolloutGeneration._generate_merged
    monkeypatch.setattr(
        RolloutGeneration,
        "_generate_merged",
        lambda self, *args, **kwargs: calls.append(1) or merge(self, *args, **kwargs),
    )
    measured(step, folder)
    assert len(calls) == 2, "one of each turn"


def test_memory(folder, one_engine):
    numbers = measured(memory, folder)
    for phase in ("sampling", "training", "evaluation"):
        assert numbers[f"config_e3_lora_24gb, {phase}"].value > 0
    assert sum("of e3-trl memory" in what for what in numbers) == 4


def test_learning(folder, one_engine):
    """On a model that knows nothing, with the problems of the quickstart."""
    data = folder / "data"
    data.mkdir()
    rows = RuleTask(0).problems(1, random.Random(0))
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = engine.save_model(Case("", str(folder), miniature=True), "tiny")
    numbers = measured(learning, folder, model=model, data=str(data), reward="benchmarks.gpu.engine.odd_reward")
    for name in ("GRPO", "E3"):
        assert 0 < numbers[f"held-out pass@1 after, {name}"].value <= numbers[f"held-out pass@8 after, {name}"].value
        assert numbers[f"importance ratio, {name}: at worst"].is_held


def test_optimizer(folder):
    numbers = measured(optimizer, folder)
    assert numbers["gradient: that of rows from stock's"].is_held
    assert numbers["gradient: that of tokens from stock's"].is_held
    ratios = [number.value for what, number in numbers.items() if what.startswith("time of")]
    assert len(ratios) == 2
    assert max(ratios) < 1.3, "mostly 0.6 to 0.9"


@pytest.fixture(scope="module")
def unsharded(folder):
    measured(sharding, folder, "none")


def assert_sharding_changes_nothing(folder, name):
    numbers = [Number(**entry) for entry in json.loads((folder / f"{name}.numbers.json").read_text())]
    assert len(numbers) == 5
    assert all(number.is_held for number in numbers)


def test_sharding(folder, unsharded, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make install` brings it")
    log = tmp_path / "log"
    case = Case("zero3", str(folder), miniature=True)
    assert gpu_check.run_case("benchmarks.gpu.sharding", case, 300, log) is None, log.read_text()[-4000:]
    assert_sharding_changes_nothing(folder, "zero3")


def test_sharding_of_fsdp2(folder, unsharded, forks):
    launch = partial(forks.launch, [*gpu_check.LAUNCHERS["fsdp2"][2:], "case"])
    case = json.dumps({"name": "fsdp2", "folder": str(folder), "miniature": True})
    environment = os.environ | gpu_check.ENVIRONMENT | gpu_check.ON_A_CPU
    done = launch("-m", "benchmarks.gpu.case", "benchmarks.gpu.sharding", case, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_sharding_changes_nothing(folder, "fsdp2")


FAKE = """
import os, subprocess, sys, time

def measure(case):
    if case.name == "good":
        case.add("a number", 1.0, "s", at_most=1.0)
    elif case.name == "broken":
        case.add("a ratio", 1.5, at_least=0.9, at_most=1.1)
    elif case.name == "nan":
        case.add("a loss", float("nan"), at_most=1.0)
    elif case.name == "raises":
        case.add("before it", 2.0)
        raise ValueError("no such thing")
    elif case.name == "dies":
        os._exit(9)
    else:
        case.add("before it", 3.0)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        open(case.path("child"), "w").write(str(child.pid))
        time.sleep(600)
"""


def test_each_part_ends_with_a_reason_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake_part.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    parts = {name: gpu_check.Part((name,), (name,), 0, (), "fake_part") for name in ("hangs", "raises", "dies")}
    parts["small"] = gpu_check.Part((), (), 0, ("no_such_package",))
    for name, cases in {"broken": ("broken",), "nan": ("nan",), "good": ("good", "good")}.items():
        parts[name] = gpu_check.Part(cases, cases, 0, (), "fake_part")
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "SLOWER", 1)
    output = tmp_path / "results" / "gpu.json"
    arguments = ["--miniature", "--folder", str(tmp_path / "work"), "--output", str(output), "--seconds"]

    assert gpu_check.main([*arguments, "8", "--parts", *parts]) == 1
    results = json.loads(output.read_text())["parts"]
    statuses = dict.fromkeys(parts, "failed") | {"small": "skipped", "good": "passed"}
    assert {name: part["status"] for name, part in results.items()} == statuses
    reasons = {name: " ".join(part["reasons"]) for name, part in results.items()}
    assert reasons["hangs"] == "hangs: stopped, its part had 8 s"
    assert results["hangs"]["numbers"][0]["value"] == 3, "what there was by then"
    assert reasons["raises"].startswith("raises: ValueError: no such thing (all of it: ")
    assert results["raises"]["numbers"][0]["value"] == 2
    assert "exit status 9" in reasons["dies"]
    assert reasons["small"] == "no_such_package not installed"
    assert reasons["broken"] == "a ratio is 1.5, limit: at least 0.9, at most 1.1"
    assert reasons["nan"] == "a loss is nan, limit: at most 1"
    assert len(results["good"]["numbers"]) == 2
    assert "a ratio is 1.5, limit: at least 0.9, at most 1.1" in capsys.readouterr().out
    child = int((tmp_path / "work" / "child").read_text())
    time.sleep(0.1)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE

    assert gpu_check.main([*arguments, "60", "--parts", "good"]) == 0


def test_a_gpu_too_small_for_a_part_is_named():
    for name, part in gpu_check.PARTS.items():
        reason = gpu_check.cannot_run(part, 3.0)
        assert reason == f"{part.gib} GiB needed, the GPU has 3" or "not installed" in reason, name
        assert gpu_check.cannot_run(part, 79.1) in (None, "vllm not installed", "deepspeed not installed")


def test_without_a_gpu_it_is_one_message(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main([])
    assert end.value.code == 2
    assert "no GPU is seen" in capsys.readouterr().err
