"""Model folders of different vocabularies, read with the rows of the first one."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.model_files import match_names
from lightning_odem.parameters.model_folder import ModelFolder
from lightning_odem.parameters.token_tensors import WAY_OUT, row_count, token_axis, token_tensors
from lightning_odem.parameters.vocabulary import Vocabulary, read_vocabulary


class _Rows(NamedTuple):
    """The rows of one model's embedding: how many, and for each row of the first the row of the same token, or -1."""

    size: int
    places: Tensor


class AlignedFolders:
    """Models whose embeddings and output weights are read in the row order of the first one's tokenizer.

    A token of the first that another model lacks counts there with the mean, by utility weights, of the models that
    have it. Tokens that the first lacks are left out. Rows without a token belong to the same row of others.

    Args:
        paths: The models to merge; those that are no folders are read as they are.
        weights: Their utility weights.
        base: The base model, or None.
        exclude: Patterns of tensors that are not merged.

    Attributes:
        moved: Whether a model's rows are moved or filled.
        notes: What was done, a line for each model.

    Raises:
        ValueError: If the tokenizers differ so that a token does not mean the same in both, or it is not known which
            tensors have a row for each token.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        weights: Sequence[float],
        base: str | os.PathLike | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        self._paths, self._weights, self._exclude = [str(path) for path in paths], weights, exclude
        self.notes: list[str] = []
        self._rows: dict[str, _Rows] = {}
        self._means: dict[str, Tensor] | None = None
        first = self._paths[0]
        others = list(dict.fromkeys([*self._paths[1:], *([] if base is None else [str(base)])]))
        count = row_count(first, exclude)
        if count is None:
            if not exclude:
                self._refuse_unknown_rows(others)
            return
        self._own_rows = _Rows(count, torch.arange(count))
        if (own := _vocabulary(first)) is None:
            self._refuse_unknown_order([path for path in others if _vocabulary(path) is not None])
            return
        for path in others:
            if path != first and (rows := self._align(path, own, count)) is not None:
                self._rows[path] = rows

    @property
    def moved(self) -> bool:
        """Whether a model's rows are moved or filled."""
        return bool(self._rows)

    def read(self, path: str | os.PathLike) -> dict[str, Tensor]:
        """The tensors of a model by name, with the rows of the first model's tokens."""
        state = read_checkpoint(path)
        rows = self._rows.get(str(path))
        if rows is None:
            return state
        lacking = rows.places < 0
        for name, partner in self._partners(state, rows.size).items():
            axis = token_axis(state[name], rows.size)
            taken = state[name].index_select(axis, rows.places.clamp(min=0))
            if lacking.any():
                means = self._mean_rows()[partner].to(taken.dtype)
                flat = taken.transpose(0, axis)
                flat[lacking] = means[lacking[self._lacking]]
            state[name] = taken
        return state

    def _refuse_unknown_rows(self, others: Sequence[str]) -> None:
        """Refuse models with different tokenizers if nothing is known to have a row for each token."""
        first = self._paths[0]
        tables = {path: found for path in (first, *others) if (found := _vocabulary(path)) is not None}
        for path, found in tables.items():
            if first in tables and found != tables[first]:
                raise ValueError(
                    f"The tokenizers of {first} and {path} differ, and no tensor of {first} is known to have a row for "
                    "each token: its config.json has no vocab_size that fits. Correct it; or, if the model does not "
                    "use the tokenizer, remove that from its folder."
                )

    def _refuse_unknown_order(self, known: Sequence[str]) -> None:
        """Refuse models with different tokenizers if the first one has none."""
        first = self._paths[0]
        if known and (others := AlignedFolders(known, [1.0] * len(known), exclude=self._exclude)).moved:
            raise ValueError(
                f"{others.notes[-1]} {first} has no tokenizer, so that it is not known which one its rows are for. Put "
                "its tokenizer into its folder, or give another model first."
            )
        if known:
            self.notes.append(f"{first} has no tokenizer: its rows are taken to be for the tokens of {known[0]}.")

    def _align(self, path: str, own: Vocabulary, count: int) -> _Rows | None:
        """Where each row of the first lies in another model; None if it is the same one."""
        first, other = self._paths[0], _vocabulary(path)
        size = row_count(path, self._exclude)
        if size is None:  # nothing in it has a row for each token
            return None
        if reason := "" if other is None else own.difference(other):
            raise ValueError(f"The tokenizers of {first} and {path} cannot be aligned: {reason}. {WAY_OUT}")
        if other is None or own.opaque or other.opaque:
            if other is None or own.opaque != other.opaque:
                why = "has no tokenizer" if other is None else "has a tokenizer that cannot be compared"
                self.notes.append(f"{path} {why}: its rows are taken to be for the tokens of {first}.")
            return None
        where = {token: row for row, token in other.tokens.items() if row < size}
        found = [
            (row if other.tokens.get(row) == token else where.get(token, -1))
            if (token := own.tokens.get(row)) is not None
            else (row if row < size and row not in other.tokens else -1)
            for row in range(count)
        ]
        index = torch.tensor(found)
        if size == count and found == list(range(count)):
            return None
        self.notes.append(self._note(path, own, other, index, size))
        return _Rows(size, index)

    def _note(self, path: str, own: Vocabulary, other: Vocabulary, index: Tensor, size: int) -> str:
        first = self._paths[0]
        moved = int(((index != torch.arange(len(index))) & (index >= 0)).sum())
        known = {token for row, token in own.tokens.items() if row < len(index)}
        lacking = [own.tokens[row] for row in range(len(index)) if index[row] < 0 and row in own.tokens]
        more = [token for row, token in other.tokens.items() if token not in known and row < size]
        parts = [f"The tokenizers of {first} and {path} differ: {moved} rows of {path} are moved to their tokens' rows"]
        if lacking:
            parts.append(f"{_tokens(lacking)} that it lacks count with the mean of the models that have them")
        if more:
            parts.append(f"{_tokens(more)} that {first} lacks are left out")
        return f"{'; '.join(parts)}."

    def _partners(self, state: Mapping[str, Tensor], count: int) -> dict[str, str]:
        """The tensors of a model that have a row for each token, and the first model's for the same place.

        Raises:
            ValueError: If a tensor may have one or not.
        """
        first = read_checkpoint(self._paths[0])
        own = token_tensors(first, self._own_rows.size, self._exclude)
        names = {there: name for name, there in match_names(first, state).items() if name in own}
        # A copy that the first does not store is one of its embedding.
        return {name: names.get(name) or next(iter(own)) for name in token_tensors(state, count, self._exclude)}

    @property
    def _lacking(self) -> Tensor:
        """Rows of the first that some model lacks."""
        return torch.stack([rows.places < 0 for rows in self._rows.values()]).any(dim=0)

    def _mean_rows(self) -> dict[str, Tensor]:
        """The mean of the rows that some model lacks, over the models that have them, by the first's names."""
        if self._means is None:
            sums: dict[str, Tensor] = {}
            shares: dict[str, Tensor] = {}
            rows = self._lacking.nonzero().flatten()
            for path, weight in zip(self._paths, self._weights, strict=True):
                count, index = self._rows.get(path, self._own_rows)
                state = read_checkpoint(path)
                # A weight of 0 decides only where no other model has the token.
                shares_of_rows = (index[rows] >= 0) * max(weight, 1e-12)
                for name, partner in self._partners(state, count).items():
                    taken = state[name].transpose(0, token_axis(state[name], count))[index[rows].clamp(min=0)].double()
                    part = shares_of_rows.double().view(-1, *(1,) * (taken.dim() - 1))
                    sums[partner] = sums.get(partner, 0) + taken * part
                    shares[partner] = shares.get(partner, 0) + part
            self._means = {name: total / shares[name] for name, total in sums.items()}
        return self._means


def check_same_vocabularies(
    paths: Sequence[str | os.PathLike], base: str | os.PathLike | None = None, exclude: Sequence[str] = ()
) -> None:
    """Refuse models whose tokenizers use other rows for the same tokens, for merges that compute with token ids.

    Raises:
        ValueError: With what differs.
    """
    aligned = AlignedFolders(paths, [1.0] * len(paths), base, exclude)
    if aligned.moved:
        raise ValueError(
            f"{' '.join(aligned.notes)} With model and data, all models need the same tokenizer, since samples may be "
            "token ids. Merge without model and data."
        )


def _vocabulary(path: str) -> Vocabulary | None:
    return read_vocabulary(ModelFolder(path)) if Path(path).is_dir() else None


def _tokens(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:5])) + (", ..." if len(tokens) > 5 else "")
    return f"{len(tokens)} token{'s' * (len(tokens) > 1)} ({shown})"
