"""The run's own part of a checkpoint: JSON and safetensors, never pickle, with checksums."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch

from .run_folder import (
    PROCESS_STATE_FILE,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    STATE_FILE,
    checkpoint_step,
    complete_checkpoints,
    to_json,
    write_whole,
)


if TYPE_CHECKING:
    from datasets import Dataset


def dataset_fingerprint(dataset: "Dataset") -> str:
    """
    SHA-256 of the prompts in their order: what is kept of them by their index means nothing with others. Of the data
    as they are stored: no transform is called, no image decoded, and another process finds the same.
    """
    digest = hashlib.sha256()
    columns = ["prompt"] if "prompt" in dataset.column_names else dataset.column_names
    for batch in dataset.with_format("arrow").select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch.to_pydict(), default=_stored).encode())
    return digest.hexdigest()


def _stored(value) -> str:
    return _sha256(value) if isinstance(value, bytes) else str(value)


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
    """Raise `ValueError` if the run's state is not what was saved, or a file of tensors, or of torch's, is cut."""
    for path in (folder / STATE_FILE, *sorted(folder.glob(PROCESS_STATE_FILE.format(process_index="*")))):
        load_state(path)
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


def check_optimizer(folder: str | Path) -> None:
    """
    Raise `ValueError` if the checkpoint holds a model alone (`save_only_model`): transformers then begins optimizer
    and learning rate anew, without a word.
    """
    folder = Path(folder)
    if folder.is_dir() and not (any(folder.glob("*optimizer*")) and (folder / "scheduler.pt").exists()):
        raise ValueError(
            f"{folder} holds a model without its optimizer and learning-rate schedule, as save_only_model leaves it: "
            f"the run would not go on where it was. Start a new run from it (model_name_or_path: {folder}), in "
            "another output_dir."
        )


def is_resharded(folder: str | Path, num_processes: int, deepspeed: bool) -> bool:
    """
    Whether the checkpoint is resumed by another number of processes than saved it, from DeepSpeed's universal format.

    Args:
        folder (`str` or `Path`): the checkpoint. One without a run's state is left to TRL.
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
        tag = folder / f"global_step{checkpoint_step(folder)}"
        raise ValueError(
            f"{folder} was saved by {saved} processes with DeepSpeed; this run has {num_processes}. Convert it with "
            f"`python -m deepspeed.checkpoint.ds_to_universal --input_folder {tag} --output_folder {tag}_universal`, "
            "then run the same command again."
        )
    return deepspeed


def save_state(path: str | Path, state: dict) -> None:
    """
    Write a state to `path`, a JSON file, and its arrays to a file beside it, `.safetensors`.

    Args:
        path (`str` or `Path`): where to.
        state (`dict`): numbers, texts, arrays and tensors, in dicts and lists.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    data = safetensors.torch.save(tensors) if tensors else b""
    if tensors:
        write_whole(path.with_suffix(".safetensors"), data)
    sha256 = {"state": _sha256(to_json(plain)), "arrays": _sha256(data)}
    write_whole(path, to_json({"state": plain, "sha256": sha256}))


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value with the name of each array in its place, which goes to `tensors`."""
    if isinstance(value, dict):
        return {key: _without_tensors(entry, f"{name}.{key}", tensors) for key, entry in value.items()}
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return [_without_tensors(entry, f"{name}.{index}", tensors) for index, entry in enumerate(value)]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        # Slices of one generation batch share memory, which safetensors refuses.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_ARRAY: name}
    return value


_ARRAY = "array"


def load_state(path: str | Path, device: torch.device | None = None) -> dict | None:
    """
    Read what [`save_state`] wrote.

    Args:
        path (`str` or `Path`): the JSON file.
        device (`torch.device`, *optional*): where its arrays go to, as tensors. `None` = they are NumPy's.

    Returns:
        `dict`: the state, or `None` if there is none.

    Raises:
        `ValueError`: if a file is damaged or missing; it says which.
    """
    path = Path(path)
    arrays = path.with_suffix(".safetensors")
    if not path.exists():
        if arrays.exists():
            raise _damaged(path, "the file is missing")
        return None
    try:
        saved = json.loads(path.read_text())
        state, sha256 = saved["state"], saved["sha256"]
        if _sha256(to_json(state)) != sha256["state"]:
            raise ValueError("its checksum is not the one that was saved")
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    data = b""
    if sha256["arrays"] != _sha256(data):
        if not arrays.exists():
            raise _damaged(arrays, "the file is missing")
        data = arrays.read_bytes()
        if _sha256(data) != sha256["arrays"]:
            raise _damaged(arrays, "its checksum is not the one that was saved")
    tensors = safetensors.torch.load(data) if data else {}
    convert = torch.Tensor.numpy if device is None else lambda tensor: tensor.to(device)
    return _with_tensors(state, {name: convert(tensor) for name, tensor in tensors.items()})


def _with_tensors(value: Any, tensors: dict) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return tensors[value[_ARRAY]]
        return {key: _with_tensors(entry, tensors) for key, entry in value.items()}
    return [_with_tensors(entry, tensors) for entry in value] if isinstance(value, list) else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}). Resume from an earlier checkpoint, or start a new run.")
