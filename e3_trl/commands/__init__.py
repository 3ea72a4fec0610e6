"""What each `e3-trl <command>` does, a module each."""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import yaml


# Seconds in which a launcher has ended the other ranks when one has failed. On a busy machine one rank comes to it ten
# seconds before another.
LAUNCHER_ENDS_OTHERS = 20.0


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


def read_config(arguments: list[str] | None) -> tuple[object, list[str]]:
    """What the YAML file that `--config` names holds, `{}` if it names none, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    own, rest = parser.parse_known_args(arguments)
    if own.config is None:
        return {}, rest
    with open(own.config) as file:  # whose name is in the message if it is no YAML
        return yaml.safe_load(file), rest


def parse_settings(parser, arguments: list[str] | None, of: str, elsewhere: dict[str, str] | None = None) -> tuple:
    """
    What `parser.parse_args_and_config` returns.

    Args:
        parser (`TrlParser`): of the settings.
        arguments (`list[str]`, *optional*): of the command. `None` = those of the process.
        of (`str`): what the settings are of, for messages.
        elsewhere (`dict[str, str]`, *optional*): settings of something else, and what to do about each.

    Raises:
        `ValueError`: if the configuration or the command line has a name that is no setting, with what may be meant.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, rest = read_config(arguments)
    known = [field.name for owner in parser.dataclass_types for field in fields(owner) if field.init]
    named = list(settings) if isinstance(settings, dict) else []  # if not, the parser says so
    named += [one.partition("=")[0] for one in parser.parse_known_args(rest)[1] if one.startswith("--")]
    unknown = [str(name).removeprefix("--") for name in named if name not in (*known, "env")]
    if unknown:
        remedies = {name: (elsewhere or {}).get(name) or _nearest(name, known) for name in unknown}
        raise ValueError(" ".join(f"{name} is not a setting of {of}. {what}" for name, what in remedies.items()))
    return parser.parse_args_and_config(arguments)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"Did you mean {near[0]}?" if near else "Leave it out; --help lists those that there are."
