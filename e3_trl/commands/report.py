"""
Write one HTML page of runs, to look at and to send: what happened, figures, settings that differ, and every prompt
with its rollouts and, where `log_completions` kept them, completions. It holds what the data and the model say.

    e3-trl report outputs/e3 outputs/grpo [--output outputs/report.html]
"""

import argparse

from ..runs.page import write_page
from . import mistakes_named


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or reports of `e3-trl evaluate`")
    parser.add_argument("--output", default="outputs/report.html", help="the file to write (outputs/report.html)")
    args = parser.parse_args(arguments)
    print(f"Written: {write_page(args.runs, args.output)}")


def run(arguments: list[str] | None = None) -> None:
    with mistakes_named():
        main(arguments)
