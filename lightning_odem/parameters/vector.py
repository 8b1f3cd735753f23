"""A module's trainable parameters as one flat vector, and the names that decide which of them are merged."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_odem.parameters.gradients import GradientSum
from lightning_odem.parameters.shards import Shards, divisors, find_shards, local, reshard

if TYPE_CHECKING:
    from lightning_odem.parameters.adapters import Adapters


def canonical_name(name: str) -> str:
    """A parameter's name without the parts that ``torch.compile`` adds to names in compiled submodules."""
    return name.replace("_orig_mod.", "")


def is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name matches one of the patterns: a glob over the whole name, or the name of a module above it.

    Example:
        >>> [is_excluded(name, ["head", "*.bias"]) for name in ("head.weight", "headless.weight", "conv1.bias")]
        [True, False, True]
    """
    name = canonical_name(name)
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite. If they are, that takes one fast pass and reads one number from the device."""
    # Infinite and NaN entries make the sum so; it may also overflow. In half precision it is six times as fast.
    half = tensor.dtype in (torch.float16, torch.bfloat16) and bool(tensor.sum().isfinite())
    return half or bool(_sum(tensor).isfinite()) or bool(tensor.isfinite().all())


class NoGradientError(ValueError):
    """The loss depends on none of the parameters."""


