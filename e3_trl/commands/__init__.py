"""What each `e3-trl <command>` does, a module each."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml


@contextmanager
def mistakes_named(has_begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """
    Inside, what a user got wrong (a setting, a file, a name on the Hub) ends the process with its message alone. With
    `E3_TRACEBACK=1` in the environment the traceback is shown.

    Args:
        has_begun (`Callable`, *optional*):
            Whether that is behind us: errors of a training that is under way can be anybody's.
    """
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        if has_begun() or os.environ.get("E3_TRACEBACK", "0") != "0":
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(E3_TRACEBACK=1 shows where.)")
