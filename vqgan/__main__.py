"""`python -m vqgan`: the command of `cli.py`."""

from vqgan.cli import command_line

if __name__ == "__main__":
    command_line()
