"""
The part of a checkpoint that is E3's: JSON and safetensors, never pickle.

- `e3_state.json`: the dataset's fingerprint, the sampler's place, the bounds in force, the temperature schedule,
  checksums
- `e3_difficulty.safetensors`: rollouts, rewards and rank in force of each prompt
- `e3_generation_window_<process>.safetensors`: the completions still to be trained on, if the checkpoint lies inside a
  generation window
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_FILE = "e3_state.json"
DIFFICULTY_FILE = "e3_difficulty.safetensors"
WINDOW_FILE = "e3_generation_window_{process_index}.safetensors"


def dataset_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the prompts in their order: the ids under which difficulty is kept mean nothing with others."""
    digest = hashlib.sha256()
    columns = ["prompt"] if "prompt" in dataset.column_names else dataset.column_names
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch, default=repr).encode())
    return digest.hexdigest()


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Newest checkpoint in `output_dir` that was written to its end, or `None`: a kill can leave one unfinished."""

    def is_complete(folder: Path) -> bool:
        try:
            # The last file that transformers writes.
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            return False
        return True

    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_complete(folder)]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[-1]))) if folders else None


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
        tag = folder / f"global_step{folder.name.split('-')[-1]}"
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


def save_window(folder: str | Path, process_index: int, window: list[dict]) -> None:
    """Write this process's buffered micro-batches (tensors, or lists of integers) to the checkpoint `folder`."""
    tensors, lists = {}, {}
    for index, batch in enumerate(window):
        for name, value in batch.items():
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
        index, name = key.split(".", 1)
        window[int(index)][name] = value
    return window


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
