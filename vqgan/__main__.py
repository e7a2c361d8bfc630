"""Runs the command of `cli.py` as `python -m vqgan`."""

from vqgan.cli import command_line

if __name__ == "__main__":
    command_line()
