"""Checkpoints of one architecture, read under one set of names."""

import os
from collections.abc import Callable, Collection, Container, Mapping, Sequence

import torch
from torch import Tensor

from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.folder_comparison import explain_difference, is_tied
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.tied_tensors import copies, fill_head, fill_tied
from lightning_odem.parameters.vector import canonical_name, check_same_shapes, is_excluded, is_finite

_COUNTER = "num_batches_tracked"


def match_names(own: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Map each name of one model to the name of the same tensor in another model, if it has one.

    The names may differ in leading names that all tensors of one model share: ``model.``, ``module.``, ``backbone.``.
    All ways to exchange these names are tried. The one that matches most names is taken.

    Example:
        >>> match_names(["model.0.weight", "model.1.weight"], ["0.weight", "1.weight", "2.weight"])
        {'model.0.weight': '0.weight', 'model.1.weight': '1.weight'}
    """
    ways = [
        {name: there + name.removeprefix(here) for name in own}
        for here in _shared_beginnings(own)
        for there in _shared_beginnings(names)
    ]
    return max(ways, key=lambda way: sum(name in names for name in way.values()))


class ModelFiles:
    """The models of a merge on disk, compared with each other without reading their weights.

    All models must have the same floating tensors in the same shapes. A leading name that one model gives all its
    tensors is ignored. Other tensors, such as position indices, must be equal if a model has them. Counters of
    batch-norm layers may differ. Copies of tied tensors may be stored or not; if the first model has a head of its own,
    others may tie it to the embedding. The base model may have more tensors, such as a CLIP with its text tower.

    Args:
        checkpoints: Paths of the models to merge, in any form that :func:`~lightning_odem.parameters.read_checkpoint`
            takes.
        base: Path of the base model, or None.
        exclude: Patterns of tensors that are not merged and may differ between models.
        own: Tensors of the module that the models are for. Their names are then used; by default those of the first
            model.
        read: Reads a model's tensors; by default :func:`~lightning_odem.parameters.read_checkpoint`.

    Attributes:
        like: A tensor per name to be merged. Floating tensors have no memory and the widest dtype of the models. Other
            tensors have their values.
        excluded: Names, as in the files, that the patterns match.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file cannot be read or the models differ; every difference is listed.
    """

    def __init__(
        self,
        checkpoints: Sequence[str | os.PathLike],
        base: str | os.PathLike | None = None,
        exclude: Sequence[str] = (),
        own: Mapping[str, Tensor] | None = None,
        read: Callable[[str | os.PathLike], dict[str, Tensor]] | None = None,
    ) -> None:
        self._read = read
        self._tied: dict[str, str] = {}
        self._of_module = own is not None
        self.like: Snapshot = {}
        self._exclude = exclude
        self._origin = str(checkpoints[0]) if own is None else "module's"
        self.excluded: set[str] = set()
        # Name in the file for each common name, by path.
        self._places: dict[str, dict[str, str]] = {}
        # Tensors whose values have been looked at; merges in several passes read them again.
        self._finite: set[tuple[str, str]] = set()
        self.like = {
            name: _without_memory(tensor)
            for name, tensor in (self._divide(checkpoints[0])[0] if own is None else own).items()
        }
        if own is None and len(checkpoints) + (base is not None) > 1:
            self._tied = self._find_tied(checkpoints[0])
        problems = [problem for path in checkpoints if (problem := self._problem(path))]
        if base is not None and (problem := self._problem(base, is_base=True)):
            problems.append(problem)
        if problems:
            raise ValueError("\n".join(problems))

    def read(self, path: str | os.PathLike, names: Collection[str] | None = None) -> Snapshot:
        """Read the tensors to be merged from one of the models, under the common names.

        Args:
            path: The model.
            names: Those to read; by default all.

        Raises:
            ValueError: If a weight is not finite.
        """
        wanted = self.like if names is None else names
        places = {name: there for name, there in self._places[str(path)].items() if name in wanted}
        tensors = self._tensors(path, set(places.values()))
        found = {name: tensors[there] for name, there in places.items()}
        broken = [
            name for name, tensor in found.items() if (str(path), name) not in self._finite and not is_finite(tensor)
        ]
        if broken:
            raise ValueError(
                f"{path} holds infinite or NaN values in {', '.join(broken)}; merged they would spoil the other models "
                "as well. Leave this checkpoint out."
            )
        self._finite.update((str(path), name) for name in found)
        fixed = {name: self.like[name] for name in wanted if not self.like[name].is_meta}
        return {**fixed, **found}

    def read_excluded(self, path: str | os.PathLike) -> Snapshot:
        """The tensors of one of the models that are not to be merged, under the names in the file."""
        return {name: tensor for name, tensor in self._tensors(path).items() if is_excluded(name, self._exclude)}

    def _tensors(self, path: str | os.PathLike, names: Container[str] | None = None) -> Snapshot:
        if self._read is not None:
            found = self._read(path)
        elif names is None:
            found = read_checkpoint(path)
        else:
            found = read_checkpoint(path, lambda name: canonical_name(name) in names)
        return {canonical_name(name): tensor for name, tensor in found.items()}

    def _divide(self, path: str | os.PathLike) -> tuple[Snapshot, Snapshot, dict[str, str]]:
        """Tensors of a model to be merged, others, and the name in the file of each of the first."""
        shared: Snapshot = {}
        excluded: Snapshot = {}
        tensors = self._tensors(path)
        for name, tensor in tensors.items():
            (excluded if is_excluded(name, self._exclude) else shared)[name] = tensor
        shared = self._as_tied(path, shared)
        origins = {id(tensor): name for name, tensor in tensors.items()}
        return shared, excluded, {name: origins[id(tensor)] for name, tensor in shared.items()}

    def _find_tied(self, first: str | os.PathLike) -> dict[str, str]:
        shared, excluded, _ = self._divide(first)
        tied = copies({**shared, **excluded})
        # Elsewhere, equal tensors may be two that began as one.
        for pair in tied.items() if is_tied(first) else ():
            apart = [name for name in pair if name in excluded]
            if len(apart) == 1:
                raise ValueError(
                    f"{pair[0]} is a copy of {pair[1]} in {first} (tied weights), but only {apart[0]} is excluded from "
                    "the merge. Exclude both or none."
                )
        return {name: other for name, other in tied.items() if name in shared}

    def _as_tied(self, path: str | os.PathLike, shared: Snapshot) -> Snapshot:
        """A model with those copies of tied tensors that the first one has, and no others."""
        if self._of_module or not self.like:
            return shared
        names = match_names(self.like, shared)
        shapes = {name: own.shape for name, own in self.like.items() if own.is_meta}
        shared = fill_tied(shared, names, shapes, self._tied)
        missing = [name for name in shapes if names[name] not in shared]
        if missing and is_tied(path) and not is_tied(self._origin):
            shared = fill_head(shared, names, shapes, missing)
        return shared

    def _names(self, shared: Snapshot) -> dict[str, str]:
        return {name: there for name, there in match_names(self.like, shared).items() if there in shared}

    def _problem(self, path: str | os.PathLike, is_base: bool = False) -> str:
        """List how a model differs from the others; take its dtypes into account if it does not differ."""
        shared, excluded, origins = self._divide(path)
        self.excluded |= excluded.keys()
        names = self._names(shared)
        self._places[str(path)] = {name: origins[there] for name, there in names.items()}
        shapes = {name: shared[there].shape for name, there in names.items()}
        if not is_base:
            more = shared.keys() - names.values()
            shapes |= {name: shared[name].shape for name in more if shared[name].is_floating_point()}
        # Counters and position indices appear and disappear between versions of a library.
        expected = {name: own.shape for name, own in self.like.items() if own.is_meta or name in names}
        try:
            check_same_shapes(expected, shapes, self._origin, str(path))
        except ValueError as error:
            return f"{error}{explain_difference(self._origin, path)}"
        for name, other in self._tied.items() if not is_base and is_tied(self._origin) else ():
            if name in names and other in names and not torch.equal(shared[names[name]], shared[names[other]]):
                return (
                    f"{name} is a copy of {other} in {self._origin} (tied weights) and none in {path}. "
                    f"Give {path} first: the merged model then has both too."
                )
        fixed = [name for name, there in names.items() if not _may_differ(name, shared[there], self.like[name])]
        if fixed:
            kinds = ", ".join(f"{name} ({shared[names[name]].dtype})" for name in fixed)
            return (
                f"{path} differs from the {self._origin} model in tensors that cannot be merged because they are not "
                f"floating-point in both: {kinds}. Convert quantized weights back, or exclude what is not a weight."
            )
        for name, there in names.items() if not is_base else ():
            self.like[name] = self.like[name].to(torch.promote_types(self.like[name].dtype, shared[there].dtype))
        return ""


def _shared_beginnings(names: Collection[str]) -> list[str]:
    """The leading names that all dotted names share: nothing, ``a.``, ``a.b.``; never the last part of a name."""
    parts = os.path.commonprefix([name.split(".")[:-1] for name in names])
    return [".".join([*parts[:depth], ""]) for depth in range(len(parts) + 1)]


def _without_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta") if tensor.is_floating_point() else tensor.detach().clone()


def _may_differ(name: str, tensor: Tensor, own: Tensor) -> bool:
    if tensor.is_floating_point() and own.is_meta:
        return True
    same = tensor.dtype == own.dtype and not own.is_meta and torch.equal(tensor, own)
    return same or name.rpartition(".")[2] == _COUNTER
