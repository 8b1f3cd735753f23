"""``python -m lightning_odem``: the command line."""

from lightning_odem.cli.command_line import main

main()