class ParameterVector:
    """The parameters that a merge changes, read and written as one flat vector.

    These are the module's parameters that are trainable and not excluded, each tied parameter once, in the module's
    own order. The vector is fp32, or fp64 if a parameter is; lower-precision parameters are cast when written.

    If several processes share the parameters (FSDP2), the vector consists of this process's shards. No process ever
    holds a whole vector.

    Args:
        module: The module; its parameters are used in place, never rebound to other storage.
        exclude: Patterns as in :func:`is_excluded` of parameters to leave alone.
        adapters: Adapters whose whole updates the module has in place of their factors, see
            :meth:`~lightning_odem.parameters.adapters.Adapters.expand`: they are part of the vector.

    Attributes:
        names: The parameters' names, in their order in the vector.
        tensors: The parameters.
        shapes: Shapes of the whole parameters.
        shards: How processes share them, a :class:`~lightning_odem.parameters.Shards`; None if they are not shared.

    Raises:
        ValueError: If no parameter is left, only some of them are shared, or they are shared in a way that is not
            supported.

    Example:
        >>> from torch import nn
        >>> vector = ParameterVector(nn.Linear(2, 1), exclude=["bias"])
        >>> vector.names, vector.read().shape
        (['weight'], torch.Size([2]))
        >>> vector.write_(torch.tensor([1.0, 2.0]))
        >>> vector.read()
        tensor([1., 2.])
    """

    def __init__(self, module: nn.Module, exclude: Sequence[str] = (), adapters: "Adapters | None" = None) -> None:
        reshard(module)
        self.adapters = adapters if adapters is not None and adapters.pairs else None
        trainable = {canonical_name(name): tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        named = {name: tensor for name, tensor in trainable.items() if not is_excluded(name, exclude)}
        if not named:
            total = sum(1 for _ in module.parameters())
            raise ValueError(
                f"No trainable parameter of {type(module).__name__} is left to merge: of {total} parameters all are "
                f"frozen or match exclude={list(exclude)}."
            )
        self.names = list(named)
        self.tensors: list[Tensor] = list(named.values())
        self._others = [tensor for name, tensor in trainable.items() if name not in named]
        self.shapes = [parameter.shape for parameter in self.tensors]
        self.shards = find_shards(named)
        if self.shards is not None and (whole := named.keys() - self.shards.shapes.keys()):
            raise ValueError(
                f"{len(named) - len(whole)} of {len(named)} parameters to merge are sharded and {len(whole)} are not "
                f"({', '.join(sorted(whole)[:3])}, ...). Apply fully_shard to the modules of all of them, or leave "
                "parameters out with exclude=."
            )
        self._module = module
        self._gradients: GradientSum | None = None
        self._local_shapes = [local(parameter).shape for parameter in self.tensors]
        self._sizes = [shape.numel() for shape in self._local_shapes]
        self.device = self.tensors[0].device
        dtypes = {parameter.dtype for parameter in self.tensors}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    def __len__(self) -> int:
        return sum(self._sizes)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat vector in the shapes of the parameters, or of their shards; they share its memory."""
        return [piece.view(shape) for piece, shape in zip(flat.split(self._sizes), self._local_shapes, strict=True)]

    def read(self) -> Tensor:
        """Copy the parameters into a new vector of shape [d] on the first parameter's device."""
        return self._gather(self._parts())

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy tensors kept by name (a superset is fine) into a new vector.

        For sharded parameters, the tensors may be whole or this process's shards. Adapters are kept as factors.

        Raises:
            ValueError: If a name is missing or a shape differs; the message lists every case.
        """
        tensors = self.adapters.updates(tensors) if self.adapters else tensors
        kept = {name: local(tensors[name]) for name in self.names if name in tensors}
        found = whole_shapes(kept, self.shards)
        check_same_shapes(dict(zip(self.names, self.shapes, strict=True)), found, "incoming", "merged")
        return self._gather([self.shards.part(name, kept[name]) if self.shards else kept[name] for name in self.names])

    @torch.no_grad()
    def write_(self, flat: Tensor) -> None:
        """Copy a vector into the parameters, in place and in their own dtypes; updates are cut to their rank."""
        pieces = self.views(flat)
        if self.adapters:
            pieces = list(self.adapters.cut(dict(zip(self.names, pieces, strict=True))).values())
        torch._foreach_copy_(self._parts(), pieces)

    @torch.no_grad()
    def put_back_(self, flat: Tensor) -> None:
        """Copy a vector into the parameters as it is; :meth:`write_` cannot cut updates that are not finite."""
        torch._foreach_copy_(self._parts(), self.views(flat))

    def not_finite(self, flat: Tensor) -> list[str]:
        """Names of the parameters with infinite or NaN entries in a vector [d], in any of the processes.

        If there are none, this takes one pass over the vector and reads one number from the device.
        """
        broken = (~_sum(flat).isfinite()).double()  # or the sum overflows
        if self.shards is not None:
            self.shards.sum_(broken)
        if not broken.item():
            return []
        counts = torch.stack([(~piece.isfinite()).sum().double() for piece in self.views(flat)])
        if self.shards is not None:
            self.shards.sum_(counts)
        return [name for name, count in zip(self.names, counts.tolist(), strict=True) if count]

    def unrounded(self, flat: Tensor) -> dict[str, Tensor]:
        """Copy to the CPU the pieces of a vector that parameters of lower precision cannot hold, by name."""
        pieces = zip(self.names, self.tensors, self.views(flat), strict=True)
        return {name: piece.to("cpu", copy=True) for name, tensor, piece in pieces if _is_low(tensor)}

    @contextmanager
    def collect_gradient(self, out: Tensor | None = None) -> Iterator[Tensor]:
        """Add the gradients of every ``backward`` in the block into one vector and yield it.

        There is never a second full set of gradients besides the vector, see
        :class:`~lightning_odem.parameters.gradients.GradientSum`. The gradient of an excluded parameter is freed.
        Existing ``.grad`` are restored afterwards.

        For sharded parameters the gradients of all processes are added. Every process has to call ``backward`` equally
        often, each time on losses that depend on the same parameters.

        Args:
            out: The vector, zeros of shape [d]; by default a new one.

        Raises:
            NoGradientError: After the block, if none of the parameters received a gradient.
        """
        flat = torch.zeros(len(self), dtype=self.dtype, device=self.device) if out is None else out
        self._gradients = GradientSum(self.tensors, self.views(flat), self._others, self._gradient_scales())
        try:
            yield flat
            is_reached = self._gradients.is_reached
            if self.adapters:
                self.adapters.project_(dict(zip(self.names, self.views(flat), strict=True)))
        finally:
            self._gradients.close()
            self._gradients = None
        if not is_reached:
            raise NoGradientError(
                f"The calibration loss has no gradient: backward reached none of {len(self.tensors)} parameters "
                f"({', '.join(self.names[:3])}, ...). Return a loss that depends on them, without detach or no_grad."
            )

    def collect_nothing(self) -> AbstractContextManager[None]:
        """In a block within :meth:`collect_gradient`, gradients do not count; elsewhere this has no effect."""
        return nullcontext() if self._gradients is None else self._gradients.paused()

    def _parts(self) -> list[Tensor]:
        """The parts of the parameters that this process holds, in their memory."""
        if self.shards is None:
            return self.tensors
        reshard(self._module)
        # Not cached: FSDP2 may move shards to other memory.
        return [local(parameter) for parameter in self.tensors]

    def _gradient_scales(self) -> dict[Tensor, float]:
        """Factors that turn what FSDP2 gives, by default means, into sums over the processes."""
        if self.shards is None:
            return {}
        return {**dict.fromkeys(self.tensors, self.shards.size), **divisors(self._module)}

    @torch.no_grad()
    def _gather(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = torch.empty(len(self), dtype=self.dtype, device=self.device)
        torch._foreach_copy_(self.views(flat), list(tensors))
        return flat


def whole_shapes(tensors: Mapping[str, Tensor], shards: Shards | None) -> dict[str, torch.Size]:
    """Shapes of tensors by name; for shards, the shapes of the whole parameters."""
    return {name: shards.whole_shape(name, tensor) if shards else tensor.shape for name, tensor in tensors.items()}


def check_same_shapes(
    expected: Mapping[str, torch.Size],
    found: Mapping[str, torch.Size],
    expected_in: str,
    found_in: str,
    remedy: str = "exclude= leaves parameters out",
) -> None:
    """Raise a ValueError that lists all names and shapes in which two models differ."""
    problems = [f"{name}: in the {expected_in} model only" for name in expected if name not in found]
    problems += [f"{name}: in the {found_in} model only" for name in found if name not in expected]
    problems += [
        f"{name}: {tuple(shape)} in the {expected_in} model, {tuple(found[name])} in the {found_in} model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(
            f"The {expected_in} and the {found_in} model differ in {len(problems)} places; only models of one "
            f"architecture can be merged ({remedy}):\n  " + "\n  ".join(problems)
        )


def _sum(tensor: Tensor) -> Tensor:
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))


def _is_low(tensor: Tensor) -> bool:
    return torch.finfo(tensor.dtype).bits < torch.finfo(torch.float32).bits
