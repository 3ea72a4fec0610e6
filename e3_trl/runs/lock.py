"""A run's folder belongs to one living run: a lock that the kernel releases when the process that holds it dies."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from .run_folder import LOCK_FILE


logger = get_logger(__name__)
# What file systems without locks answer (some network ones do).
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def held(folder: str | Path, is_main: bool) -> Iterator[None]:
    """
    Inside, the folder is this run's. Where the file system knows no locks, this is said, and the run goes on.

    Args:
        folder (`str` or `Path`): the run's output folder.
        is_main (`bool`): whether this process takes the lock, which one does for all.

    Raises:
        `ValueError`: on all processes together, if another run holds it; it names host and process.
    """
    file, refused = _take(Path(folder)) if is_main else (None, None)
    try:
        (refused,) = broadcast_object_list([refused])
        if refused is not None:
            raise ValueError(refused)
        yield
    finally:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: workers of the data loader have it open too
            os.close(file)


def _take(folder: Path) -> tuple[int | None, str | None]:
    """The open file that holds the lock, and why there is none if somebody else has it."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not deleted at the end: a run that has just opened it would hold a file that the next one does not see.
    file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(file, 1000).decode(errors="replace")
        os.close(file)
        if error.errno in _CANNOT_LOCK:
            logger.warning(f"{folder} cannot be locked ({error}). See to it that no other run writes to it.")
            return None, None
        if not isinstance(error, BlockingIOError):
            raise
        return None, (
            f"output_dir is {folder}, and another run is going on there: {_who(holder)}. Wait until it has ended, end "
            "it, or set another output_dir."
        )
    os.truncate(file, 0)
    os.write(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    return file, None


def _who(holder: str) -> str:
    try:
        of = json.loads(holder)
        return f"process {of['pid']} on {of['host']}"
    except (ValueError, TypeError, KeyError):  # it is just being written
        return "a process that has just begun"
