"""Reads large JSON files entry by entry, because their text needs several times the memory of what is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 24  # characters that are read at a time; in memory are these and one entry
SPACE = re.compile(r"[ \t\n\r]*")
NUMBER = re.compile(r"[-+.eE0-9]*")


def read_json(path: Path, keep: Callable[[Any], Any], *, chunk: int = CHUNK) -> Any:
    """Return what ``json.loads`` returns for the file's text, with each list entry replaced by what ``keep`` returns.

    The file is read in chunks, so that its text is never in memory as a whole.

    Args:
        path: the file, in UTF-8.
        keep: called for each entry of the outermost list, or of the lists that are values of the outermost object, in
            their order; returns what to store in place of the entry.
        chunk: number of characters to read at a time.

    Raises:
        ValueError: the file is not JSON (the message gives the position), nested too deeply, or not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file:
        return _Reader(file, keep, chunk).whole()


class _Reader:
    def __init__(self, file: TextIO, keep: Callable[[Any], Any], chunk: int) -> None:
        self.file, self.keep, self.chunk = file, keep, chunk
        self.text, self.at = "", 0  # the text in memory, and the position of the parser in it
        self.gone = 0  # number of characters before this text
        self.decode = json.JSONDecoder().raw_decode

    def whole(self) -> Any:
        content = self._object() if self._next() == "{" else self._list_or_value()
        if self._next():
            raise ValueError(f"expected the end at character {self._where()}, got {self._next()!r}")
        return content

    def _object(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        self.at += 1
        while self._next() != "}":
            if content:
                self._take(",")
            if self._next() != '"':
                raise ValueError(f"expected a name in double quotes at character {self._where()}")
            name = self._value()
            self._take(":")
            content[name] = self._list_or_value()
        self.at += 1
        return content

    def _list_or_value(self) -> Any:
        return self._list() if self._next() == "[" else self._value()

    def _list(self) -> list[Any]:
        entries: list[Any] = []
        self.at += 1
        if self._next() != "]":
            entries.append(self.keep(self._value()))
            while self._next() == ",":
                self.at += 1
                entries.append(self.keep(self._value()))
        self._take("]")
        return entries

    def _value(self) -> Any:
        """Return the next value; more text is read until it is complete."""
        while self._next():
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._read():
                    raise ValueError(f"{error.msg} at character {self.gone + error.pos}") from None
                continue
            except ValueError:  # Python converts a limited number of digits
                raise ValueError(f"a number with too many digits after character {self._where()}") from None
            except RecursionError:
                raise ValueError(f"nested too deeply after character {self._where()}") from None
            if not (isinstance(value, (int, float)) and self._may_go_on(end) and self._read()):
                self.at = end
                return value
        raise ValueError(f"expected a value at character {self._where()}, got the end")

    def _may_go_on(self, end: int) -> bool:
        """Whether a number may be continued by the text that has not been read yet."""
        return NUMBER.match(self.text, end).end() == len(self.text)  # type: ignore[union-attr]  # it also matches the empty string

    def _take(self, expected: str) -> None:
        if self._next() != expected:
            got = repr(self._next()) if self._next() else "the end"
            raise ValueError(f"expected {expected!r} at character {self._where()}, got {got}")
        self.at += 1

    def _next(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it also matches ""
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def _read(self) -> bool:
        part = self.file.read(self.chunk)
        if part:
            self.gone += self.at
            self.text, self.at = self.text[self.at :] + part, 0
        return bool(part)

    def _where(self) -> int:
        return self.gone + self.at
