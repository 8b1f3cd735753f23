"""Copies of modules' Python attributes, to put them back."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from io import IOBase
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

# Parameters, buffers, hooks, submodules and the train flag are not the user's attributes.
_OF_MODULES = frozenset(vars(nn.Module()))
_IMMUTABLE = frozenset((str, int, float, bool, type(None), torch.device, torch.dtype))
_SEQUENCES = (list, deque)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SETS = (set,)


class Attributes:
    """A copy of modules' attributes: numbers, strings, lists, dicts and sets, nested; metrics' states; iterators.

    :meth:`put_back` restores the same objects with their former contents. Any other object is put back under its name,
    but changes within it stay.

    Args:
        modules: The modules.
        tensors: Whether tensors that are neither parameters nor buffers are copied too.
    """

    def __init__(self, modules: Iterable[nn.Module], tensors: bool = True) -> None:
        self._tensors = tensors
        self._known: set[int] = set()
        self._named: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._values: list[tuple[Tensor, Tensor, int]] = []
        self._ahead: list[tuple[dict[str, Any], str, ReadAhead]] = []
        for module in modules:
            self._see_module(module)

    def put_back(self) -> None:
        """Make the attributes what they were."""
        for content, value in self._contents:
            content.clear()
            (content.extend if isinstance(content, _SEQUENCES) else content.update)(value)
        for named, attributes in self._named:
            for name in [name for name in named if name not in attributes and name not in _OF_MODULES]:
                del named[name]
            named.update(attributes)
        with torch.no_grad():
            for tensor, value, version in self._values:
                if tensor._version != version:
                    tensor.copy_(value)
        for named, name, ahead in self._ahead:
            named[name] = ahead.rewound()

    def _see_module(self, module: nn.Module) -> None:
        named = vars(module)
        attributes = {name: value for name, value in named.items() if name not in _OF_MODULES}
        self._named.append((named, attributes))
        for name, value in attributes.items():
            if type(value) in _IMMUTABLE:  # most are
                continue
            self._see(value)
            if hasattr(type(value), "__next__") and not isinstance(value, IOBase):
                named[name] = ahead = value if isinstance(value, ReadAhead) else ReadAhead(value)
                ahead.start()
                self._ahead.append((named, name, ahead))

    def _see(self, value: Any) -> None:
        kind = type(value)
        if kind in _IMMUTABLE or id(value) in self._known:
            return
        content: Any
        if kind in _SEQUENCES:
            children = content = list(value)
        elif kind in _MAPPINGS:
            content = dict(value)
            children = list(content.values())
        elif kind in _SETS:
            content, children = set(value), []
        else:
            if kind is Tensor and self._tensors and not value.is_inference():
                self._known.add(id(value))
                self._values.append((value, value.detach().clone(), value._version))
            elif isinstance(value, Metric):  # in a list or a dict of the user's
                self._known.add(id(value))
                self._see_module(value)
            return
        self._known.add(id(value))
        self._contents.append((value, content))
        for child in children:
            self._see(child)


class ReadAhead:
    """An iterator that can go back to where it was.

    Args:
        source: The iterator.

    Example:
        >>> ahead = ReadAhead(iter("abc"))
        >>> ahead.start()
        >>> next(ahead), next(ahead)
        ('a', 'b')
        >>> "".join(ahead.rewound())
        'abc'
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._read: deque[Any] = deque()
        self._starts: list[int] = []
        self._next = 0

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> Any:
        if self._next < len(self._read):
            item = self._read[self._next]
        else:
            item = next(self._source)
            self._read.append(item)
        if self._starts:
            self._next += 1
        else:
            self._read.popleft()
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_source"], name)

    def start(self) -> None:
        """Note the position to go back to."""
        self._starts.append(self._next)

    def rewound(self) -> Iterator[Any]:
        """Continue from the position noted last: with this iterator, or its source if there is nothing to repeat."""
        self._next = self._starts.pop()
        return self if self._starts or self._read else self._source
