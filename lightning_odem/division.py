"""Which of a module's tensors are merged, and which belong to single tasks."""

from collections.abc import Callable, Sequence

from torch import nn

from lightning_odem.parameters import canonical_name, is_excluded


class Division:
    """Divides a module's parameters and buffers by name patterns.

    Args:
        exclude: The user's patterns, see :func:`~lightning_odem.parameters.is_excluded`; those in the attribute
            ``task_specific`` of a module are added to them.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> is_shared = Division(["head"]).shared(net)
        >>> [name for name, _ in net.named_parameters() if is_shared(name)]
        ['body.weight', 'body.bias']
    """

    def __init__(self, exclude: Sequence[str]) -> None:
        self.exclude = tuple(exclude)

    def patterns(self, module: nn.Module) -> tuple[str, ...]:
        """All patterns of tensors that are not merged.

        Raises:
            ValueError: If ``task_specific`` is a string, whose letters would be taken for patterns.
        """
        own = getattr(module, "task_specific", ())
        if isinstance(own, str):
            name = type(module).__name__
            raise ValueError(f"{name}.task_specific is a tuple of patterns, got the string {own!r}; write ({own!r},).")
        return (*self.exclude, *own)

    def shared(self, module: nn.Module) -> Callable[[str], bool]:
        """Selects by name what all tasks share."""
        patterns = self.patterns(module)
        return lambda name: not is_excluded(name, patterns)

    def task_specific(self, module: nn.Module) -> Callable[[str], bool]:
        """Selects by name what each task keeps for itself; what is excluded but frozen is the same for all tasks."""
        patterns = self.patterns(module)
        frozen = {canonical_name(name) for name, parameter in module.named_parameters() if not parameter.requires_grad}
        return lambda name: is_excluded(name, patterns) and name not in frozen

    def check(self, module: nn.Module) -> None:
        """Refuse patterns of the user that match nothing: most often a misspelt name.

        Raises:
            ValueError: With the patterns and the names there are.
        """
        names = [canonical_name(name) for name, _ in module.named_parameters()]
        idle = [pattern for pattern in self.exclude if not any(is_excluded(name, [pattern]) for name in names)]
        if idle:
            raise ValueError(
                f"exclude={idle} matches no parameter of {type(module).__name__}; its parameters are: "
                f"{', '.join(names)}."
            )
