"""Draw the paper's figures from run folders: `e3-trl plot`."""

from e3_trl.commands.plot import run


if __name__ == "__main__":
    run()
