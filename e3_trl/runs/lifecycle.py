"""How a run begins, goes on from a checkpoint, saves and ends early. What it saves is each part's own matter."""

import errno
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Protocol

import safetensors.torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed.fsdp import StateDictType

from . import checkpoint as checkpoints
from .optimizer import takes_changes
from .run_folder import (
    PREFIX_CHECKPOINT_DIR,
    PROCESS_STATE_FILE,
    REFERENCE_FILE,
    STATE_FILE,
    complete_checkpoints,
    enter_folder,
    keep_order,
    run_id,
)


logger = get_logger(__name__)


class RunCannotGoOn(Exception):
    """Something that a run depends on is lost, on all processes together: it can save, and go on later."""


class Part(Protocol):
    """A part of a trainer that a checkpoint has to hold, because it cannot be recomputed."""

    def state_to_save(self) -> dict:
        """Numbers, texts, arrays and tensors, in dicts and lists."""

    def restore(self, state: dict | None) -> None:
        """
        Go on from what [`Part.state_to_save`] returned; `None` = the checkpoint holds none. `ValueError` if the run
        cannot go on from it, before anything is changed.
        """


class Lifecycle:
    """
    The life of a run. It saves and restores the parts that are registered with it, and knows none of them.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer.
        dataset_id (`dict`): `num_prompts` and `fingerprint` of the dataset, empty for a stream.

    Attributes:
        parts (`dict[str, Part]`): what all processes share, by name; restored in this order.
        parts_of_process (`dict[str, Part]`):
            What each process has of a generation batch that is being trained on: saved where a checkpoint lies inside
            one.
        run_id (`str`, *optional*): of the run, once it has begun.
        saved_step (`int`): optimizer steps of the last checkpoint.
    """

    def __init__(self, trainer, dataset_id: dict):
        self.trainer = trainer
        self.dataset_id = dataset_id
        self.parts: dict[str, Part] = {}
        self.parts_of_process: dict[str, Part] = {}
        self.run_id: str | None = None
        self.saved_step = 0
        self._untouched: dict[str, dict] | None = None

    def choose_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """
        The checkpoint that the run goes on from, ready for its number of processes; `None` = it is a new run.

        Raises:
            `ValueError`: if there is none, or these processes cannot resume it; it says what to do.
        """
        trainer, output_dir = self.trainer, self.trainer.args.output_dir
        if resume_from_checkpoint is True:
            found = checkpoints.last_sound_checkpoint(output_dir) if trainer.is_world_process_zero() else (None, {})
            ((resume_from_checkpoint, damaged),) = broadcast_object_list([found])
            for folder, damage in damaged.items():
                logger.warning(f"{folder} is damaged: {damage} Going back to the checkpoint before it.")
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {output_dir} (output_dir) holds no complete checkpoint. "
                    "Unset it to start a new run."
                )
        if not resume_from_checkpoint:
            return None
        if not trainer.is_sharded:  # which load formats of their own
            checkpoints.check_weights(resume_from_checkpoint, set(trainer.model.state_dict()))
        plugin = trainer.accelerator.state.deepspeed_plugin
        if checkpoints.is_resharded(resume_from_checkpoint, trainer.accelerator.num_processes, plugin is not None):
            plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        if not trainer.is_sharded:
            checkpoints.check_optimizer(resume_from_checkpoint)
        return resume_from_checkpoint

    def begin(self) -> None:
        """
        Begin a new run, also with a trainer that has had one.

        Raises:
            `ValueError`: if the model lies in a checkpoint that would be moved aside for the run.
        """
        trainer = self.trainer
        model, output_dir = Path(trainer.model.config._name_or_path).resolve(), Path(trainer.args.output_dir).resolve()
        if model.parent == output_dir and model.name.startswith(PREFIX_CHECKPOINT_DIR):
            raise ValueError(
                f"model_name_or_path is {model}, a checkpoint in output_dir ({output_dir}), which would be moved "
                "aside for the new run. Set another output_dir, or resume_from_checkpoint to go on with the old run."
            )
        if model == output_dir and run_id(output_dir) is not None:
            raise ValueError(
                f"model_name_or_path is {model}, the output_dir of an earlier run, whose model would be moved aside "
                "for the new run. Set another output_dir, or resume_from_checkpoint to go on with the old run."
            )
        if self._untouched is None:
            self._untouched = {name: part.state_to_save() for name, part in self.parts.items()}
        else:
            trainer.go_to(num_generation_batches=0, window_step=0)
            for name, part in self.parts.items():
                part.restore(self._untouched[name])
        self._enter_folder()

    def resume(self, checkpoint: str) -> None:
        """
        Go on from a checkpoint, whose weights and optimizer have been loaded.

        Raises:
            `ValueError`: if it is damaged, or belongs to another dataset or to settings that a run cannot change.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        if trainer.is_deepspeed_enabled:
            # From its universal format DeepSpeed gives all parameter groups one step counter, and each counts it on.
            for optimizer_state in trainer.optimizer.state.values():
                if "step" in optimizer_state:
                    optimizer_state["step"] = deepcopy(optimizer_state["step"])
        if self._untouched is None:
            self._untouched = {name: part.state_to_save() for name, part in self.parts.items()}
        state = checkpoints.load_state(Path(checkpoint) / STATE_FILE)
        if state is None:
            logger.warning(f"{checkpoint} holds no state of the run: what TRL does not save starts anew from here.")
            micro_steps = step * trainer.args.gradient_accumulation_steps
            trainer.go_to(num_generation_batches=micro_steps // trainer.window_steps, window_step=0)
            state = {"parts": {}}
        else:
            self._check(checkpoint, state)
            self._restore_reference(checkpoint, state)
            trainer.go_to(state["num_generation_batches"], state["window_step"])
            if state["window_step"] != 0:
                self._restore_process(checkpoint)
        for name, part in self.parts.items():
            part.restore(state["parts"].get(name))
        self._enter_folder(run_id(checkpoint), step)  # after the checks: what is refused loses no rows

    def _check(self, checkpoint: str, state: dict) -> None:
        """Raise `ValueError` if the state belongs to another dataset, or to settings that cannot change on the way."""
        for name, value in self.dataset_id.items():
            if (saved := state["dataset"].get(name)) != value:
                raise ValueError(
                    f"{checkpoint} belongs to another dataset: its {name} is {saved}, this run's {value}. Resume with "
                    "the dataset that the run began with, or start a new run."
                )
        settings = self._fixed_settings()
        if state["window_step"] != 0:
            settings |= self._window_settings()
        for name, value in settings.items():
            before = state["settings"].get(name)
            if before not in (None, value):  # None: saved by a version that did not look at it
                raise ValueError(
                    f"{name} is {value}, and was {before} when {checkpoint} was saved: which prompts come when, or "
                    f"what has been counted of them, would no longer be right. Set it to {before}, or start a new run."
                )
        for name, value in self._optimizer_settings().items():
            before = state["settings"].get(name)
            if before not in (None, value) and not takes_changes(self.trainer):
                raise ValueError(
                    f"{name} is {value}, and was {before} when {checkpoint} was saved, and DeepSpeed, or this "
                    f"lr_scheduler_type, restores it with the optimizer. Set it to {before}, or start a new run from "
                    f"the checkpoint (model_name_or_path: {checkpoint}), in another output_dir."
                )

    def _fixed_settings(self) -> dict:
        """What decides which prompts come when, and what is counted of them: a run cannot change it on its way."""
        args = self.trainer.args
        # A checkpoint is after so many optimizer steps, whose micro-steps are those of so many generation batches.
        ratio = args.gradient_accumulation_steps / args.steps_per_generation
        return self.trainer.fixed_settings | {"gradient_accumulation_steps / steps_per_generation": ratio}

    def _optimizer_settings(self) -> dict:
        """What a checkpoint's optimizer brings along, see [`~e3_trl.runs.optimizer.settings_kept`]."""
        names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
        return {name: getattr(self.trainer.args, name) for name in names}

    def _window_settings(self) -> dict:
        """What decides how a generation batch is cut: it cannot change inside one."""
        names = ("per_device_train_batch_size", "steps_per_generation")
        return {name: getattr(self.trainer.args, name) for name in names}

    def _settings_to_save(self) -> dict:
        settings = self._fixed_settings() | self._window_settings() | self._optimizer_settings()
        return settings | {"sync_ref_model": self.trainer.args.sync_ref_model}

    def _restore_process(self, checkpoint: str) -> None:
        accelerator = self.trainer.accelerator
        path = Path(checkpoint) / PROCESS_STATE_FILE.format(process_index=accelerator.process_index)
        state = checkpoints.load_state(path, accelerator.device)
        if state is None:
            raise ValueError(
                f"{path} is missing, and {checkpoint} lies inside a generation batch. Resume from another checkpoint."
            )
        for name, part in self.parts_of_process.items():
            part.restore(state[name])

    def _keeps_reference(self) -> bool:
        """Whether the reference model changes (`sync_ref_model`), and lies whole in this process."""
        trainer = self.trainer
        return trainer.args.sync_ref_model and not trainer.is_sharded

    def _restore_reference(self, checkpoint: str, state: dict) -> None:
        trainer, path = self.trainer, Path(checkpoint) / REFERENCE_FILE
        if trainer.ref_model is not None and path.exists():
            safetensors.torch.load_model(trainer.accelerator.unwrap_model(trainer.ref_model), path)
        elif trainer.args.sync_ref_model and state["settings"].get("sync_ref_model", True):
            raise ValueError(
                f"sync_ref_model is True, and {checkpoint} holds no reference model (with DeepSpeed and FSDP none is "
                "saved): it would be the model that the run began with again. Set it to False, or start a new run "
                f"from the checkpoint (model_name_or_path: {checkpoint}), in another output_dir."
            )

    def _enter_folder(self, old_id: str | None = None, step: int = 0) -> None:
        """Make the output folder that of the run, which is new or goes on from `step` of the run `old_id`."""
        self.saved_step = step
        (self.run_id,) = broadcast_object_list([old_id or uuid.uuid4().hex])
        if self.trainer.args.should_save:
            moved = enter_folder(self.trainer.args.output_dir, self.run_id, old_id, step)
            if moved is not None:
                logger.warning(
                    f"output_dir held another run, or later steps of this one. They are in {moved} now: delete it if "
                    "nobody needs it."
                )

    def save(self, folder: str) -> None:
        """Write the run's own part of a checkpoint: of each process what it alone has, of one what all share."""
        trainer = self.trainer
        self.saved_step = trainer.state.global_step
        if trainer.window_step != 0:
            name = PROCESS_STATE_FILE.format(process_index=trainer.accelerator.process_index)
            state = {name: part.state_to_save() for name, part in self.parts_of_process.items()}
            checkpoints.save_state(Path(folder) / name, state)
        if trainer.args.should_save:
            keep_order(Path(folder).parent)
            if self._keeps_reference():
                Path(folder).mkdir(parents=True, exist_ok=True)
                reference = trainer.accelerator.unwrap_model(trainer.ref_model)
                safetensors.torch.save_model(reference, Path(folder) / REFERENCE_FILE)
            state = {
                "run_id": self.run_id,
                "dataset": self.dataset_id,
                "settings": self._settings_to_save(),
                "num_processes": trainer.accelerator.num_processes,
                "num_generation_batches": trainer.num_generation_batches,
                "window_step": trainer.window_step,
                "parts": {name: part.state_to_save() for name, part in self.parts.items()},
            }
            checkpoints.save_state(Path(folder) / STATE_FILE, state)

    @contextmanager
    def saved_if_it_cannot_go_on(self) -> Iterator[None]:
        """Inside, [`RunCannotGoOn`] loses nothing: the run can go on from its last optimizer step."""
        trainer = self.trainer
        try:
            yield
        except RunCannotGoOn as error:
            if self.saved_step != trainer.state.global_step and not trainer.inside_optimizer_step:
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
            if self.saved_step > 0:
                saved = (
                    f"With resume_from_checkpoint set to true it goes on after step {self.saved_step}, which is saved."
                )
                error.args = (f"{error} {saved}",)
            raise


@contextmanager
def whole_weights(trainer) -> Iterator[None]:
    """
    Inside, FSDP saves a model as [`~transformers.PreTrainedModel.from_pretrained`] reads it: with `SHARDED_STATE_DICT`
    transformers writes none at all, not even at the end of a run. What a checkpoint goes on from stays in shards.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before


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
        whole = complete_checkpoints(Path(folder).parent)
        if folder not in whole:  # it can be whole where a copy of it could not be written
            shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(
            f"There is no room for {folder}: {error}. Make some (save_total_limit: 2 keeps the last two checkpoints), "
            "then run the same command "
            + (f"with resume_from_checkpoint set to true: it goes on from {whole[0]}." if whole else "again.")
        ) from error
