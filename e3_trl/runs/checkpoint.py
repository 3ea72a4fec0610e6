"""
The part of a checkpoint that is E3's: JSON and safetensors, never pickle. And which checkpoints are whose.

- `e3_state.json`: the run's id, the dataset's fingerprint, the sampler's place, the bounds in force, the temperature
  schedule, checksums
- `e3_difficulty.safetensors`: rollouts, rewards and rank in force of each prompt
- `e3_generation_window_<process>.safetensors`: the completions still to be trained on, if the checkpoint lies inside a
  generation window

The run's folder has `run.json` with the id of the run whose files lie in it. What is left of another run, or of steps
that a run goes back behind, moves to `_earlier/<number>` when the run begins.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from ..rollouts.telemetry import FILE_NAME as ROLLOUTS_FILE


if TYPE_CHECKING:
    from datasets import Dataset

# As in transformers, whose modules take seconds to import: who draws a run need not wait for a trainer.
PREFIX_CHECKPOINT_DIR = "checkpoint"
SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
TRAINER_STATE_NAME = "trainer_state.json"
STATE_FILE = "e3_state.json"
DIFFICULTY_FILE = "e3_difficulty.safetensors"
WINDOW_FILE = "e3_generation_window_{process_index}.safetensors"
RUN_FILE = "run.json"
EARLIER = "_earlier"  # transformers pushes no folder whose name begins so


def dataset_fingerprint(dataset: "Dataset") -> str:
    """
    SHA-256 of the prompts in their order: the ids under which difficulty is kept mean nothing with others. Of the data
    as they are stored: no transform is called, no image decoded, and another process finds the same.
    """
    digest = hashlib.sha256()
    columns = ["prompt"] if "prompt" in dataset.column_names else dataset.column_names
    for batch in dataset.with_format("arrow").select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch.to_pydict(), default=_stored).encode())
    return digest.hexdigest()


def _stored(value) -> str:
    return _sha256(value) if isinstance(value, bytes) else str(value)


def complete_checkpoints(output_dir: str | Path) -> list[str]:
    """
    Checkpoints in `output_dir` that were written to their end, and by the run whose folder it is, newest first. A kill
    can leave one unfinished.
    """

    def is_complete(folder: Path) -> bool:
        try:
            # The last file that transformers writes.
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            return False
        return True

    owner = run_id(output_dir)
    folders = [
        folder
        for folder in _checkpoints(output_dir)
        if is_complete(folder) and (owner is None or run_id(folder) in (owner, None))
    ]
    return [str(folder) for folder in sorted(folders, key=_step, reverse=True)]


def last_sound_checkpoint(output_dir: str | Path) -> tuple[str | None, dict[str, str]]:
    """
    Newest of the [`complete_checkpoints`] whose files are whole, as far as can be told without reading all of them;
    `None` without one. And what is wrong with each newer one: a disk can lose what was written.
    """
    damaged = {}
    for folder in complete_checkpoints(output_dir):
        try:
            _check_files(Path(folder))
        except (OSError, ValueError) as error:
            damaged[folder] = str(error)
        else:
            return folder, damaged
    return None, damaged


def _check_files(folder: Path) -> None:
    """Raise `ValueError` if E3's state is not what was saved, or a file of tensors, or of torch's, is cut."""
    load_state(folder, {})
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise _damaged(path, str(error)) from error
    for path in sorted([*folder.rglob("*.pt"), *folder.rglob("*.pth")]):  # torch's files are zip archives
        if not zipfile.is_zipfile(path):
            raise _damaged(path, "it is cut")


def check_weights(folder: str | Path, names: set[str]) -> None:
    """
    Raise `ValueError` if the weights in the checkpoint `folder` have none of the model's `names`. transformers saves
    some models (LLaVA and others with images) under the names of older versions, and its Trainer, which loads them by
    name, then goes on with the weights that the run began with.
    """
    path = Path(folder) / SAFE_WEIGHTS_NAME
    index = Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if path.exists():
        with safetensors.safe_open(path, framework="pt") as file:
            saved = set(file.keys())
    elif index.exists():
        saved = set(json.loads(index.read_text())["weight_map"])
    else:
        return  # an adapter, or DeepSpeed's own format
    if not saved & names:
        raise ValueError(
            f"{folder} holds weights by other names than the model's, such as {min(saved)!r}: transformers saves this "
            "model under older names, and cannot resume it. Start a new run from the checkpoint (model_name_or_path: "
            f"{folder}), in another output_dir."
        )


def run_id(folder: str | Path) -> str | None:
    """Id of the run that a checkpoint is of, or whose output folder this is; `None` if it says nothing of it."""
    for name, keys in ((STATE_FILE, ("state", "run_id")), (RUN_FILE, ("run_id",))):
        try:
            value = json.loads((Path(folder) / name).read_text())
            for key in keys:
                value = value[key]
            return value
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None


def enter_folder(output_dir: str | Path, new_id: str, old_id: str | None = None, step: int = 0) -> Path | None:
    """
    Make `output_dir` the folder of one run. Checkpoints, rollouts and log of another run, or of later steps than the
    run goes on from, move to a folder in `_earlier/`: nobody would go on from them, draw them or delete them (for
    `save_total_limit`) by mistake. Models stay where they are.

    Args:
        output_dir (`str` or `Path`): the run's output folder.
        new_id (`str`): the run's id.
        old_id (`str`, *optional*): the id in the checkpoint that it goes on from.
        step (`int`): step of that checkpoint, 0 = a new run.

    Returns:
        The folder that they moved to, or `None` if there were none.
    """
    output_dir = Path(output_dir)
    is_new = step == 0
    foreign = [
        folder
        for folder in _checkpoints(output_dir)
        if is_new or _step(folder) > step or run_id(folder) not in (old_id, None)
    ]
    if is_new or run_id(output_dir) not in (None, old_id):
        foreign += [path for name in (ROLLOUTS_FILE, TRAINER_STATE_NAME) if (path := output_dir / name).exists()]
    elif (path := output_dir / TRAINER_STATE_NAME).exists() and not 0 <= _global_step(path) <= step:
        foreign.append(path)
    folder = None
    if foreign:
        taken = [int(path.name) for path in (output_dir / EARLIER).glob("*") if path.name.isdigit()]
        folder = output_dir / EARLIER / str(max(taken, default=0) + 1)
        folder.mkdir(parents=True)
        for path in foreign:
            path.replace(folder / path.name)
    _write(output_dir / RUN_FILE, _encode({"run_id": new_id}))
    return folder


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """What transformers takes for checkpoints: a user's `checkpoint-best` is none."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [folder for folder in folders if folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()]


