"""What a configuration may name in arguments of this package: modules, transforms, functions of known packages."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import lightning as L
from jsonargparse import Namespace
from torch import nn

from lightning_odem.methods import MergeMethod

PACKAGES = ("lightning_odem", "timm", "torch", "torchvision", "transformers")
# What computes; other parts of torch load code from files or start programs.
_OF_TORCH = ("torch._C", "torch.fft", "torch.functional", "torch.linalg", "torch.nn", "torch.special")
_LOADERS = ("transformers.dynamic_module_utils",)
_OPTION = "--trust"


class UntrustedPathError(ValueError):
    """A configuration names something that an argument is not meant for."""


def check_class_paths(config: Any, trusted: Sequence[str] = ()) -> None:
    """Refuse what arguments of this package are not meant for, before anything of a configuration is made.

    An argument such as ``train_transform`` takes any callable, and a configuration can have one called with arguments
    of its choice: ``os.system`` is one. Allowed are subclasses of ``nn.Module``, ``LightningDataModule`` and
    ``MergeMethod``, and classes and functions of :data:`PACKAGES`, of torch those that compute. Arguments of
    other classes, the user's own and Lightning's, are theirs.

    Args:
        config: A parsed configuration, in which nothing is made yet.
        trusted: Modules whose classes and functions may be named too; a package stands for all in it.

    Raises:
        UntrustedPathError: With the argument, the path and the way out.

    Example:
        >>> transform = Namespace(class_path="os.system", init_args=Namespace(command="true"))
        >>> arguments = Namespace(train_transform=transform)
        >>> try:
        ...     check_class_paths(Namespace(class_path="lightning_odem.tasks.DigitsStream", init_args=arguments))
        ... except UntrustedPathError as error:
        ...     print(str(error)[:38])
        train_transform names os.system, which
    """
    for argument, path, found in _named(config, None, ""):
        home = _home(path, found)
        if not (_is_kind(found) or _is_in(home, trusted) or _is_known(home)):
            raise UntrustedPathError(
                f"{argument} names {path}, which is neither a module, a transform nor a function of "
                f"{', '.join(PACKAGES)}. If it is your own, name its module on the command line: {_OPTION} "
                f"{(home or path).partition('.')[0]}"
            )


def take_trusted(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide arguments into the modules that are trusted and the rest.

    They are given on the command line only: a configuration cannot vouch for itself.

    Example:
        >>> take_trusted(["fit_tasks", "--trust", "my_transforms", "--config", "c.yaml"])
        (['my_transforms'], ['fit_tasks', '--config', 'c.yaml'])
    """
    trusted, rest, left = [], [], iter(args)
    for argument in left:
        if argument == _OPTION:
            trusted.append(next(left, ""))
        elif argument.startswith(f"{_OPTION}="):
            trusted.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return [name for name in trusted if name], rest


def _named(value: Any, owner: Any, argument: str) -> Iterator[tuple[str, str, Any]]:
    """Everything that arguments of this package's classes name: argument, path and object."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _named(entry, owner, argument)
    elif isinstance(value, (dict, Namespace)):
        entries = dict(value) if isinstance(value, dict) else vars(value)
        path = entries.get("class_path")
        if isinstance(path, str):
            found = _find(path)
            if _is_ours(owner):
                yield argument, path, found
            inner = [entries.get("init_args"), entries.get("dict_kwargs")]
            entries = {name: entry for part in inner if part for name, entry in _items(part)}
            owner = found
        for name, entry in entries.items():
            yield from _named(entry, owner, str(name))
    elif callable(value) and _is_ours(owner) and not isinstance(value, nn.Module):
        kind = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
        yield argument, f"{kind.__module__}.{kind.__qualname__}", kind


def _items(part: Any) -> list[tuple[str, Any]]:
    return list((part if isinstance(part, dict) else vars(part)).items())


def _find(path: str) -> Any:
    """The object at a path; None where there is none, which the parser has refused or will."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except (ImportError, ValueError):
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found
    return None


def _is_ours(owner: Any) -> bool:
    """Whether a class has arguments of this package, as the user's subclasses of its classes do."""
    return inspect.isclass(owner) and any(_is_in(base.__module__, ("lightning_odem",)) for base in owner.__mro__)


def _is_kind(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, (nn.Module, L.LightningDataModule, MergeMethod))


def _is_known(home: str) -> bool:
    if home.partition(".")[0] == "torch":
        return home == "torch" or _is_in(home, _OF_TORCH)
    return _is_in(home, PACKAGES) and not _is_in(home, _LOADERS)


def _home(path: str, found: Any) -> str:
    """The module that an object is defined in, whatever path leads to it.

    Functions in C may not know theirs; it is the module that holds them then, not another one that it has imported.
    """
    home = getattr(found, "__module__", None)
    if isinstance(home, str):
        return home
    holder = _find(path.rpartition(".")[0]) or sys.modules.get(path.rpartition(".")[0])
    return getattr(holder, "__name__", "") or ""


def _is_in(home: str, packages: Sequence[str]) -> bool:
    return any(home == package or home.startswith(f"{package}.") for package in packages)
