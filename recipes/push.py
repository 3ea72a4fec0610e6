"""Upload a finished run to the Hub: `e3-trl push`."""

from e3_trl.commands.push import main


if __name__ == "__main__":
    main()