def keep_order(output_dir: str | Path) -> None:
    """
    Let checkpoints of earlier steps look older than what is written now. `save_total_limit` deletes by the folders'
    times, and after the clock went back, or a copy changed them, it would delete the newest.
    """
    latest = time.time()
    for folder in sorted(_checkpoints(output_dir), key=_step, reverse=True):
        with suppress(OSError):  # not everyone who may write to a folder may set its time
            if folder.stat().st_mtime > latest - 1:
                os.utime(folder, (latest - 1, latest - 1))
            latest = folder.stat().st_mtime


def _global_step(path: Path) -> int:
    """Step of a `trainer_state.json`, -1 if a kill has left half of one."""
    try:
        return json.loads(path.read_text())["global_step"]
    except ValueError:
        return -1


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def save_state(folder: str | Path, state: dict, difficulty: dict[str, np.ndarray]) -> None:
    """Write `state` (JSON) and the difficulty tracker's arrays to the checkpoint `folder`."""
    folder = Path(folder)
    data = safetensors.numpy.save(difficulty)
    sha256 = {"state": _sha256(_encode(state)), "difficulty": _sha256(data)}
    _write(folder / DIFFICULTY_FILE, data)
    _write(folder / STATE_FILE, _encode({"state": state, "sha256": sha256}))


def is_resharded(folder: str | Path, num_processes: int, deepspeed: bool) -> bool:
    """
    Whether the checkpoint is resumed by another number of processes than saved it, from DeepSpeed's universal format.

    Args:
        folder (`str` or `Path`): the checkpoint. One without E3 state is left to TRL.
        num_processes (`int`): processes of the run that goes on.
        deepspeed (`bool`): whether DeepSpeed is used, which saves the optimizer in one piece per process.

    Raises:
        `ValueError`: if these processes cannot resume it; it says how they can.
    """
    folder = Path(folder)
    if not deepspeed and (folder / "latest").exists():
        raise ValueError(
            f"{folder} was saved with DeepSpeed, and this run is without it: the optimizer's state would be lost. "
            "Resume with the accelerate configuration that the run began with."
        )
    try:
        state = json.loads((folder / STATE_FILE).read_text())["state"]
        saved, window_step = state["num_processes"], state["window_step"]
    except (OSError, ValueError, TypeError, KeyError):
        return False  # missing, or damaged, which `load_state` says
    if saved == num_processes:
        return False
    if window_step != 0:
        raise ValueError(
            f"{folder} lies inside a generation window, whose completions {saved} processes hold; this run has "
            f"{num_processes}. Resume with {saved} processes, or from a checkpoint whose step is a multiple of the "
            "optimizer steps of a generation batch."
        )
    if deepspeed and not (folder / "latest_universal").exists():
        tag = folder / f"global_step{_step(folder)}"
        raise ValueError(
            f"{folder} was saved by {saved} processes with DeepSpeed; this run has {num_processes}. Convert it with "
            f"`python -m deepspeed.checkpoint.ds_to_universal --input_folder {tag} --output_folder {tag}_universal`, "
            "then run the same command again."
        )
    return deepspeed


