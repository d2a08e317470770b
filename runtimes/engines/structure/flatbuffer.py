"""Checks a flatbuffer against a schema before a native library follows its offsets, which may lead anywhere in a damaged file.

Source: FlatBuffers' "FlatBuffer Internals" and its C++ Verifier, which libraries often do not call. This check also compares
indices with the length of the vectors that they point into.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from mmap import mmap

import numpy as np

# A schema lists the fields of each table in order. "4": a number of 4 bytes. "[4]": a vector of such numbers. "s": a text.
# "Name": another table. "[Name]": a vector of tables. "?3": a table whose kind is the number in field 3. None: a field that must
# be absent. "4<Name" and "[4]<Name": indices into the last vector of these tables, or with "<Name*" into the longest one.
Schema = Mapping[str, tuple[str | None, ...]]
_FIELD = re.compile(r"(?P<vector>\[)?(?P<kind>[\w?]+)\]?(?:<(?P<limit>[\w*]+))?")
_FORMATS = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


class Damaged(ValueError):
    """The bytes are not a flatbuffer of the schema."""


class Verifier:
    """Walks once over every table that can be reached."""

    lowest = 0  # the smallest index in a vector of indices; -1 where that stands for no index

    def __init__(self, data: bytes | mmap, schema: Schema, unions: Mapping[str, Mapping[int, str]]) -> None:
        """Prepare a check.

        Args:
            data: the file.
            schema: tables by name.
            unions: Table.field -> the kind of a union's table -> its name in the schema. Other kinds are taken as numbers.
        """
        self._data, self._size, self._unions = data, len(data), unions
        self._schema = {
            name: [None if field is None else _parsed(field) for field in fields] for name, fields in schema.items()
        }
        self._seen: set[tuple[int, str]] = set()
        self._counts: dict[str, int] = {}

    def check(self, root: str) -> None:
        """Check the whole file.

        Raises:
            Damaged: something leads out of the file, or is not what the schema says.
        """
        self._table(self._follow(0), root)

    def check_table(self, name: str, numbers: Mapping[int, int]) -> None:
        """Hook for checks that a schema cannot express; `numbers` are the table's numbers by field."""

    def _table(self, at: int, name: str) -> None:
        if (at, name) in self._seen:
            return
        self._seen.add((at, name))
        places, size = self._places(at)
        numbers: dict[int, int] = {}
        fields = self._schema.get(name)
        if fields is None:  # it holds only numbers, whose sizes are not known
            return
        for index, place in places.items():
            field = fields[index] if index < len(fields) else None
            if field is None:
                raise Damaged(f"{name} has a field {index}")
            kind, vector, _ = field
            width = int(kind) if kind.isdigit() and not vector else 4
            if place + width > size:
                raise Damaged(f"field {index} of {name} lies outside")
            if kind.isdigit() and not vector:
                numbers[index] = self._number(at + place, width)
            elif vector:
                self._register(kind, self._number(self._follow(at + place), 4))
        for index, place in places.items():
            self._field(name, index, at + place, numbers)
        self.check_table(name, numbers)

    def _field(self, name: str, index: int, at: int, numbers: Mapping[int, int]) -> None:
        field = self._schema[name][index]
        assert field is not None
        kind, vector, limit = field
        if vector and kind.isdigit():
            start, count = self._vector(self._follow(at), int(kind))
            if limit:
                # over a copy, because the file is closed later
                values = np.frombuffer(self._bytes(start, 4 * count), np.int32)
                if count and not self.lowest <= values.min() <= values.max() < self._counts.get(limit, 0):
                    raise Damaged(f"field {index} of {name} names a {limit.strip('*')} that is not there")
        elif vector:
            start, count = self._vector(self._follow(at), 4)
            for place in range(start, start + 4 * count, 4):
                self._table(self._follow(place), kind)
        elif kind == "s":
            start, count = self._vector(self._follow(at), 1)
            if self._bytes(start, count + 1)[-1]:
                raise Damaged(f"a text in {name} has no end")
            self._bytes(start, count).decode()  # libraries hand texts to Python; UnicodeDecodeError is a ValueError
        elif kind.startswith("?"):
            self._table(self._follow(at), self._unions[f"{name}.{index}"].get(numbers.get(int(kind[1:]), 0), "numbers"))
        elif not kind.isdigit():
            self._table(self._follow(at), kind)
        elif limit and not numbers[index] < self._counts.get(limit, 0):
            raise Damaged(f"field {index} of {name} names a {limit.strip('*')} that is not there")

    def _places(self, at: int) -> tuple[dict[int, int], int]:
        """Where a table's fields lie, from its start, by number; and the table's size."""
        (back,) = struct.unpack("<i", self._bytes(at, 4))
        numbers = at - back
        length, size = self._number(numbers, 2), self._number(numbers + 2, 2)
        if length < 4 or length % 2 or size < 4:
            raise Damaged("a table has no fields")
        self._bytes(at, size)
        places = struct.unpack(f"<{length // 2 - 2}H", self._bytes(numbers + 4, length - 4))
        if any(place >= size for place in places):
            raise Damaged("a field lies outside of its table")
        return {index: place for index, place in enumerate(places) if place}, size

    def _register(self, kind: str, count: int) -> None:
        self._counts[kind] = count
        self._counts[f"{kind}*"] = max(count, self._counts.get(f"{kind}*", 0))

    def _vector(self, at: int, width: int) -> tuple[int, int]:
        """Where a vector's items begin, and how many there are."""
        count = self._number(at, 4)
        self._bytes(at + 4, 0)
        if at + 4 + count * width > self._size or (at + 4) % width:
            raise Damaged("a vector lies outside")
        return at + 4, count

    def _follow(self, at: int) -> int:
        return at + self._number(at, 4)

    def _number(self, at: int, width: int) -> int:
        if at % width:
            raise Damaged("a number is not aligned")
        (result,) = struct.unpack(_FORMATS[width], self._bytes(at, width))
        return int(result)

    def _bytes(self, at: int, count: int) -> bytes:
        if not 0 <= at <= self._size - count:
            raise Damaged("an offset leads out of the file")
        return self._data[at : at + count]


def _parsed(field: str) -> tuple[str, bool, str | None]:
    match = _FIELD.fullmatch(field)
    assert match is not None, field
    return match["kind"], match["vector"] is not None, match["limit"]
