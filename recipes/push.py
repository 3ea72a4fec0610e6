"""Upload a finished run to the Hub: `e3-trl push`."""

from e3_trl.commands.push import run


if __name__ == "__main__":
    run()
