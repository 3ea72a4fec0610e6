"""
A run's folder: the names of all files in it, how one is written, and which of them are whose.

`run.json` has the id of the run whose files lie in the folder. What is left of another run, or of steps that a run
goes back behind, moves to `_earlier/<number>` when the run begins.
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


RUN_FILE = "run.json"
ROLLOUTS_FILE = "rollouts.jsonl"
ARGS_FILE = "training_args.json"
REPORT_FILE = "report.json"
FIGURES = "figures"
# It can hold what the data and the model say, so it is no part of what is published.
PAGE_FILE = "report.html"
# transformers pushes nothing whose name begins so.
EARLIER = "_earlier"
LOCK_FILE = "_run.lock"
# As in transformers, whose modules take seconds to import: who draws a run need not wait for a trainer.
PREFIX_CHECKPOINT_DIR = "checkpoint"
TRAINER_STATE_NAME = "trainer_state.json"
SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
# What loads a model, and what says of a run what it was. Whatever else lies in the folder is nobody else's business.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "adapter_*", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json",
    "chat_template.*", "additional_chat_templates/*.jinja", "processor_config.json", "preprocessor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
ACCOUNT_FILES = ("README.md", ARGS_FILE, REPORT_FILE, TRAINER_STATE_NAME, ROLLOUTS_FILE, f"{FIGURES}/*")
# Of TRL's `log_completions`: what the data and the model say.
COMPLETION_FILES = ("completions/completions_*[0-9].parquet",)
# Of a checkpoint: what all processes share, and what each has. JSON, and beside it the arrays of it.
STATE_FILE = "run_state.json"
REFERENCE_FILE = "ref_model.safetensors"  # of `sync_ref_model`
PROCESS_STATE_FILE = "run_state_of_process_{process_index}.json"


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def files_of(folder: str | Path, patterns: Iterable[str]) -> list[str]:
    """The files in `folder` that match one of the patterns, by their paths in it."""
    found = (path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file())
    return sorted({path.relative_to(folder).as_posix() for path in found})


def to_json(content, **kwargs) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(content, indent=2, **kwargs) + "\n").encode()


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
        for folder in checkpoints(output_dir)
        if is_complete(folder) and (owner is None or run_id(folder) in (owner, None))
    ]
    return [str(folder) for folder in sorted(folders, key=checkpoint_step, reverse=True)]


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
    Make `output_dir` the folder of one run. What another run has left, its model and card too, and checkpoints and log
    of later steps than the run goes on from, move to a folder in `_earlier/`: nobody would go on from them, draw them,
    take the one's model for the other's or delete them (for `save_total_limit`) by mistake. Of the run's own
    rollouts those of later steps are cut, for they come again.

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
        for folder in checkpoints(output_dir)
        if is_new or checkpoint_step(folder) > step or run_id(folder) not in (old_id, None)
    ]
    if is_new or run_id(output_dir) not in (None, old_id):
        # Where no run has been, a model was put there by somebody.
        names = (ROLLOUTS_FILE, TRAINER_STATE_NAME)
        if run_id(output_dir) is not None:
            names = (*MODEL_FILES, *ACCOUNT_FILES, *COMPLETION_FILES, PAGE_FILE)
        foreign += [output_dir / name for name in files_of(output_dir, names)]
    else:
        if (path := output_dir / TRAINER_STATE_NAME).exists() and not 0 <= _global_step(path) <= step:
            foreign.append(path)
        if (path := output_dir / ROLLOUTS_FILE).exists():
            os.truncate(path, end_of_step(path, step))
        completions = [output_dir / name for name in files_of(output_dir, COMPLETION_FILES)]
        foreign += [path for path in completions if step_of_completions(path) > step]
    folder = None
    if foreign:
        taken = [int(path.name) for path in (output_dir / EARLIER).glob("*") if path.name.isdigit()]
        folder = output_dir / EARLIER / str(max(taken, default=0) + 1)
        folder.mkdir(parents=True)
        for path in foreign:
            target = folder / path.relative_to(output_dir)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
    write_whole(output_dir / RUN_FILE, to_json({"run_id": new_id}))
    return folder


def step_of_completions(path: Path) -> int:
    """Optimizer step after which TRL wrote a file of completions."""
    return int(path.stem.split("_")[-1])


def end_of_step(path: Path, step: int) -> int:
    """Where the last whole row of `step`, or of one before it, ends, in bytes. Rows lie in the order of steps."""
    kept, dropped = 0, path.stat().st_size  # what lies before, and behind
    with open(path, "rb") as file:
        while kept < dropped:
            middle = (kept + dropped) // 2
            file.seek(max(middle - 1, 0))
            if middle > 0:
                file.readline()  # to where the next row begins, which may be in the middle
            start, row = file.tell(), file.readline()
            if start < dropped and row.endswith(b"\n") and json.loads(row)["step"] <= step:
                kept = file.tell()
            else:
                dropped = middle
    return kept


def checkpoints(output_dir: str | Path) -> list[Path]:
    """What transformers takes for checkpoints: a user's `checkpoint-best` is none."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [folder for folder in folders if folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()]


def keep_order(output_dir: str | Path) -> None:
    """
    Let checkpoints of earlier steps look older than what is written now. `save_total_limit` deletes by the folders'
    times, and after the clock went back, or a copy changed them, it would delete the newest.
    """
    latest = time.time()
    for folder in sorted(checkpoints(output_dir), key=checkpoint_step, reverse=True):
        with suppress(OSError):  # not everyone who may write to a folder may set its time
            if folder.stat().st_mtime > latest - 1:
                os.utime(folder, (latest - 1, latest - 1))
            latest = folder.stat().st_mtime


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint is after."""
    return int(checkpoint.name.split("-")[-1])


def _global_step(path: Path) -> int:
    """Step of a `trainer_state.json`, -1 if a kill has left half of one."""
    try:
        return json.loads(path.read_text())["global_step"]
    except ValueError:
        return -1
