"""What importing lightning_odem and its command line's help take, beside Lightning alone, in processor seconds.

Each command runs in a process of its own, in turn, so that what else the machine does hits all of them. The bare
command line is a LightningCLI for one of Lightning's own demonstration models.

Run it with ``python examples/import_times.py``; five turns take two minutes.
"""

import argparse
import resource
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

BARE = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel
LightningCLI(DemoModel, BoringDataModule)
"""
PAIRS = {
    "import": (["-c", "import lightning"], ["-c", "import lightning_odem"]),
    "--help": (["-c", BARE, "--help"], ["-m", "lightning_odem", "--help"]),
}


def seconds(arguments: list[str]) -> float:
    """Processor time of a process, from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    table = Table("", "Lightning (s)", "lightning-odem (s)", "ratio, median", "ratios")
    for what, commands in PAIRS.items():
        pairs = [[seconds(command) for command in commands] for _ in range(turns)]
        bare, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(after / before for before, after in pairs)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        table.add_row(what, f"{bare:.2f}", f"{ours:.2f}", f"{statistics.median(ratios):.2f}", spread)
    Console().print(table)


if __name__ == "__main__":
    main()
