"""What of a trainer is in its checkpoints, and how a run begins, goes on and ends early. Functions of the trainer."""

import errno
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..method.difficulty import DifficultyTracker
from ..method.temperature import EntropyWindow
from ..rollouts.reward_errors import RewardError
from ..rollouts.telemetry import RolloutLog
from ..rollouts.vllm import VLLMServerError
from . import checkpoint as checkpoints


logger = get_logger(__name__)

FIXED_SETTINGS = (
    "difficulty_reward_func", "generation_batch_size", "num_generations", "num_iterations", "prompt_selection_ratio",
    "seed", "shuffle_dataset",
)  # fmt: skip


def choose_checkpoint(trainer, resume_from_checkpoint: str | bool | None) -> str | None:
    """
    The checkpoint that the run goes on from, ready for its number of processes; `None` = it is a new run.

    Raises:
        `ValueError`: if there is none, or these processes cannot resume it; it says what to do.
    """
    output_dir = trainer.args.output_dir
    if resume_from_checkpoint is True:
        found = checkpoints.last_sound_checkpoint(output_dir) if trainer.is_world_process_zero() else (None, {})
        ((resume_from_checkpoint, damaged),) = broadcast_object_list([found])
        for folder, damage in damaged.items():
            logger.warning(f"{folder} is damaged: {damage} Going back to the checkpoint before it.")
        if resume_from_checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint is True, but {output_dir} (output_dir) holds no complete checkpoint. Unset "
                "it to start a new run."
            )
    if not resume_from_checkpoint:
        return None
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # which load formats of their own
        checkpoints.check_weights(resume_from_checkpoint, set(trainer.model.state_dict()))
    plugin = trainer.accelerator.state.deepspeed_plugin
    if checkpoints.is_resharded(resume_from_checkpoint, trainer.accelerator.num_processes, plugin is not None):
        plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    return resume_from_checkpoint


def begin_run(trainer) -> None:
    """
    Begin a new run, also with a trainer that has had one.

    Raises:
        `ValueError`: if the model lies in a checkpoint that would be moved aside for the run.
    """
    model, output_dir = Path(trainer.model.config._name_or_path).resolve(), Path(trainer.args.output_dir).resolve()
    if model.parent == output_dir and model.name.startswith(PREFIX_CHECKPOINT_DIR):
        raise ValueError(
            f"model_name_or_path is {model}, a checkpoint in output_dir ({output_dir}), which would be moved aside "
            "for the new run. Set another output_dir, or resume_from_checkpoint to go on with the old run."
        )
    if trainer.num_generation_batches > 0:
        tracker, schedule = trainer.difficulty_tracker, trainer.temperature_schedule
        if tracker is not None:
            trainer.difficulty_tracker = DifficultyTracker(
                len(tracker.difficulty), tracker.initial_difficulty, tracker.decay, tracker.prior
            )
        if schedule is not None:
            schedule.reset()
            trainer.temperature = schedule.temperature
        trainer.entropy_window.reset()
        trainer.num_generation_batches = trainer._step = 0
        trainer._buffered_inputs = None
        trainer.rollout_log = RolloutLog(trainer.args.output_dir)
    _enter_folder(trainer)


def _enter_folder(trainer, old_id: str | None = None, step: int = 0) -> None:
    """Make the output folder that of the run, which is new or goes on from `step` of the run `old_id`."""
    trainer.saved_step = step
    trainer._last_loaded_step = -1  # whatever the step, these may be other weights than vLLM has
    (trainer.run_id,) = broadcast_object_list([old_id or uuid.uuid4().hex])
    if trainer.args.should_save:
        moved = checkpoints.enter_folder(trainer.args.output_dir, trainer.run_id, old_id, step)
        if moved is not None:
            logger.warning(
                f"output_dir held another run, or later steps of this one. They are in {moved} now: delete it if "
                "nobody needs it."
            )


def save_run(trainer, folder: str) -> None:
    """Write E3's part of a checkpoint: of each process its window, of one what all share."""
    trainer.saved_step = trainer.state.global_step
    trainer.rollout_log.flush()
    if trainer.window_step != 0:
        checkpoints.save_window(folder, trainer.accelerator.process_index, trainer._buffered_inputs)
    if trainer.args.should_save:
        checkpoints.keep_order(Path(folder).parent)
        tracker = trainer.difficulty_tracker
        checkpoints.save_state(folder, _state_dict(trainer), {} if tracker is None else tracker.state_dict())


