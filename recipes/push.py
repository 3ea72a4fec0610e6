"""
Upload a finished run to the Hub, or complete an upload that failed.

    python recipes/push.py outputs/e3 my-name/my-model
"""

import argparse
import sys

from e3_trl.publishing import HubError, publish


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the run's output_dir")
    parser.add_argument("repo", help="name of the model repository, with or without a namespace")
    parser.add_argument(
        "--private", action="store_true", default=None, help="if the repository is new, make it private"
    )
    args = parser.parse_args()
    try:
        print(f"Uploaded: {publish(args.folder, args.repo, private=args.private)}")
    except (HubError, ValueError) as error:
        sys.exit(str(error))
