"""What installed packages announce is read once."""

from functools import cache


def read_once() -> None:
    """Keep what Lightning finds in the metadata of all packages, which it otherwise reads for each Trainer."""
    from lightning.fabric.utilities import registry

    if not hasattr(registry.entry_points, "cache_info"):
        registry.entry_points = cache(registry.entry_points)