@contextmanager
def full_disk_named(folder: str) -> Iterator[None]:
    """
    Inside, the checkpoint `folder` is written. If there is no room for it, what nobody could go on from is removed,
    and the user told what to do: from torch's message nobody would guess the cause.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_safetensors = re.search(r"\(os error (\d+)\)", str(error))
        number = int(of_safetensors[1]) if of_safetensors else getattr(error, "errno", None)
        of_torch = "inline_container" in str(error)  # its writer of archives, which names no cause
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not of_torch:
            raise
        whole = checkpoints.complete_checkpoints(Path(folder).parent)
        if folder not in whole:  # it can be whole where a copy of it could not be written
            shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(
            f"There is no room for {folder}: {error}. Make some (save_total_limit: 2 keeps the last two checkpoints), "
            "then run the same command "
            + (f"with resume_from_checkpoint set to true: it goes on from {whole[0]}." if whole else "again.")
        ) from error


def _state_dict(trainer) -> dict:
    """What `e3_state.json` holds: all that cannot be recomputed, and what a reader wants to know."""
    sampler, schedule = trainer._train_sampler, trainer.temperature_schedule
    return {
        "run_id": trainer.run_id,
        "dataset": trainer.dataset_id,
        "settings": _settings(trainer) | _window_settings(trainer) | {"temperature": trainer.args.temperature},
        "num_processes": trainer.accelerator.num_processes,
        "sampler": None if sampler is None else sampler.state_dict(trainer.num_generation_batches),
        "num_generation_batches": trainer.num_generation_batches,
        "window_step": trainer.window_step,
        "temperature": trainer.temperature,
        "temperature_schedule": None if schedule is None else schedule.state_dict(),
        "entropy_window": asdict(trainer.entropy_window),
    }


def _settings(trainer) -> dict:
    """What decides which prompts come when, and what is counted of them: a run cannot change it on its way."""
    args = trainer.args
    # A checkpoint is after so many optimizer steps, whose micro-steps are those of so many generation batches.
    ratio = args.gradient_accumulation_steps / args.steps_per_generation
    fixed = {name: getattr(args, name) for name in FIXED_SETTINGS}
    return fixed | {"gradient_accumulation_steps / steps_per_generation": ratio}


def _window_settings(trainer) -> dict:
    """What decides how a generation batch is cut: it cannot change inside one."""
    return {name: getattr(trainer.args, name) for name in ("per_device_train_batch_size", "steps_per_generation")}


def resume_run(trainer, checkpoint: str) -> None:
    """
    Go on from a checkpoint, whose weights and optimizer have been loaded.

    Raises:
        `ValueError`: if it is damaged, or belongs to another dataset or to settings that a run cannot change.
    """
    if trainer.is_deepspeed_enabled:
        # From its universal format DeepSpeed gives all parameter groups one step counter, and each counts it on.
        for optimizer_state in trainer.optimizer.state.values():
            if "step" in optimizer_state:
                optimizer_state["step"] = deepcopy(optimizer_state["step"])
    loaded = checkpoints.load_state(checkpoint, trainer.dataset_id)
    step = trainer.state.global_step
    if loaded is None:
        logger.warning(
            f"{checkpoint} holds no E3 state: difficulty, rollout bounds and temperature start anew from here."
        )
        micro_steps = step * trainer.args.gradient_accumulation_steps
        loaded = {"num_generation_batches": micro_steps // trainer.window_steps, "window_step": 0}, None
    saved = loaded[0].get("settings", {})
    checkpoints.check_settings(checkpoint, saved, _settings(trainer))
    if loaded[0]["window_step"] != 0:
        checkpoints.check_settings(checkpoint, saved, _window_settings(trainer))
    _restore(trainer, checkpoint, *loaded)
    _restore_temperature(trainer, checkpoint, loaded[0])
    _enter_folder(trainer, checkpoints.run_id(checkpoint), step)  # after the checks: what is refused loses no rows
    if trainer.accelerator.is_main_process:
        trainer.rollout_log.resume(step)


def _restore(trainer, checkpoint: str, state: dict, difficulty: dict[str, np.ndarray] | None) -> None:
    trainer.num_generation_batches = state["num_generation_batches"]
    trainer._step = state["window_step"]
    if trainer.window_step != 0:
        accelerator = trainer.accelerator
        trainer._buffered_inputs = checkpoints.load_window(checkpoint, accelerator.process_index, accelerator.device)
    if trainer.difficulty_tracker is not None and difficulty is not None:
        trainer.difficulty_tracker.load_state_dict(difficulty)
        trainer._train_sampler.epoch = state["sampler"]["pass"]


def _restore_temperature(trainer, checkpoint: str, state: dict) -> None:
    """Go on where the temperature was, unless the settings say otherwise by now."""
    args, schedule, saved = trainer.args, trainer.temperature_schedule, state.get("temperature_schedule")
    before = state.get("settings", {}).get("temperature", args.temperature)
    if schedule is None:
        if saved is None and before == args.temperature:
            trainer.temperature = state.get("temperature", args.temperature)  # it may have been set by hand
    elif saved is None:
        schedule.step_count = trainer.state.global_step  # annealing keeps the run's count
    elif before != args.temperature:
        raise ValueError(
            f"temperature is {args.temperature}, and was {before} when {checkpoint} was saved: the schedule, which "
            f"began there, is at {saved['temperature']:.3g} now. Set it to {before}, or temperature_schedule to "
            "'constant'."
        )
    else:
        schedule.load_state_dict(saved)
        if args.temperature_target_entropy is not None:
            schedule.initial_entropy = args.temperature_target_entropy
        trainer.temperature = schedule.temperature
        trainer.entropy_window = EntropyWindow(**state["entropy_window"])


@contextmanager
def saved_if_it_cannot_go_on(trainer) -> Iterator[None]:
    """
    Inside, a lost vLLM server or a reward function that raises costs nothing: the run can go on from the last
    optimizer step, whenever it saved.
    """
    try:
        yield
    except (RewardError, VLLMServerError) as error:
        if trainer.saved_step != trainer.state.global_step and not trainer.inside_optimizer_step:
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
        if isinstance(error, RewardError) and trainer.saved_step > 0:
            raise RewardError(
                f"{error} With resume_from_checkpoint set to true it goes on after step {trainer.saved_step}, which "
                "is saved."
            ) from error.__cause__
        raise
