"""Prompts: what is in the file, in its order, and nothing that a file could do."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmd2.data.prompts import PlainUnpickler, read_prompts
from dmd2.io.storage import open_store

PROMPTS = ["a cat", "a dog, in rain", "a cat", "ein Käfer\u2028 auf Gras"]

Refusal = Callable[[Callable[[], object]], str]


def text(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*PROMPTS[:2], "", "  ", *PROMPTS[2:]]).encode())


def lines(path: Path, field: str = "caption", **more: object) -> None:
    path.write_text("\n\n".join(json.dumps({"url": "x", field: p} | more) for p in [*PROMPTS, " "]))


def table(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([["Prompt", "url"], *([p, "x"] for p in [*PROMPTS, " "])])


def parquet(path: Path, column: str = "prompt") -> None:
    pq.write_table(pa.table({"url": [1] * 5, column: [*PROMPTS, ""]}), path)


def pickled(path: Path, protocol: int = 4) -> None:
    path.write_bytes(pickle.dumps([*PROMPTS, ""], protocol))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.txt", text),
        ("a.jsonl", lines),
        ("a.csv", table),
        ("a.parquet", parquet),
        *[(f"{p}.pkl", lambda path, p=p: pickled(path, p)) for p in range(6)],
    ],
)
def test_every_format_gives_the_same_prompts(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    assert read_prompts(str(tmp_path / name)) == PROMPTS


def test_none_in_a_pickled_list_is_an_empty_prompt_as_in_the_reference(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(["a cat", None, " ", "a dog"]))
    assert read_prompts(str(tmp_path / "a.pkl")) == ["a cat", "", "a dog"]


def test_the_address_chooses_the_column(tmp_path: Path, refusal: Refusal) -> None:
    lines(tmp_path / "a.jsonl", "ALT", text="another")
    parquet(tmp_path / "a.parquet", "ALT")
    for name in ("a.jsonl", "a.parquet"):
        assert read_prompts(f"ALT:{tmp_path / name}") == PROMPTS
        assert "did you mean 'ALT'" in refusal(lambda name=name: read_prompts(f"ALTS:{tmp_path / name}"))  # type: ignore[misc]
    assert "has no column or field of captions, named text, caption" in refusal(
        lambda: read_prompts(str(tmp_path / "a.parquet"))
    )
    text(tmp_path / "a.txt")
    assert "has no columns" in refusal(lambda: read_prompts(f"text:{tmp_path / 'a.txt'}"))


def test_prompts_are_read_from_a_bucket(bucket: str, tmp_path: Path, refusal: Refusal) -> None:
    for name, make in (("a.txt", text), ("a.jsonl", lines), ("a.parquet", parquet), ("a.pkl", pickled)):
        make(tmp_path / name)
        open_store(f"{bucket}/prompts").upload(tmp_path / name, name)
        assert read_prompts(f"{bucket}/prompts/{name}") == PROMPTS
        assert "does not exist" in refusal(lambda name=name: read_prompts(f"{bucket}/none/{name}"))  # type: ignore[misc]
    assert read_prompts(f"caption:{bucket}/prompts/a.jsonl") == PROMPTS


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


class State:
    """Makes BUILD, and OBJ or NEWOBJ."""

    def __init__(self) -> None:
        self.text = "a cat"


class Outside(pickle.Pickler):
    def persistent_id(self, thing: object) -> object:
        return "elsewhere" if thing == "outside" else None


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_a_hostile_pickle_is_refused_and_does_not_run(
    protocol: int, nested: bool, tmp_path: Path, refusal: Refusal
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "a.pkl"
    hostile = Hostile(marker)
    path.write_bytes(pickle.dumps({"a": ["x", {"b": hostile}]} if nested else hostile, protocol))
    assert "nothing of it was run" in refusal(lambda: read_prompts(str(path)))
    with pytest.raises(pickle.UnpicklingError, match="it names"), path.open("rb") as stream:
        PlainUnpickler(stream).load()
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # so it was a real one


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps([State()], 0), "GLOBAL"),
        (pickle.dumps([State()], 4), "STACK_GLOBAL"),
        (b"(S'true'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'true'\no.", "GLOBAL"),
        (b"(S'true'\nS'true'\no.", "OBJ"),
        (b"\x80\x02]}b.", "BUILD"),
        (b"\x80\x02]q\x00)R.", "REDUCE"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Pelsewhere\n.", "PERSID"),
        (b"]r\xff\xff\xff\x7f.", "LONG_BINPUT"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "is no pickle"),
        (b"L" + b"9" * 5000 + b"L\n.", "is no pickle"),
        (pickle.dumps(PROMPTS)[:-4], "is no pickle"),
        (b"", "is no pickle"),
        (pickle.dumps({"a": "b"}), "is a pickled dict"),
        (pickle.dumps("one prompt"), "is a pickled str"),
        (pickle.dumps(["a", "b", 3]), "prompt 2 is 3, a int"),
        (pickle.dumps(["a", ["b"] * 1000]), "prompt 1 is ['b', 'b'"),
        (pickle.dumps([]), "holds no prompts"),
    ],
)
def test_a_pickle_of_anything_but_strings_is_refused(
    data: bytes, words: str, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / "a.pkl").write_bytes(data)
    sentence = refusal(lambda: read_prompts(str(tmp_path / "a.pkl")))
    assert words in sentence
    assert len(sentence) < 500 + len(str(tmp_path))


def test_a_pickle_that_refers_to_something_outside_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    with (tmp_path / "a.pkl").open("wb") as stream:
        Outside(stream, 4).dump(["a cat", "outside"])
    assert "BINPERSID" in refusal(lambda: read_prompts(str(tmp_path / "a.pkl")))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.tsv", b"", "known: .csv, .jsonl, .parquet, .pickle, .pkl, .txt"),
        ("a.csv", b"text,url\na, b, c\n", "line 2 has another number of values"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"one\ntw\xff\n", "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'["a"]', "line 1 is a list"),
        ("a.jsonl", b'{"txt": "a"}', "line 1 has no column or field of captions, named text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', "prompt 1 is None"),
        ("a.parquet", b"PAR1", "no Parquet file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(
    name: str, data: bytes, words: str, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / name).write_bytes(data)
    assert words in refusal(lambda: read_prompts(str(tmp_path / name)))


def test_a_missing_file_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.pkl"):
        assert "does not exist" in refusal(lambda name=name: read_prompts(str(tmp_path / name)))  # type: ignore[misc]
