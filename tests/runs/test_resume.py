"""A run that is killed and resumed goes on number for number."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import build_trainer, length_reward, logged, make_dataset, vowel_reward
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from e3_trl import FastGRPOTrainer, TemperatureCallback, TemperatureSchedule
from e3_trl.grpo.reward_errors import RewardError
from e3_trl.runs import lock
from e3_trl.runs.checkpoint import load_state, save_state
from e3_trl.runs.report import read_log
from e3_trl.runs.run_folder import complete_checkpoints, run_id
from e3_trl.runs.termination import TerminationCallback


MEASURED_TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
WINDOW = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def kill(model_path, forks):
    """Train in another process, which dies by SIGKILL."""

    def train(output_dir, **settings):
        settings = {"model_path": model_path, "output_dir": str(output_dir)} | settings
        done = forks.run("killed_run.py", json.dumps(settings), cwd=Path(__file__).parents[1])
        assert done.returncode == -signal.SIGKILL, done.stderr

    return train


def assert_same_run(resumed, whole):
    histories = [
        [{key: value for key, value in entry.items() if key not in MEASURED_TIMES} for entry in run.state.log_history]
        for run in (resumed, whole)
    ]
    # The last entry is the summary, whose mean loss counts only the steps since the checkpoint.
    assert histories[0][:-1] == histories[1][:-1]
    assert len(logged(resumed, "temperature")) == whole.state.max_steps
    rollouts = [(Path(run.args.output_dir) / "rollouts.jsonl").read_text() for run in (resumed, whole)]
    assert rollouts[0] == rollouts[1]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "settings"),
    [
        (3, {}),  # in the first pass
        (5, {}),  # right after a pass, from the checkpoint at its end: ranks are made anew
        (11, {}),  # in a later pass
        (7, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}),
        # a rule by success rate, with older rollouts counting less: in force is what was counted when the pass began
        (7, {"rollout_allocation": "knapsack", "success_decay": 0.5, "success_prior": 1.0}),
        (8, {"success_decay": 0.5, "temperature_spread": 0.5}),  # a temperature for each
        (8, {**WINDOW, "rollout_allocation": "pilot", "temperature_spread": 0.5, "max_steps": 24, "save_steps": 7}),
        (8, {**WINDOW, "rollout_allocation": "vigor", "max_steps": 24, "save_steps": 7}),
        (8, {"reuse_rollouts": True, "temperature_spread": 0.5, "learning_rate": 3e-3}),
        (11, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 4}),
        # inside a generation window that spans several optimizer steps
        (8, {**WINDOW, "max_steps": 24, "save_steps": 7}),
        (20, {**WINDOW, "max_steps": 26, "save_steps": 6}),
        (14, {"num_iterations": 3, "save_steps": 13, "max_steps": 24, "beta": 0.1}),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_number_for_number(make_trainer, kill, tmp_path, kill_at, settings):
    settings = {"save_strategy": "steps", "save_steps": 2, **settings}
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    kill(tmp_path / "killed", kill_at=kill_at, **settings)
    resumed = make_trainer(output_dir="killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    first = kill_at - (kill_at - 1) % settings["save_steps"]
    assert resumed.state.log_history[first - 1]["step"] == first
    assert len({row["temperature"] for row in rows(whole)}) > 2
    assert_same_run(resumed, whole)


def rows(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "rollouts.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6], ids=["at the end of a pass", "inside one"])
def test_a_run_with_persistent_workers_goes_on_number_for_number(make_trainer, step):
    """Its workers begin once in a run, with a draw of the random state that the run without a break does not make."""
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "save_strategy": "steps"}
    whole = make_trainer(output_dir="whole", save_steps=2, **settings)
    whole.train()
    resumed = make_trainer(output_dir="whole", save_steps=20, **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    for name in ("loss", "entropy", "temperature", "reward"):
        assert logged(resumed, name) == logged(whole, name)


@pytest.mark.slow
def test_a_checkpoint_that_was_not_finished_is_passed_over(make_trainer, kill, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    kill(tmp_path / "killed", kill_at=6, while_saving=True, **settings)
    assert (tmp_path / "killed" / "checkpoint-6" / "run_state.json").exists()
    resumed = make_trainer(output_dir="killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


@pytest.fixture(scope="module")
def trained(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    build_trainer(model_path, folder, save_strategy="steps", save_steps=6, max_steps=6).train()
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    """Of a run in the folder that the test's own trainers write to."""
    return Path(shutil.copytree(trained, tmp_path / "run")) / "checkpoint-6"


