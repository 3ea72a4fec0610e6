"""A case of a part in a process of its own: `python -m benchmarks.gpu.case MODULE '{"name": ...}'`."""

import importlib
import json
import logging
import sys

from .report import Case


def main(module: str, settings: str) -> None:
    logging.getLogger("e3_trl").setLevel(logging.ERROR)  # of turns that are new runs in the folder of the last
    importlib.import_module(module).measure(Case(**json.loads(settings)))


if __name__ == "__main__":
    main(*sys.argv[1:])
