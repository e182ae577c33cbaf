"""Which values occur in the lines of a JSON Lines input, and the one Arrow type that holds them all, if there is one.

A survey does not depend on the order in which values are seen, but for the order of fields, which is that of their
first appearance.
"""

from enum import IntFlag
from typing import Any, Final

import numpy as np
import pyarrow as pa

#: Integers from here on are not all exact in a float64.
_FIRST_INEXACT: Final = 2**53
#: An object with more keys than this is used as a map; as a struct it would have a column for each.
_MAX_FIELDS: Final = 1000
#: Deeper types cannot be written to Arrow's own format, whose limit is 64 levels; a list of structs takes two.
_MAX_DEPTH: Final = 24


class Kind(IntFlag):
    """What a JSON value may be, null left out: it fits everywhere."""

    BOOL = 1
    INT = 2
    #: An integer that a float64 may not hold exactly.
    WIDE_INT = 4
    #: An integer beyond 64 bits.
    HUGE_INT = 8
    FLOAT = 16
    STRING = 32
    LIST = 64
    OBJECT = 128
    #: Objects with too many different keys for a struct.
    MAP = 256


_NAMES = {
    Kind.BOOL: "booleans",
    Kind.INT: "integers",
    Kind.WIDE_INT: "integers",
    Kind.HUGE_INT: "integers beyond 64 bits",
    Kind.FLOAT: "fractions",
    Kind.STRING: "strings",
    Kind.LIST: "lists",
    Kind.OBJECT: "objects",
    Kind.MAP: f"objects with more than {_MAX_FIELDS} different keys",
}
_SCALARS: "Final[list[tuple[Kind, pa.DataType]]]" = [
    (Kind.BOOL, pa.bool_()),
    (Kind.INT | Kind.WIDE_INT, pa.int64()),
    (Kind.INT | Kind.FLOAT, pa.float64()),
    (Kind.STRING, pa.string()),
]