def test_state_is_json_and_safetensors(checkpoint):
    state = json.loads((checkpoint / "run_state.json").read_text())["state"]
    parts = state["parts"]
    assert parts["passes"] == {"pass": 1, "position": 2, "num_generations_min": 2, "num_generations_max": 6}
    assert state["dataset"]["num_prompts"] == 16
    assert parts["temperature_schedule"]["schedule"]["step_count"] == 6
    assert parts["temperature_schedule"]["schedule"]["initial_entropy"] > 0
    arrays = load_file(checkpoint / "run_state.safetensors")
    assert arrays[parts["difficulty"]["num_rollouts"]["array"]].sum() == 6 * 16


def test_the_ranks_in_force_are_restored_not_made_anew(make_trainer, checkpoint):
    """Two steps into a pass the counts have moved on, the ranks have not."""
    saved = load_state(checkpoint / "run_state.json")["parts"]["difficulty"]
    trainer = make_trainer(max_steps=7)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    tracker = trainer.difficulty_tracker
    assert tracker.difficulty.tolist() == saved["difficulty"].tolist()
    tracker.update()
    assert tracker.difficulty.tolist() != saved["difficulty"].tolist()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (make_dataset(20), "num_prompts is 16, this run's 20"),
        (make_dataset().select(range(15, -1, -1)), "fingerprint"),
    ],
    ids=["length", "order"],
)
def test_another_dataset_is_refused(make_trainer, checkpoint, dataset, message):
    trainer = make_trainer(train_dataset=dataset)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def change_a_number(path):
    path.write_text(path.read_text().replace('"step_count": 6', '"step_count": 7'))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run_state.json", cut),
        ("run_state.json", change_a_number),
        ("run_state.json", lambda path: path.write_text("[]")),
        ("run_state.json", os.remove),
        ("run_state.safetensors", cut),
        ("run_state.safetensors", flip_a_bit),
        ("run_state.safetensors", os.remove),
    ],
)
def test_a_damaged_file_is_named(make_trainer, checkpoint, name, damage):
    damage(checkpoint / name)
    log = checkpoint.parent / "rollouts.jsonl"
    log.write_text(log.read_text() + json.dumps(rollouts := {"step": 7}) + "\n")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        make_trainer().train(resume_from_checkpoint=str(checkpoint))
    assert json.loads(log.read_text().splitlines()[-1]) == rollouts, "what is refused loses nothing"


def test_a_state_comes_back_as_it_was(tmp_path):
    batch = {"advantages": torch.ones(3), "num_images": [1, 2], "nothing": None, "left_out": {"ids": torch.arange(2)}}
    path = tmp_path / "run_state_of_process_0.json"
    save_state(path, {"micro_batches": [batch, {}], "mean": 0.1})
    found = load_state(path, torch.device("cpu"))
    (first, second), left_out = found["micro_batches"], found["micro_batches"][0].pop("left_out")
    assert first == {"advantages": pytest.approx(torch.ones(3)), "num_images": [1, 2], "nothing": None}
    assert (left_out["ids"].tolist(), second, found["mean"]) == ([0, 1], {}, 0.1)
    assert load_state(tmp_path / "run_state_of_process_1.json") is None
    for damage in (flip_a_bit, cut, os.remove):
        damage(path.with_suffix(".safetensors"))
        with pytest.raises(ValueError, match=r"run_state_of_process_0.safetensors is damaged"):
            load_state(path)


def test_a_checkpoint_without_a_runs_state_starts_with_a_warning(make_trainer, caplog):
    grpo = make_trainer(GRPOTrainer, GRPOConfig, save_strategy="steps", save_steps=6, max_steps=6)
    grpo.train()
    trainer = make_trainer(max_steps=9)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=f"{grpo.args.output_dir}/checkpoint-6")
    assert "holds no state of the run" in caplog.text
    assert trainer.state.global_step == 9
    assert trainer.temperature_schedule.step_count == 9, "annealing keeps the run's own count"
    assert trainer.passes.sampler.epoch == 2
    assert trainer.num_generation_batches == 9


