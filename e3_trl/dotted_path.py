"""A user's own functions, which a recipe names by their dotted path."""

import importlib
import os
import sys


def load(path: str):
    """
    What `path`, such as `my_package.rewards.my_reward`, names; looked up from the current folder too.

    Raises:
        `ImportError`, `AttributeError` or `ValueError`: if it names nothing.
    """
    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), attribute)
