"""What `e3-trl <command>` and the scripts of `recipes/` do, a module each."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mistakes_named() -> Iterator[None]:
    """
    Inside, what a user got wrong (a setting, a file, a name on the Hub) ends the process with its message alone. With
    `E3_TRACEBACK=1` in the environment the traceback is shown.
    """
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        if os.environ.get("E3_TRACEBACK", "0") != "0":
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(E3_TRACEBACK=1 shows where.)")
