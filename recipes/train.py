"""Train a model with E3, or with one of its baselines: `e3-trl train`."""

from e3_trl.commands.train import run


if __name__ == "__main__":
    run()
