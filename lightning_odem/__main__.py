"""``python -m lightning_odem``: the command line."""

from lightning_odem.cli import main

main()
