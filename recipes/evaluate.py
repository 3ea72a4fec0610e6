"""Evaluate a model, or several runs of one method, on benchmarks: `e3-trl evaluate`."""

from e3_trl.commands.evaluate import run


if __name__ == "__main__":
    run()
