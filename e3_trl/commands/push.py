"""
Upload a finished run to the Hub, or complete an upload that failed.

    e3-trl push outputs/e3 [my-name/my-model] [--evaluation outputs/evaluation] [--completions]
"""

import argparse
import sys
from pathlib import Path

from ..runs.publishing import HubError, publish
from ..runs.report import read_report, read_settings, write_json
from ..runs.run_folder import REPORT_FILE


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the run's output_dir")
    parser.add_argument(
        "repo", nargs="?", help="name of the model repository (hub_model_id of the run, or the folder's name)"
    )
    parser.add_argument("--evaluation", help="output_dir of `e3-trl evaluate`, for report.json and the card")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--completions", action="store_true", help="send completions/*.parquet too")
    return parser


def run(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    settings = read_settings(args.folder) or {}
    repo = args.repo or settings.get("hub_model_id") or Path(args.folder).resolve().name
    try:
        if args.evaluation:
            results = read_report(args.evaluation).get("benchmarks")
            if not results:
                raise ValueError(f"--evaluation is {args.evaluation}, which holds no report.json with benchmarks.")
            write_json(Path(args.folder) / REPORT_FILE, {**read_report(args.folder), "benchmarks": results})
        print(f"Uploaded: {publish(args.folder, repo, private=args.private, completions=args.completions)}")
    except (HubError, ValueError) as error:
        sys.exit(str(error))
