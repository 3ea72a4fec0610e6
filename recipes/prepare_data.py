"""Make training and validation data from raw problems: `e3-trl prepare-data`."""

from e3_trl.commands.prepare_data import run


if __name__ == "__main__":
    run()
