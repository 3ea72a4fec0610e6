"""What each `e3-trl <command>` does, a module each."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml


# Seconds in which a launcher has ended the other ranks when one has failed.
LAUNCHER_ENDS_OTHERS = 5.0


@contextmanager
def mistakes_named(has_begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """
    Inside, what a user got wrong (a setting, a file, a name on the Hub) ends the process with its message alone. With
    `E3_TRACEBACK=1` in the environment the traceback is shown. Of several ranks the first says it; another waits until
    the launcher ends it, and says what it alone has met.

    Args:
        has_begun (`Callable`, *optional*):
            Whether that is behind us: errors of a training that is under way can be anybody's.
    """
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        if has_begun() or os.environ.get("E3_TRACEBACK", "0") != "0":
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:  # one after the other, if rank 0 has nothing to say
            time.sleep(LAUNCHER_ENDS_OTHERS + int(os.environ.get("LOCAL_RANK", 0)))
        of_rank = f"Rank {rank}: " if rank > 0 else ""
        sys.exit(f"{of_rank}{type(error).__name__}: {error}\n(E3_TRACEBACK=1 shows where.)")
