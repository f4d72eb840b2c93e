import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from vaescale import files
from vaescale.files import is_plain, parse_json, printable, read_bytes, read_json

DEEP = files.MOST_DEPTH


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (b"", r"not JSON \(line 1, column 1"),
        (b"{", "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'["\n"]', "not JSON"),
        (b"[1e39, 1e400]", "the number 1e400, which is too large"),
        (b"[-1e999]", "the number -1e999, which is too large"),
        (b"[NaN]", "contains NaN"),
        (b"[-Infinity]", "contains -Infinity"),
        (b"[9223372036854775808]", "the number 9223372036854775808, which is too large"),
        (b"[-9223372036854775809]", "which is too large"),
        (b"[" + b"9" * 10**6 + b"]", "the number 9999999999999999999999999, which is too large"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' twice"),
        (b'{"\\u001b[31m": 1, "\\u001b[31m": 2}', r"the key '\\\\x1b\[31m' twice"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'[{"a": ["\\ud83d \\ude00"]}]', "half of a surrogate pair"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
        (b'["\xed\xa0\x80"]', "not UTF-8"),
        (b"\xff\xfe[\x001\x00]\x00", "not UTF-8"),
        (b"[" * (DEEP + 1) + b"]" * (DEEP + 1), "nested more than"),
        (b'{"a":' * (DEEP + 1) + b"1" + b"}" * (DEEP + 1), "nested more than"),
        (b"[" * 10**6 + b"]" * 10**6, "nested more than"),
        (b'{"a":[' * 10**5 + b"]}" * 10**5, "nested more than"),
    ],
    ids=range(24),
)
def test_what_is_refused(text: bytes, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase) as caught:
        parse_json(text)
    assert type(caught.value) is ValueError
    assert is_plain(str(caught.value))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -(2**63), 2**63 - 1, 1e39, -1.5e308, 5e-324, "", "é 😀 \u200d \u2028", "\x00\x1b", [], {}),
        {"a": [1, {"b": None}], "": "[[[{{{", "\\": '"]}', 'x"[': "\\["},
        [[]] * 1000,
        [{}, [[], {"[": "{" * 100}]] * 20,
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("lenient", [True, False])
def test_what_json_writes_is_read_back(value: object, ascii_only: bool, lenient: bool) -> None:
    written = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_json(written, lenient) == value
    assert parse_json(b"\xef\xbb\xbf" + written, lenient) == value


def test_the_deepest_that_is_read() -> None:
    value: object = 1
    for level in range(DEEP):
        value = {"a]": value} if level % 2 else ["[{", value]
    assert parse_json(json.dumps(value).encode()) == value


def test_what_other_programs_write() -> None:
    value = parse_json(
        b'{"a": [NaN, Infinity, 1e400, 99999999999999999999], "b": "\\ud800", "c": "\xff"}', lenient=True
    )
    assert repr(value["a"]) == "[nan, inf, inf, 99999999999999999999]"
    assert (value["b"], value["c"]) == ("\ud800", "\ufffd")
    assert parse_json(b"[-" + b"9" * 10**6 + b"]", lenient=True) == [-float("inf")]
    with pytest.raises(ValueError, match="twice"):
        parse_json(b'{"a": 1, "a": 2}', lenient=True)
    with pytest.raises(ValueError, match="nested"):
        parse_json(b"[" * 10**5, lenient=True)


def test_an_index_of_100_000_shards_takes_no_time() -> None:
    text = json.dumps([[f"train-{i:06d}.tar", 1000, 10**8, f"{i:016x}"] for i in range(100_000)]).encode()
    begun = time.process_time()
    assert len(parse_json(text)) == 100_000
    assert time.process_time() - begun < 5  # 0.3 s on one core


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path = Path("/dev/zero")
    with pytest.raises(ValueError, match="it is not a regular file"):
        read_json(path)


def test_no_more_is_read_than_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[1]")
    assert read_json(path, 3) == [1]
    with pytest.raises(ValueError, match="more than 2 bytes"):
        read_json(path, 2)
    with path.open("wb") as file:
        file.truncate(2**40)  # holes
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 16777216 bytes"):
        read_json(path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("n01440764/a b_1.jpg", "n01440764/a b_1.jpg"),
        ("größe 😀 中\u3000文 a\u00a0b", "größe 😀 中\u3000文 a\u00a0b"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
        ("\x1b]0;owned\x07\x1b[2J", "\\x1b]0;owned\\x07\\x1b[2J"),
        ("a\r\nstep 7\tb\x7f\x9b31m", "a\\r\\nstep 7\\tb\\x7f\\x9b31m"),
        ("gpj.\u202eexe\u2066\u2028\u2029", "gpj.\\u202eexe\\u2066\\u2028\\u2029"),
        ("\ud800 \udcff", "\\ud800 \\udcff"),
    ],
)
def test_text_for_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert is_plain(text) == (text == shown)
    assert is_plain(shown)
    assert printable(shown) == shown
    shown.encode()


def test_long_text_is_cut() -> None:
    assert printable("x" * 10**6) == "x" * 1000 + "…"
    assert printable("x" * 9, 3) == "xxx…"
