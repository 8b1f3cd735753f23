"""What a report says of one merge as JSON, which is made once for each merge."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import takewhile, zip_longest
from typing import Any, NamedTuple

from lightning_odem.parameters.json_text import JsonText, map_values, nan_to_none
from lightning_odem.report.merge_record import MergeRecord


class Line(NamedTuple):
    """A value as JSON.

    Args:
        of: The value.
        public: As it is in ``report.json``, with ``null`` for what was not measured.
        stored: As it is in the state of a stream, without what has its default value or was not measured.
    """

    of: Any
    public: JsonText
    stored: str


def record_line(record: MergeRecord) -> Line:
    """The record of a merge."""
    return Line(record, _public(record.as_dict()), json.dumps(record.stored()))


def score_line(scores: list[float]) -> Line:
    """The scores after a merge; stored from the first one that was measured, and an empty list if none was."""
    first = sum(1 for _ in takewhile(math.isnan, scores))
    return Line(scores, _public([] if first == len(scores) else scores), json.dumps(scores[first:]))


def lines(values: Sequence[Any], known: Sequence[Line], write: Callable[[Any], Line]) -> tuple[Line, ...]:
    """The line of each value: the known one of the same object in the same place, or one that is written now.

    Example:
        >>> first = lines([[0.5]], (), score_line)
        >>> both = lines([first[0].of, [0.25, 0.5]], first, score_line)
        >>> both[0] is first[0], both[1].public
        (True, '[0.25, 0.5]')
    """
    pairs = zip_longest(values, known[: len(values)])
    return tuple(line if line is not None and line.of is value else write(value) for value, line in pairs)


def _public(value: Any) -> JsonText:
    return JsonText(json.dumps(map_values(value, nan_to_none), allow_nan=False))
