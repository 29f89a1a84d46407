"""JSON that is read in chunks of any size gives what the json module gives, and the same input is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastkd.yolov3.data.json_stream import read_json

TEXTS = [
    "{}",
    " [1, 2] ",
    '"alone"',
    "  -12.5e3",
    '{"images": [], "info": {"a": [1, {"b": null}]}, "licences": [ ]}',
    '{"list":[{"bbox":[1,2.5,-3e2,4],"name":"}],[{\\""},{"id":12345678901234567890},true],"n":123456,"t":"\\u00e9 é"}',
    ' \n{ "a" : [ 1 , 22 ,\t333 ] ,\r\n "a" : [ NaN, -Infinity ], "c" : false }\n\n',
]
BROKEN = [
    "",
    "{",
    "{]",
    '{"a"}',
    '{"a": }',
    '{"a": [1 2]}',
    '{"a": [1,]}',
    '{"a": [1, 2',
    '{"a": [{"b": 1]}',
    '{"a": 1,}',
    '{"a": 1 "b": 2}',
    "{'a': 1}",
    '{"a": "x',
    "{} {}",
    "  12 {}",
    '{"a": tru}',
]


def read(text: str, folder: Path, chunk: int) -> Any:
    file = folder / "a.json"
    file.write_text(text, encoding="utf-8")
    return read_json(file, lambda entry: entry, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_any_size_give_the_whole(text: str, chunk: int, tmp_path: Path) -> None:
    assert repr(read(text, tmp_path, chunk)) == repr(json.loads(text))


@pytest.mark.parametrize("outer", ['{"a": %s, "b": 1}', "%s"])
def test_every_entry_is_kept_once_wherever_a_piece_ends(outer: str, tmp_path: Path) -> None:
    entries = [{"id": i, "inner": {"id": -i}} for i in range(5)] + [12, "x"]
    file = tmp_path / "a.json"
    file.write_text(outer % json.dumps(entries))
    for chunk in range(1, 150):
        seen: list[Any] = []
        content = read_json(file, seen.append, chunk=chunk)
        assert seen == entries
        assert (content["a"] if isinstance(content, dict) else content) == [None] * len(entries)


def test_what_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply after character 5"):
        read('{"a":{"b":' + "[" * 200_000, tmp_path, 1 << 20)


@pytest.mark.parametrize("chunk", [1000, 100_000])
def test_a_number_of_too_many_digits_is_refused_with_its_place(chunk: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too many digits after character 5"):
        read('{"a":' + "1" * 50_000 + "}", tmp_path, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_json_is_refused_with_its_place(text: str, chunk: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"character \d+") as error:
        read(text, tmp_path, chunk)
    with pytest.raises(ValueError, match=re.escape(str(error.value))):
        read(text, tmp_path, 1000)


def test_a_mark_of_the_byte_order_is_no_part_of_it(tmp_path: Path) -> None:
    assert read("\ufeff[1]", tmp_path, 1) == [1]
