"""`e3-trl <command>`, wherever the package is installed."""

import importlib
import sys

from . import __version__


# What each does. `run` of the module in `commands` that has its name takes the arguments.
COMMANDS = {
    "train": "train a model with E3, or with a baseline",
    "evaluate": "pass@1 and pass@k of models on benchmarks",
    "prepare-data": "make training data, with difficulties, from raw problems",
    "plot": "draw the figures of runs",
    "report": "one HTML page of runs: figures, settings, prompts, completions",
    "push": "upload a finished run to the Hub",
    "replay": "what other budget rules would have given on a finished run",
    "memory": "GPU memory that a recipe needs, on paper",
}
# Packages that come with an extra of setup.cfg.
EXTRAS = {"deepspeed": "deepspeed", "itables": "figures", "matplotlib": "figures", "rich": "figures"}


def usage() -> str:
    lines = [f"e3-trl {__version__}", "", "usage: e3-trl <command> ...   (e3-trl <command> --help says more)", ""]
    return "\n".join([*lines, *(f"  {name:13} {text}" for name, text in COMMANDS.items())])


def main(arguments: list[str] | None = None) -> None:
    """
    Run a command.

    Args:
        arguments (`list[str]`, *optional*): the command and its arguments. `None` = those of the process.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(usage())
    elif command == "--version":
        print(__version__)
    elif command not in COMMANDS:
        sys.exit(f"There is no command {command!r}.\n\n{usage()}")
    else:
        try:
            module = importlib.import_module(f".commands.{command.replace('-', '_')}", __package__)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            sys.exit(f"e3-trl {command} needs {error.name}. `pip install 'e3-trl[{EXTRAS[error.name]}]'` brings it.")
        sys.argv = [f"e3-trl {command}", *rest]  # what --help shows
        module.run(rest)


if __name__ == "__main__":
    main()
