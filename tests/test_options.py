"""Options in dataclasses: what is converted, what is refused, and how text is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pliant._options import Arguments, Count, PathText, Probability, check, parse, refuse_unknown

Shape = Literal["round", "square"]


@dataclass(frozen=True, kw_only=True)
class Options:
    size: Count = 1
    share: Probability = 0.5
    limit: Annotated[float, Field(gt=0)] | None = None
    shape: Shape = "round"
    loud: bool = False
    place: PathText | None = None
    more: Arguments = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)


def test_values_become_what_their_types_say():
    found = Options(share=1, limit=2, place=Path("a", "b"), more={"sizes": (1, (2, 3)), 4: None})
    assert [type(v) for v in (found.share, found.limit)] == [float, float]
    assert found.place == str(Path("a", "b"))
    assert found.more == {"sizes": [1, [2, 3]], "4": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "^size must be greater than or equal to 1, not 0$"),
        ({"size": True}, "^size must be a valid integer, not True$"),
        ({"size": 1.0}, "^size must be a valid integer, not 1.0$"),
        ({"share": float("nan")}, "^share must be a finite number, not nan$"),
        ({"limit": "1"}, "^limit must be a valid number, or none, not '1'$"),
        ({"shape": "oval"}, "^shape must be 'round' or 'square', not 'oval'$"),
        ({"loud": 1}, "^loud must be a valid boolean, not 1$"),
        ({"more": {"f": len}}, "^more: <built-in .*len> cannot be kept in a file; only numbers, text"),
        ({"size": -1, "loud": None}, "^size must be .*, not -1; loud must be a valid boolean, not None$"),
    ],
)
def test_wrong_values_are_named_with_what_would_be_right(values, message):
    with pytest.raises(ValueError, match=message) as told:
        Options(**values)
    assert type(told.value) is ValueError  # none of pydantic's, which prints a report


def test_text_is_read_by_type():
    found = parse(
        Options, {"size": "3", "limit": "none", "shape": "square", "loud": "true", "place": "None"}
    )
    assert found == {"size": 3, "limit": None, "shape": "square", "loud": True, "place": None}
    assert parse(Options, {"limit": "1e-3"}) == {"limit": 1e-3}
    with pytest.raises(ValueError, match=r"^size must be a valid integer, not 'none'$"):
        parse(Options, {"size": "none"})
    with pytest.raises(ValueError, match=r"^loud must be a valid boolean, not 'perhaps'$"):
        parse(Options, {"loud": "perhaps"})


def test_unknown_options_are_refused_with_close_names_or_all():
    refuse_unknown(["size"], ["size", "share"], "a test")
    with pytest.raises(ValueError, match=r"^a test has no option 'sise'; did you mean size\?$"):
        refuse_unknown(["sise"], ["size", "share"], "a test")
    with pytest.raises(ValueError, match=r"^a test has no option 'x'; known: none$"):
        refuse_unknown(["x"], [], "a test")
