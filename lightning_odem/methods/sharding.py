"""Which merge methods can merge a model whose parameters several processes share."""

from lightning_odem.methods.base import MergeMethod
from lightning_odem.methods.registry import METHODS, method_name


def check_sharding(method: MergeMethod) -> None:
    """Refuse a method that needs whole vectors when each process has only its shards of the parameters.

    Raises:
        ValueError: If the method needs whole vectors; the message lists the methods that do not.

    Example:
        >>> from lightning_odem.methods import resolve_method
        >>> check_sharding(resolve_method("ode"))
        >>> check_sharding(resolve_method("opcm"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: Merge method 'opcm' needs whole tensors, ...
    """
    if not method.sharded:
        able = [name for name, rule in METHODS.items() if getattr(rule, "sharded", False)]
        raise ValueError(
            f"Merge method {method_name(method)!r} needs whole tensors, but each process holds shards of the "
            f"parameters. Methods that merge shards are {', '.join(able)}; or merge saved checkpoints, or train with "
            "strategy='ddp'."
        )
