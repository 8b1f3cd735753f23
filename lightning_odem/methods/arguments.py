"""The checks that merge methods use, under the path that they had until version 0.5."""

from lightning_odem.arguments import check_choice, check_integer, check_patterns, check_range, check_seed

__all__ = ["check_choice", "check_integer", "check_patterns", "check_range", "check_seed"]