def load_state(folder: str | Path, dataset: dict) -> tuple[dict, dict[str, np.ndarray]] | None:
    """
    Read what [`save_state`] wrote.

    Args:
        folder (`str` or `Path`): the checkpoint.
        dataset (`dict`):
            `num_prompts` and `fingerprint` of the dataset that the run goes on with. Empty for a stream.

    Returns:
        The state and the arrays, or `None` if the checkpoint holds no E3 state.

    Raises:
        `ValueError`: if a file is damaged or missing, or the state belongs to another dataset; it says which.
    """
    path = Path(folder) / STATE_FILE
    if not path.exists():
        if any(path.parent.glob("e3_*.safetensors")):
            raise _damaged(path, "the file is missing")
        return None
    try:
        saved = json.loads(path.read_text())
        state, sha256 = saved["state"], saved["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, repr(error)) from error
    if _sha256(_encode(state)) != sha256["state"]:
        raise _damaged(path, "its checksum is not the one that was saved")
    for name, value in dataset.items():
        if state["dataset"].get(name) != value:
            raise ValueError(
                f"{path} belongs to another dataset: its {name} is {state['dataset'].get(name)}, this run's {value}. "
                "Resume with the dataset that the run began with, or start a new run."
            )
    path = Path(folder) / DIFFICULTY_FILE
    if not path.exists():
        raise _damaged(path, "the file is missing")
    data = path.read_bytes()
    if _sha256(data) != sha256["difficulty"]:
        raise _damaged(path, "its checksum is not the one that was saved")
    return state, safetensors.numpy.load(data)


def check_settings(folder: str | Path, saved: dict, settings: dict) -> None:
    """Raise `ValueError` if a setting that a run cannot change on its way was another one when it was saved."""
    for name, value in settings.items():
        before = saved.get(name, value)
        if before != value:
            raise ValueError(
                f"{name} is {value}, and was {before} when {folder} was saved: which prompts come when, or what has "
                f"been counted of them, would no longer be right. Set it to {before}, or start a new run."
            )


def save_window(folder: str | Path, process_index: int, window: list[dict]) -> None:
    """
    Write this process's buffered micro-batches to the checkpoint `folder`: tensors, numbers, lists of integers, and
    the rows of each that are left out, a dict of the same kind.
    """
    tensors, lists = {}, {}
    for index, batch in enumerate(window):
        for name, value in _flattened(batch):
            if isinstance(value, torch.Tensor):
                # Slices of one generation batch share memory, which safetensors refuses.
                tensors[f"{index}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            elif value is not None:
                lists[f"{index}.{name}"] = value
    metadata = {"num_batches": str(len(window)), "lists": json.dumps(lists)}
    metadata["sha256"] = _sha256(safetensors.torch.save(tensors) + metadata["lists"].encode())
    data = safetensors.torch.save(tensors, metadata)
    _write(Path(folder) / WINDOW_FILE.format(process_index=process_index), data)


def load_window(folder: str | Path, process_index: int, device: torch.device) -> list[dict]:
    """Read what [`save_window`] wrote; `ValueError` if it is damaged or missing."""
    path = Path(folder) / WINDOW_FILE.format(process_index=process_index)
    if not path.exists():
        raise _damaged(path, "the file is missing")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        window = [{} for _ in range(int(metadata["num_batches"]))]
        lists = json.loads(metadata["lists"])
        if metadata["sha256"] != _sha256(safetensors.torch.save(tensors) + metadata["lists"].encode()):
            raise ValueError("its checksum is not the one that was saved")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    for key, value in ({name: tensor.to(device) for name, tensor in tensors.items()} | lists).items():
        index, *folders, name = key.split(".")
        batch = window[int(index)]
        for part in folders:
            batch = batch.setdefault(part, {})
        batch[name] = value
    return window


def _flattened(batch: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in batch.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _encode(state: dict) -> bytes:
    return (json.dumps(state, indent=2) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}). Resume from an earlier checkpoint, or start a new run.")
