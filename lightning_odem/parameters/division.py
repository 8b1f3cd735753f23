"""Which of a module's tensors are merged, and which belong to single tasks."""

from collections.abc import Callable, Container, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_odem.parameters.adapter_search import find_pairs
from lightning_odem.parameters.vector import canonical_name, is_excluded


class Division:
    """Divides a module's parameters and buffers by name patterns.

    Args:
        exclude: The user's patterns, see :func:`~lightning_odem.parameters.vector.is_excluded`. The patterns in the
            attribute ``task_specific`` of a module are added to them.
        frozen: Gives the names of tensors that nobody keeps, as a frozen base is known by its fingerprint: they are
            neither shared nor anyone's own.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> is_shared = Division(["head"]).shared(net)
        >>> [name for name, _ in net.named_parameters() if is_shared(name)]
        ['body.weight', 'body.bias']
    """

    def __init__(self, exclude: Sequence[str], frozen: Callable[[], Container[str]] = tuple) -> None:
        self.exclude = tuple(exclude)
        self._frozen = frozen

    def patterns(self, module: nn.Module) -> tuple[str, ...]:
        """All patterns of tensors that are not merged.

        Raises:
            ValueError: If ``task_specific`` is a string; its letters would be taken for patterns.
        """
        own = getattr(module, "task_specific", ())
        if isinstance(own, str):
            name = type(module).__name__
            raise ValueError(f"{name}.task_specific is a tuple of patterns, got the string {own!r}; write ({own!r},).")
        return (*self.exclude, *own)

    def shared(self, module: nn.Module) -> Callable[[str], bool]:
        """A function that selects by name what all tasks share."""
        patterns, frozen = self.patterns(module), self._frozen()
        return lambda name: not is_excluded(name, patterns) and name not in frozen

    def task_specific(self, module: nn.Module) -> Callable[[str], bool]:
        """A function that selects by name what each task keeps for itself.

        Tensors that are excluded but frozen are not among them: they are the same for all tasks.
        """
        patterns = self.patterns(module)
        frozen = {canonical_name(name) for name, parameter in module.named_parameters() if not parameter.requires_grad}
        return lambda name: is_excluded(name, patterns) and name not in frozen

    def fixed(self, module: nn.Module) -> Callable[[str], bool]:
        """A function that selects by name the excluded and frozen parameters: the same for all tasks that have them."""
        own, frozen = self.task_specific(module), self._frozen()
        patterns = self.patterns(module)
        return lambda name: is_excluded(name, patterns) and not own(name) and name not in frozen

    def check(self, module: nn.Module) -> None:
        """Refuse, before any training, a module that could not be merged after it.

        Raises:
            ValueError: If a pattern of the user matches nothing, most often because a name is misspelt; if a tied
                parameter is excluded by only one of its names; if a parameter to be merged has no values yet or complex
                ones; if all parameters to be merged are frozen; or if an adapter could not be merged rightly.
        """
        kind = type(module).__name__
        named = [(canonical_name(name), tensor) for name, tensor in module.named_parameters(remove_duplicate=False)]
        idle = [pattern for pattern in self.exclude if not any(is_excluded(name, [pattern]) for name, _ in named)]
        if idle:
            raise ValueError(
                f"exclude={idle} matches no parameter of {kind}; its parameters are: "
                f"{', '.join(name for name, _ in named)}."
            )
        patterns = self.patterns(module)
        names_of: dict[nn.Parameter, list[str]] = {}
        for name, tensor in named:
            names_of.setdefault(tensor, []).append(name)
        for tensor, names in names_of.items():
            merged, kept = ([name for name in names if is_excluded(name, patterns) is no] for no in (False, True))
            if merged and kept:
                raise ValueError(
                    f"{' and '.join(names)} are one parameter of {kind}, but {', '.join(kept)} is excluded from the "
                    f"merge and {', '.join(merged)} is not. Exclude all of its names or none."
                )
            if is_lazy(tensor):
                raise ValueError(
                    f"The lazy parameter {names[0]} of {kind} has no values yet, so there is no base model. Call the "
                    "module on a sample batch before the first fit."
                )
            if merged and tensor.requires_grad and tensor.is_complex():
                raise ValueError(
                    f"{names[0]} of {kind} is complex; merges are defined on real parameters. Keep it as a real tensor "
                    "and use torch.view_as_complex in forward, or leave it out of the merge with exclude."
                )
        if not any(tensor.requires_grad and not is_excluded(names[0], patterns) for tensor, names in names_of.items()):
            raise ValueError(
                f"No trainable parameter of {kind} is left to merge: of {len(names_of)} parameters all are frozen or "
                f"match the patterns {list(patterns)}."
            )
        list(find_pairs(module, patterns))