@pytest.mark.slow
def test_a_stream_resumes_its_temperature_and_target(make_trainer):
    settings = {"train_dataset": make_dataset().to_iterable_dataset(), "rollout_allocation": "uniform"}
    settings |= {
        "save_strategy": "steps",
        "save_steps": 5,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
    }
    settings |= {"per_device_train_batch_size": 8, "max_steps": 10}
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    resumed = make_trainer(output_dir="resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5")
    assert whole.temperature_schedule.step_count == 10
    for name in ("loss", "reward", "temperature", "target_entropy"):
        assert logged(resumed, name) == logged(whole, name)


@pytest.mark.slow
def test_a_temperature_that_was_set_and_a_schedule_of_ones_own_are_restored(make_trainer):
    settings = {"temperature_schedule": "constant", "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(output_dir="whole", max_steps=6, **settings)
    whole.temperature = 0.7
    whole.train()
    resumed = make_trainer(output_dir="resumed", max_steps=7, **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert resumed.temperature == 0.7

    def with_own_schedule(**overrides):
        trainer = make_trainer(**settings | overrides)
        trainer.add_callback(TemperatureCallback(trainer, TemperatureSchedule(vocab_size=40)))
        return trainer

    whole = with_own_schedule(output_dir="own")
    whole.train()
    assert len(set(logged(whole, "temperature"))) > 6
    resumed = with_own_schedule(output_dir="own-resumed")
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert logged(resumed, "temperature") == logged(whole, "temperature")


def test_resuming_without_a_checkpoint_says_so(make_trainer):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


# --- whose checkpoints


def steps_of(folder) -> list[int]:
    return sorted(int(path.name.split("-")[-1]) for path in folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_new_run_in_the_same_folder_moves_what_was_there_aside(make_trainer):
    """Resuming once took the highest step, whosever it was; and `save_total_limit` deleted the new run's."""
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    old = make_trainer(max_steps=8, log_completions=True, num_completions_to_print=0, **settings)
    old.train()
    old.save_state()
    folder = Path(old.args.output_dir)
    (folder / "report.html").write_text("of the old run")
    rollouts = (folder / "rollouts.jsonl").read_text()
    new = make_trainer(max_steps=4, **settings)
    new.train()
    assert steps_of(folder) == [2, 4]
    assert steps_of(folder / "_earlier" / "1") == [6, 8]
    assert (folder / "_earlier" / "1" / "rollouts.jsonl").read_text() == rollouts
    assert (folder / "_earlier" / "1" / "trainer_state.json").exists()
    assert not (folder / "report.html").exists()
    assert list((folder / "completions").iterdir()) == [], "the page would show them as the new run's"
    assert len(list((folder / "_earlier" / "1" / "completions").iterdir())) == 8
    assert read_log(folder) == new.state.log_history[:4]
    resumed = make_trainer(max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[:4] == new.state.log_history[:4]
    assert run_id(folder) == run_id(folder / "checkpoint-6") == new.lifecycle.run_id != old.lifecycle.run_id
    make_trainer(max_steps=1).train()
    assert steps_of(folder / "_earlier" / "2") == [4, 6]


def test_a_new_run_without_a_checkpoint_cannot_be_mistaken_for_the_old(make_trainer):
    make_trainer(max_steps=4, save_strategy="steps", save_steps=2).train()
    make_trainer(max_steps=1).train()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_run_that_goes_back_leaves_its_later_steps_aside(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    run = make_trainer(max_steps=8, log_completions=True, num_completions_to_print=0, **settings)
    run.train()
    run.save_state()
    folder = Path(run.args.output_dir)
    resumed = make_trainer(max_steps=5, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert steps_of(folder) == [2, 4]
    assert steps_of(folder / "_earlier" / "1") == [6, 8]
    assert (folder / "_earlier" / "1" / "trainer_state.json").exists()
    logged = sorted(path.name for path in (folder / "completions").iterdir())
    assert logged == [f"completions_{step:05d}.parquet" for step in range(1, 5)]
    assert {row["step"] for row in rows(resumed)} == {1, 2, 3, 4, 5}


def test_half_a_log_stops_no_run(make_trainer):
    run = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    log = Path(run.args.output_dir) / "trainer_state.json"
    log.write_text('{"global_step": 4, "log_hist')
    make_trainer(max_steps=5, save_strategy="no").train(resume_from_checkpoint=True)
    assert (log.parent / "_earlier" / "1" / log.name).exists()


@pytest.mark.parametrize("name", ["run_state.json", "run_state.safetensors", "model.safetensors", "optimizer.pt"])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(make_trainer, caplog, name):
    settings = {"save_strategy": "steps", "save_steps": 2}
    run = make_trainer(max_steps=6, **settings)
    run.train()
    file = Path(run.args.output_dir) / "checkpoint-6" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    resumed = make_trainer(max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-6 is damaged: {file} is damaged" in caplog.text
    assert resumed.state.log_history[3]["step"] == 4
    assert len(read_log(run.args.output_dir)) >= 6
    for checkpoint in Path(run.args.output_dir).glob("checkpoint-*"):
        (checkpoint / "run_state.json").write_text("{")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_deepspeed_is_not_resumed_without_it(make_trainer):
    run = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    (Path(run.args.output_dir) / "checkpoint-2" / "latest").write_text("global_step2")  # as DeepSpeed leaves it
    with pytest.raises(ValueError, match="checkpoint-2 was saved with DeepSpeed, and this run is without it"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_clock_that_goes_back_deletes_no_newest_checkpoint(make_trainer, monkeypatch):
    """Here it goes back by an hour after each checkpoint."""
    now, back = time.time, 0.0

    class GoBack(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            nonlocal back
            back += 3600
            for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
                later = checkpoint.stat().st_mtime + 3600
                os.utime(checkpoint, (later, later))

    monkeypatch.setattr(time, "time", lambda: now() - back)
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    run = make_trainer(max_steps=6, callbacks=[GoBack()], **settings)
    run.train()
    assert steps_of(Path(run.args.output_dir)) == [4, 6]
    resumed = make_trainer(max_steps=8, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[5]["step"] == 6
    assert steps_of(Path(run.args.output_dir)) == [6, 8]


@pytest.mark.parametrize("limit", [500, 50_000, 150_000], ids=["plain", "safetensors", "torch"])
@pytest.mark.slow
def test_a_checkpoint_that_the_disk_does_not_hold(make_trainer, limit):
    """No file may get longer: the first one, the model's, or with more room the optimizer's, is not written whole."""

    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = {"save_strategy": "steps", "save_steps": 2}
    run = make_trainer(max_steps=8, callbacks=[FillDisk()], **settings)
    folder = Path(run.args.output_dir)
    try:
        with pytest.raises(RuntimeError, match=f"no room for {folder}/checkpoint-6: .* from {folder}/checkpoint-4."):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps_of(folder) == [2, 4], "nothing takes room that nobody can go on from"
    resumed = make_trainer(max_steps=8, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert steps_of(folder) == [2, 4, 6, 8]
    assert [row["step"] for row in rows(resumed)] == [step for step in range(1, 9) for _ in range(4)]


def test_a_whole_checkpoint_is_kept_when_there_is_no_room_for_its_copy(make_trainer, monkeypatch):
    def copy(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_push_from_checkpoint", copy)
    folder = Path(trainer.args.output_dir)
    with pytest.raises(RuntimeError, match=f"no room for {folder}/checkpoint-2: .* from {folder}/checkpoint-2."):
        trainer.train()
    make_trainer(save_strategy="no", max_steps=3).train(resume_from_checkpoint=True)


def test_no_other_error_of_saving_is_taken_for_a_full_disk(make_trainer, monkeypatch):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    monkeypatch.setattr(trainer, "save_model", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(trainer, "save_model", Mock(side_effect=error))
    with pytest.raises(PermissionError):
        trainer.train()


def test_times_that_cannot_be_set_stop_no_run(make_trainer, monkeypatch):
    """As of folders that somebody else made. And where they are in order, none is set."""
    utime = os.utime

    class LongAgo(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            utime(f"{args.output_dir}/checkpoint-{state.global_step}", (state.global_step, state.global_step))

    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError("Operation not permitted")))
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(output_dir="in order", callbacks=[LongAgo()], **settings).train()
    os.utime.assert_not_called()
    make_trainer(**settings).train()
    os.utime.assert_called_once()  # these checkpoints are less than a second apart


@pytest.mark.slow
def test_a_run_that_is_terminated_saves_and_goes_on(make_trainer):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = make_trainer(output_dir="whole")
    whole.train()
    terminated, termination = make_trainer(), TerminationCallback()
    before = signal.getsignal(signal.SIGTERM)
    for callback in (Terminate(), termination):
        terminated.add_callback(callback)
    terminated.train()
    assert (termination.is_terminated, terminated.state.global_step) == (True, 5)
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def raises_for_a_vowel(completions, threshold, **kwargs):
    if kwargs["trainer_state"].global_step >= 4 and any("a" in text for text in completions):
        raise KeyError("a")
    return vowel_reward(completions, threshold)


def raises_for_many(completions, threshold, **kwargs):
    if kwargs["trainer_state"].global_step >= 4 and len(completions) > 1:
        raise MemoryError("too many")
    return vowel_reward(completions, threshold)


def returns_too_few(completions, threshold, **kwargs):
    rewards = vowel_reward(completions, threshold)
    return rewards[1:] if kwargs["trainer_state"].global_step >= 4 and len(rewards) > 1 else rewards


async def raises_later(completions, threshold, **kwargs):
    return raises_for_a_vowel(completions, threshold, **kwargs)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            raises_for_a_vowel,
            r"raises_for_a_vowel' raised KeyError: 'a', for row \d+ of 16, prompt 'say .*', completion '.*a",
        ),
        (raises_for_many, "raised MemoryError: too many, for 16 completions together"),
        (
            returns_too_few,
            "'returns_too_few' raised ValueError: it returned 15 rewards, .* for 16 completions together",
        ),
        (raises_later, "'raises_later' raised KeyError: 'a', for one of 16 completions"),
    ],
)
@pytest.mark.slow
def test_a_reward_function_that_raises_is_named_and_costs_nothing(make_trainer, function, message):
    whole = make_trainer(output_dir="whole")
    whole.train()
    failed = make_trainer(reward_funcs=function)
    with pytest.raises(RewardError, match=f"{message}.* Mend it") as raised:
        failed.train()
    assert isinstance(raised.value.__cause__, KeyError | MemoryError | ValueError)
    assert str(raised.value).endswith("it goes on after step 4, which is saved.")

    def mended(completions, **kwargs):
        return vowel_reward(completions, **kwargs)

    mended.__name__ = function.__name__
    resumed = make_trainer(reward_funcs=mended)
    resumed.train(resume_from_checkpoint=True)
    # The batch that failed is sampled anew.
    assert logged(resumed, "loss")[:4] == logged(whole, "loss")[:4]
    assert len(logged(resumed, "loss")) == 12
    assert resumed.difficulty_tracker.num_rollouts.sum() == 12 * 16


def test_another_runs_checkpoint_is_not_taken_for_its_own(make_trainer):
    old = make_trainer(max_steps=4, save_strategy="steps", save_steps=4)
    old.train()
    folder = Path(old.args.output_dir)
    new = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    new.train()
    shutil.copytree(folder / "_earlier" / "1" / "checkpoint-4", folder / "checkpoint-4")
    resumed = make_trainer(max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[:2] == new.state.log_history[:2]
    # Named, it is that run that goes on; what the folder had is moved aside.
    resumed = make_trainer(max_steps=5)
    resumed.train(resume_from_checkpoint=str(folder / "_earlier" / "1" / "checkpoint-4"))
    assert resumed.lifecycle.run_id == old.lifecycle.run_id
    assert steps_of(folder) == []
    assert {row["step"] for row in rows(resumed)} == {5}


def test_a_checkpoint_or_a_folder_that_names_no_run_is_taken(checkpoint):
    folder, state, run = checkpoint.parent, checkpoint / "run_state.json", checkpoint.parent / "run.json"
    for file in (run, state):  # copied from elsewhere; TRL's own
        data = file.read_bytes()
        file.unlink()
        assert complete_checkpoints(folder) == [str(checkpoint)]
        file.write_bytes(data)


STREAM = {"train_dataset": make_dataset().to_iterable_dataset(), "rollout_allocation": "uniform"}


@pytest.mark.parametrize(
    ("max_steps", "data"), [(8, {}), (6, {}), (6, STREAM)], ids=["at the end of a pass", "inside a pass", "stream"]
)
@pytest.mark.slow
def test_a_run_resumed_after_its_end_trains_no_further_step(make_trainer, max_steps, data):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": max_steps, **data}
    run = make_trainer(**settings)
    run.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == max_steps
    assert logged(resumed, "loss") == logged(run, "loss")
    assert rows(resumed) == rows(run)
    for a, b in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- settings that changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 8}, "num_generations is 8, and was 4 when .*checkpoint-6 was saved.*Set it to 4"),
        ({"seed": 3}, "seed is 3, and was 7"),
        ({"num_iterations": 2}, "num_iterations is 2, and was 1"),
        ({"prompt_selection_ratio": 0.5}, "prompt_selection_ratio is 0.5, and was 1.0"),
        ({"shuffle_dataset": False}, "shuffle_dataset is False, and was True"),
        (
            {"difficulty_reward_func": "length_reward", "reward_funcs": [vowel_reward, length_reward]},
            "difficulty_reward_func is length_reward, and was vowel_reward",
        ),
        # It went on counting another function's rewards on top of the first's.
        (
            {"reward_funcs": [length_reward, vowel_reward]},
            "difficulty_reward_func is length_reward, and was vowel_reward",
        ),
        ({"per_device_train_batch_size": 32}, "generation_batch_size is 32, and was 16"),
        # The data would go on at another place of the pass than the budgets.
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
            r"gradient_accumulation_steps / steps_per_generation is 2.0, and was 1.0",
        ),
        ({"temperature": 0.5}, "temperature is 0.5, and was 1.0 .* schedule, which began there, is at .* Set it to"),
    ],
)
def test_a_setting_that_a_run_cannot_change_is_refused(make_trainer, checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings).train(resume_from_checkpoint=str(checkpoint))


def test_a_generation_batch_that_is_under_way_cannot_be_cut_anew(make_trainer):
    """Half of its completions were dropped, and the run went on."""
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    make_trainer(**settings, per_device_train_batch_size=4, steps_per_generation=4, max_steps=3).train()
    cut_anew = settings | {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match="per_device_train_batch_size is 8, and was 4"):
        make_trainer(**cut_anew, steps_per_generation=2).train(resume_from_checkpoint=True)


def test_a_trainer_that_trains_again_begins_again(make_trainer):
    """Ctrl-C and `train()` in a notebook: difficulty, temperature and annealing went on from the first run."""
    trainer = make_trainer(max_steps=6)
    trainer.train()
    first = trainer.lifecycle.run_id, trainer.difficulty_tracker.num_rollouts.sum(), trainer.temperature
    assert first[2] != 1.0
    trainer.train()
    assert trainer.lifecycle.run_id != first[0]
    assert trainer.difficulty_tracker.num_rollouts.sum() == first[1]
    assert trainer.num_generation_batches == 6
    assert trainer.temperature_schedule.step_count == 6
    again = rows(trainer)
    assert {row["step"] for row in again} == {1, 2, 3, 4, 5, 6}
    assert [row["temperature"] for row in again[:8]] == [1.0] * 8
    assert {row["rollouts"] for row in again[:16]} == {4}


def test_an_epoch_that_a_callback_ends_is_a_pass_of_its_own(make_trainer):
    """The next one had the same prompts again."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 2 == 0

    trainer = make_trainer(max_steps=4, callbacks=[Stop()])
    trainer.train()
    prompts = [{row["prompt_id"] for row in rows(trainer) if row["step"] in steps} for steps in ((1, 2), (3, 4))]
    assert prompts[0] != prompts[1]


def test_a_checkpoint_in_the_folder_of_the_new_run_is_no_model_to_begin_with(make_trainer):
    old = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    old.train()
    model = f"{old.args.output_dir}/checkpoint-2"
    with pytest.raises(
        ValueError, match="checkpoint-2, a checkpoint in output_dir .* Set another output_dir, or resume"
    ):
        make_trainer(model=model).train()
    make_trainer(model=model, output_dir="other", max_steps=1).train()


def test_folders_of_the_users_are_no_checkpoints(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    run = make_trainer(max_steps=2, **settings)
    run.train()
    best = Path(run.args.output_dir) / "checkpoint-best"
    shutil.copytree(Path(run.args.output_dir) / "checkpoint-2", best)
    make_trainer(max_steps=3, **settings).train(resume_from_checkpoint=True)
    make_trainer(max_steps=1).train()
    assert best.exists()


def test_the_best_checkpoint_of_a_run_that_trl_began_stays_where_it_is(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    grpo = make_trainer(GRPOTrainer, GRPOConfig, **settings | {"max_steps": 4})
    grpo.train()
    make_trainer(**settings).train(resume_from_checkpoint=f"{grpo.args.output_dir}/checkpoint-4")
    make_trainer(**settings | {"max_steps": 7}).train(resume_from_checkpoint=True)
    assert steps_of(Path(grpo.args.output_dir)) == [2, 4, 6, 7]


def test_a_constant_temperature_that_was_changed_is_obeyed(make_trainer):
    """The run went on at the old one, while its report said the new one."""
    settings = {"temperature_schedule": "constant", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(**settings).train()
    resumed = make_trainer(**settings | {"max_steps": 6, "temperature": 0.5})
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "temperature") == [1.0] * 4 + [0.5] * 2


def test_a_schedule_switched_off_leaves_the_configured_temperature(make_trainer, checkpoint):
    resumed = make_trainer(temperature_schedule="constant", max_steps=8)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "temperature")[-2:] == [1.0, 1.0]
    assert logged(resumed, "temperature")[5] != 1.0


@pytest.mark.slow
def test_a_schedule_switched_on_keeps_the_runs_count(make_trainer):
    """It began at t = 0, so annealing came too late."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(temperature_schedule="constant", max_steps=8, **settings).train()
    resumed = make_trainer(max_steps=12, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.temperature_schedule.step_count == 12
    targets = logged(resumed, "target_entropy")
    assert len(targets) == 4
    assert targets[-1] == pytest.approx(0.9 * resumed.temperature_schedule.initial_entropy)


def test_a_target_that_was_set_by_hand_is_obeyed(make_trainer, checkpoint):
    resumed = make_trainer(temperature_target_entropy=2.5, max_steps=8)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "target_entropy")[-1] < 2.6


def test_a_reward_function_that_raises_at_once_promises_no_checkpoint(make_trainer):
    def broken(completions, **kwargs):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="row 0 of 16.* Mend it, then run the same command again.$"):
        make_trainer(reward_funcs=broken).train()


# --- two runs at once


HOLD = """
import sys, time
from e3_trl.runs.lock import held
with held(sys.argv[1], True):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_second_run_in_the_folder_of_a_living_one_is_refused_and_moves_nothing(make_trainer, tmp_path):
    """It moved the living run's checkpoints and rollouts aside, and both wrote one rollouts.jsonl."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run = make_trainer(**settings)
    run.train()
    before = rows(run), steps_of(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run.args.output_dir], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        for resume in (None, True):
            with pytest.raises(ValueError, match=rf"another run is going on there: process {other.pid} on \S+\. Wait"):
                make_trainer(**settings).train(resume_from_checkpoint=resume)
        assert (rows(run), steps_of(tmp_path / "run")) == before
        assert not (tmp_path / "run" / "_earlier").exists()
        other.kill()
    make_trainer(**settings | {"max_steps": 5}).train(resume_from_checkpoint=True)  # nothing is left of it


def test_the_folder_is_released_at_the_end_and_after_an_error(make_trainer):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="another run is going on there: process"):
                make_trainer(max_steps=1).train()
            raise KeyboardInterrupt

    trainer, interrupt = make_trainer(max_steps=1), Interrupt()
    trainer.add_callback(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train()
    make_trainer(max_steps=1).train()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_stops_no_run(make_trainer, monkeypatch, caplog, number):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    make_trainer(max_steps=1).train()
    assert "run cannot be locked" in caplog.text


def test_all_processes_raise_where_one_finds_the_folder_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "broadcast_object_list", lambda objects: ["taken"])
    with pytest.raises(ValueError, match="taken"), lock.held(tmp_path, is_main=False):
        pass
    assert not (tmp_path / "_run.lock").exists()


# --- what transformers does not restore


def test_a_trained_adapter_beside_its_reference_is_restored(make_trainer, model_path, tmp_path):
    """transformers loaded the checkpoint's folder `ref/` alone: the trained adapter was that of the start."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config).save_pretrained(tmp_path / "adapter")
    settings = {"beta": 0.1, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}

    def make(output_dir):
        base = AutoModelForCausalLM.from_pretrained(model_path)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        return make_trainer(model=model, processing_class=tokenizer, output_dir=output_dir, **settings)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-4" / "ref").is_dir()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name in ("kl", "loss", "grad_norm"):
        assert logged(resumed, name) == logged(whole, name)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name


def test_a_checkpoint_of_a_model_alone_is_refused(make_trainer):
    """Adam and the learning rate began anew, without a word."""
    run = make_trainer(max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True)
    run.train()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds a model without its optimizer .* \(model_name_or_path"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_reference_model_that_follows_the_policy_is_restored(make_trainer, tmp_path):
    """It was the first model again."""
    follows = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, **follows}
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "kl") == logged(whole, "kl")
    for a, b in zip(whole.ref_model.parameters(), resumed.ref_model.parameters(), strict=True):
        assert torch.equal(a, b)
    (checkpoint / "ref_model.safetensors").unlink()
    with pytest.raises(ValueError, match="sync_ref_model is True, and .*checkpoint-4 holds no reference model"):
        make_trainer(**settings).train(resume_from_checkpoint=str(checkpoint))


def test_a_learning_rate_that_changed_is_where_its_schedule_is_by_then(make_trainer, checkpoint):
    resumed = make_trainer(learning_rate=1e-3, max_steps=12, weight_decay=0.2, adam_beta1=0.5)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "learning_rate")[6:] == pytest.approx([1e-3 * (12 - step) / 12 for step in range(6, 12)])
    groups = resumed.optimizer.param_groups
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.2, (0.5, 0.999)), (0, (0.5, 0.999))]


def test_a_schedule_that_keeps_the_learning_rate_to_itself_refuses_another(make_trainer):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_dataset": make_dataset(4)}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(**settings, metric_for_best_model="reward").train()
    with pytest.raises(ValueError, match=r"learning_rate is 0.5, and was 0.01 when .*restores it with the optimizer"):
        make_trainer(**settings, learning_rate=0.5).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_run_interrupted_and_resumed_in_one_object_logs_its_steps_once(make_trainer):
    """What the interrupted one had not logged yet was averaged into the first log after it."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_steps": 4}
    whole = make_trainer(output_dir="whole", **settings)
    whole.train()
    trainer, interrupt = make_trainer(**settings), Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=True)
    histories = [
        [{key: value for key, value in entry.items() if key not in MEASURED_TIMES} for entry in run.state.log_history]
        for run in (trainer, whole)
    ]
    assert histories[0][:-1] == histories[1][:-1]


def test_a_new_run_in_a_used_folder_leaves_no_old_model_beside_its_arguments(make_trainer, tmp_path):
    old = make_trainer(max_steps=1)
    old.train()
    old.save_model()
    (tmp_path / "run" / "figures").mkdir()
    (tmp_path / "run" / "figures" / "reward.png").touch()
    with pytest.raises(ValueError, match="run, the output_dir of an earlier run, .* Set another output_dir"):
        make_trainer(model=old.args.output_dir, max_steps=1).train()
    make_trainer(max_steps=1).train()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "figures/reward.png"):
        assert not (tmp_path / "run" / name).exists(), name
        assert (tmp_path / "run" / "_earlier" / "1" / name).exists(), name


@pytest.mark.slow
def test_with_persistent_workers_completions_are_trls(make_trainer):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 6}
    rewards = []
    for kind in (GRPOTrainer, FastGRPOTrainer):
        trainer = make_trainer(kind, output_dir=kind.__name__, **settings)
        trainer.train()
        rewards.append(logged(trainer, "reward"))
    assert rewards[0] == rewards[1]
