"""A case of a part in a process of its own: `python -m benchmarks.gpu.case PART '{"name": ...}'`."""

import importlib
import json
import logging
import sys

from .report import Case


def main(part: str, settings: str) -> None:
    logging.getLogger("e3_trl").setLevel(logging.ERROR)  # of turns that are new runs in the folder of the last
    module = importlib.import_module(f"benchmarks.gpu.{part}")
    module.measure(Case(**json.loads(settings)))


if __name__ == "__main__":
    main(*sys.argv[1:])