class Survey:
    """The kinds of values seen at one place of the rows, and below it."""

    __slots__ = ("fields", "items", "kinds")

    def __init__(self) -> None:
        self.kinds = Kind(0)
        #: Of objects, by key.
        self.fields: dict[str, Survey] = {}
        #: Of lists.
        self.items: Survey | None = None

    def observe(self, value: object) -> None:
        """Take in one parsed JSON value."""
        if value is None:
            return
        if isinstance(value, str):
            self.kinds |= Kind.STRING
        elif isinstance(value, bool):
            self.kinds |= Kind.BOOL
        elif isinstance(value, int):
            self.kinds |= _kind_of_integer(value)
        elif isinstance(value, float):
            self.kinds |= Kind.FLOAT
        elif isinstance(value, list):
            self.kinds |= Kind.LIST
            items = self._items()
            for item in value:
                items.observe(item)
        elif isinstance(value, dict):
            self.kinds |= Kind.OBJECT
            for name, item in value.items():
                self.field(name).observe(item)
            self._limit_fields()

    def observe_array(self, array: "pa.Array[Any]") -> bool:
        """Take in a column as ``arrow_type`` has typed it. False: it holds numbers that only their text tells, so
        the survey is of no use."""
        found = array.type
        if pa.types.is_null(found) or array.null_count == len(array):
            return True
        if isinstance(array, pa.StructArray):
            self.kinds |= Kind.OBJECT
            fields = zip(found, array.flatten(), strict=True)
            return all(self.field(field.name).observe_array(child) for field, child in fields)
        if isinstance(array, pa.ListArray):
            self.kinds |= Kind.LIST
            return self._items().observe_array(array.flatten())
        if pa.types.is_integer(found):
            values = array.drop_null().to_numpy(zero_copy_only=False)
            is_wide = bool(((values >= _FIRST_INEXACT) | (values <= -_FIRST_INEXACT)).any())
            self.kinds |= Kind.WIDE_INT if is_wide else Kind.INT
            return True
        if pa.types.is_floating(found):
            self.kinds |= Kind.FLOAT
            # A wide integer that was rounded, or the text NaN, which is no JSON.
            return bool((np.abs(array.drop_null().to_numpy(zero_copy_only=False)) < _FIRST_INEXACT).all())
        self.kinds |= Kind.BOOL if pa.types.is_boolean(found) else Kind.STRING
        return True

    def merge(self, other: "Survey") -> None:
        """Take in all that ``other`` has seen."""
        self.kinds |= other.kinds
        for name, field in other.fields.items():
            self.field(name).merge(field)
        if other.items is not None:
            self._items().merge(other.items)
        self._limit_fields()

    def arrow_type(self, expected: pa.DataType | None = None, depth: int = 0) -> pa.DataType | None:
        """The type that holds every value seen; None when there is none.

        Integers beside fractions are float64 as long as that is exact. Where kinds are mixed and one of them is what
        ``expected`` says, that one is taken, and the values of other kinds do not fit.
        """
        kinds = self._expected_kinds(expected) if expected is not None else self.kinds
        if not kinds:
            return _type_of_nothing(expected)
        for fitting, scalar in _SCALARS:
            if kinds & fitting == kinds:
                return scalar
        if depth >= _MAX_DEPTH:
            return None
        if kinds == Kind.LIST:
            item = self._items().arrow_type(_child(expected), depth + 1)
            return None if item is None else pa.list_(item)
        # Parquet has no struct without fields.
        if kinds != Kind.OBJECT or not self.fields:
            return None
        fields = [(name, field.arrow_type(_child(expected, name), depth + 1)) for name, field in self.fields.items()]
        known = [(name, type_) for name, type_ in fields if type_ is not None]
        return pa.struct(known) if len(known) == len(fields) else None

    def field(self, name: str) -> "Survey":
        """The survey of one key's values."""
        if name not in self.fields:
            self.fields[name] = Survey()
        return self.fields[name]

    def mixture(self) -> str:
        """In words, the first place at or below this one whose values have no common type."""
        own = dict.fromkeys(_NAMES[kind] for kind in Kind if kind in self.kinds)
        if len(own) > 1 or self.kinds & (Kind.MAP | Kind.HUGE_INT):
            return " and ".join(own)
        below = [(f"under {name!r} ", field) for name, field in self.fields.items()]
        below += [("in lists ", self.items)] if self.items is not None else []
        for where, survey in below:
            if survey.arrow_type() is None:
                return where + survey.mixture()
        return "empty objects" if self.kinds == Kind.OBJECT and not self.fields else " and ".join(own)

    def _items(self) -> "Survey":
        if self.items is None:
            self.items = Survey()
        return self.items

    def _limit_fields(self) -> None:
        if len(self.fields) > _MAX_FIELDS or Kind.MAP in self.kinds:
            self.kinds |= Kind.MAP
            self.fields = {}

    def _expected_kinds(self, expected: pa.DataType) -> Kind:
        for is_it, kind in (
            (pa.types.is_string, Kind.STRING),
            (pa.types.is_integer, self.kinds & (Kind.INT | Kind.WIDE_INT)),
            (pa.types.is_list, Kind.LIST),
            (pa.types.is_struct, Kind.OBJECT),
        ):
            if is_it(expected) and self.kinds & kind:
                return kind
        return self.kinds


def _kind_of_integer(value: int) -> Kind:
    if -_FIRST_INEXACT < value < _FIRST_INEXACT:
        return Kind.INT
    return Kind.WIDE_INT if -(2**63) <= value < 2**63 else Kind.HUGE_INT


def _type_of_nothing(expected: pa.DataType | None) -> pa.DataType:
    """Where no value but null was seen: a column of nulls could not hold the values that tomorrow's shards may have."""
    if expected is None:
        return pa.string()
    has_type = not isinstance(expected, pa.StructType) or expected.num_fields > 0
    return expected if has_type else pa.null()


def _child(expected: pa.DataType | None, name: str | None = None) -> pa.DataType | None:
    """What is expected of a list's items, or of a struct's field."""
    child: pa.DataType | None = None
    if isinstance(expected, pa.ListType):
        child = expected.value_type
    elif name is not None and isinstance(expected, pa.StructType) and expected.get_field_index(name) >= 0:
        child = expected.field(name).type
    return child
