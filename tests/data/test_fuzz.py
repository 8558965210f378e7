"""Damaged files of every format that is read: the answer is a result or a `Refused`, in bounded memory and time.

Each format has a good file, of which bytes are changed, moved, repeated and cut, and, where it holds JSON, values replaced by others.
The reader runs in a forked process whose address space is limited, so that a crash of a library is found too.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import tarfile
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dmd2.config import Config
from dmd2.data.account import Account
from dmd2.data.archives import open_zip
from dmd2.data.layouts import open_source
from dmd2.data.prompts import read_prompts
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, read_manifest
from dmd2.io.staging import draft_artifact

INPUTS = 10_000
"""Damaged files in all."""
MEMORY = 2**30
"""Bytes of address space that a reader may take beside what the process has."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**36, 2**63 - 1, 2**64 - 1)
Tree = Any
"""What JSON can say."""


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, format="PNG")
    return stream.getvalue()


def tar(**kind: Any) -> bytes:
    files = {
        "0.png": png(),
        "0.txt": b"a cat",
        "0.cls": b"0",
        "1.jpg": png(),
        "1.json": b'{"caption": "b"}',
        "1.cls": b"1",
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **kind) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo("x" * 120 + "/" + name)  # which needs an extended header
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()[:12288] + bytes(1024)


def tar_of_tar() -> bytes:
    stream, inner = io.BytesIO(), tar()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("n00000001.tar")
        member.size = len(inner)
        archive.addfile(member, io.BytesIO(inner))
    return stream.getvalue()


def zipped(method: int, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros((4, 4, 4), np.uint8), labels=np.arange(4))
    return stream.getvalue()


def parquet(notes: Tree = None, **columns: Any) -> bytes:
    table, stream = pa.table(columns), io.BytesIO()
    if notes is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(notes)})
    pq.write_table(table, stream)
    return stream.getvalue()


IDX = bytes([0, 0, 8, 3]) + struct.pack(">III", 4, 4, 4) + bytes(64)
LABELS: Tree = {"labels": [["a.png", 0], ["b.png", 1]]}
COCO: Tree = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [{"id": n, "image_id": n % 2 + 1, "caption": f"caption {n}"} for n in range(4)],
}
LINE: Tree = {"file_name": "a.png", "text": "a cat", "label": 0}
NOTES: Tree = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
EDM_FILES = {"dataset.json": json.dumps(LABELS).encode(), "a.png": png(), "b.png": png()}
IMAGES: dict[str, Any] = {"image": [png(), png()], "text": ["a", "b"], "label": [0, 1]}


@dataclass(frozen=True)
class Format:
    """A good file, and what reads it."""

    name: str
    """Of the file."""
    read: Callable[[Path], object]
    data: Callable[[], bytes] | None = None
    tree: Tree = None
    """Its JSON, whose values are replaced."""
    pack: Callable[[Tree], bytes] = lambda tree: json.dumps(tree).encode()
    """Makes the file from the JSON."""


def read_source(path: Path) -> None:
    """Read all records of a source; a record that is refused is a broken image."""
    open_zip.cache_clear()
    source = open_source(str(path))
    for records in [source.records, *(archive.records(Account()) for archive in source.archives)]:
        for record in records:
            try:
                record.read()
            except (Refused, FileNotFoundError):
                continue


def read_folder(path: Path) -> None:
    """As `read_source`, of a file beside two images."""
    for name in ("a.png", "b.png"):
        (path.parent / name).write_bytes(png())
    read_source(path.parent)


def read_digits(path: Path) -> None:
    (path.parent / "x-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 4]) + bytes(range(4)))
    read_source(path)


def read_strings(path: Path) -> None:
    assert all(isinstance(prompt, str) for prompt in read_prompts(str(path)))


def manifest() -> Tree:
    files = [{"path": f"{i}.tar", "size": i, "sha256": "0" * 64} for i in range(3)]
    rest = {"inputs": {"source": "a"}, "facts": {"train": 3}, "versions": {"torch": "2"}, "seconds": 1.0}
    return {"kind": "shards", "config": None, "files": files} | rest


FORMATS = {
    "tar of samples": Format("a.tar", read_source, tar),
    "tar of samples, GNU": Format("a.tar", read_source, lambda: tar(format=tarfile.GNU_FORMAT)),
    "tar of tars": Format("ILSVRC2012_img_train.tar", read_source, tar_of_tar),
    "zip": Format("a.zip", read_source, lambda: zipped(zipfile.ZIP_STORED, EDM_FILES)),
    "zip, compressed": Format("a.zip", read_source, lambda: zipped(zipfile.ZIP_DEFLATED, EDM_FILES)),
    "zip, labels": Format(
        "a.zip",
        read_source,
        tree=LABELS,
        pack=lambda tree: zipped(zipfile.ZIP_STORED, EDM_FILES | {"dataset.json": json.dumps(tree).encode()}),
    ),
    "npz": Format("a.npz", read_source, npz),
    "idx": Format("x-images-idx3-ubyte", read_digits, lambda: IDX),
    "idx, compressed": Format("x-images-idx3-ubyte.gz", read_digits, lambda: gzip.compress(IDX)),
    "captions of COCO": Format("captions_a.json", read_folder, tree=COCO),
    "labels of EDM": Format("dataset.json", read_folder, tree=LABELS),
    "metadata": Format(
        "metadata.jsonl",
        read_folder,
        tree=[LINE, LINE | {"file_name": "b.png"}],
        pack=lambda tree: "\n".join(map(json.dumps, tree if isinstance(tree, list) else [tree])).encode(),
    ),
    "Parquet": Format("a.parquet", read_source, lambda: parquet(**IMAGES)),
    "Parquet, notes": Format("a.parquet", read_source, tree=NOTES, pack=lambda tree: parquet(tree, **IMAGES)),
    "prompts, Parquet": Format("a.parquet", read_strings, lambda: parquet(text=["a", "b"] * 20)),
    "prompts, JSON Lines": Format("a.jsonl", read_strings, tree={"text": "a cat"}),
    "prompts, pickle": Format("a.pkl", read_strings, lambda: pickle.dumps(["a", "b", "a" * 300])),
    "prompts, old pickle": Format("a.pkl", read_strings, lambda: pickle.dumps(["a", "b" * 300], 0)),
    "prompts, text": Format("a.txt", read_strings, lambda: "ein Käse\r\nein 猫\n".encode()),
    "manifest": Format(MANIFEST, lambda path: read_manifest(path.parent, "shards"), tree=manifest()),
}


CHANGES: dict[str, Callable[[bytes, int, bytes, int], bytes]] = {
    "overwrite": lambda data, at, new, _: data[:at] + new + data[at + len(new) :],
    "insert": lambda data, at, new, _: data[:at] + new + data[at:],
    "flip": lambda data, at, _, size: data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :],
    "drop": lambda data, at, _, size: data[:at] + data[at + size :],
    "repeat": lambda data, at, new, size: data[:at] + data[at : at + size] * (2 + len(new)) + data[at:],
    "cut": lambda data, at, *_: data[:at],
}
"""Changes of bytes at a place, by other bytes and a size."""


def spellings(number: int) -> list[bytes]:
    """A number as headers hold it: binary, octal in a tar, decimal in a text."""
    widths = [width for width in (1, 2, 4, 8) if number < 1 << 8 * width]
    binary = [number.to_bytes(width, order) for width in widths for order in ("little", "big")]
    return [*binary, b"%011o\0" % (number % 8**11), b"%d" % number, b"-%d" % number]


PIECES = st.sampled_from([piece for number in NUMBERS for piece in spellings(number)]) | st.binary(
    max_size=64
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes after one to four changes."""
    for change in draw(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=4)):
        if data:
            at, size = draw(st.integers(0, len(data) - 1)), draw(st.sampled_from((1, 2, 4, 8, 12, 100, 512)))
            data = CHANGES[change](data, at, draw(PIECES), size)
    return data


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["", "..", "/etc/passwd", "a\0b", "a.png", "\ud800", "1e400"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_tree(draw: st.DrawFn, tree: Tree) -> Tree:
    """The tree with a value, a key or an entry of it replaced, dropped or repeated."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, change = (
        draw(st.sampled_from(keys)),
        draw(st.sampled_from(("inside", "inside", "inside", "drop", "more"))),
    )
    copied = tree.copy()
    if change == "drop":
        del copied[key]
    elif change == "inside":
        copied[key] = draw(damaged_tree(tree[key]))
    elif isinstance(copied, dict):
        copied[draw(st.text(max_size=6))] = tree[key]
    else:
        copied.append(tree[key])
    return copied


def damaged_files(form: Format) -> st.SearchStrategy[bytes]:
    if form.data:
        return damaged_bytes(form.data())
    return damaged_tree(form.tree).map(form.pack) | damaged_bytes(form.pack(form.tree))


def read_damaged(form: Format, folder: Path, count: int) -> None:
    """Read `count` damaged files of a format."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=10),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged_files(form))
    def read(data: bytes) -> None:
        seen.append(form.name)
        (folder / form.name).write_bytes(data)
        try:
            form.read(folder / form.name)
        except Refused:
            refused.append(form.name)

    seen: list[str] = []
    refused: list[str] = []
    form.read(put(folder / form.name, form.data() if form.data else form.pack(form.tree)))
    read()
    assert len(refused) > 0


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def in_a_limited_process(action: Callable[[], object], report: Path) -> None:
    """Run it in a fork with limited memory, and fail with its trace, or its signal."""
    child = os.fork()
    if not child:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        try:
            action()
            os._exit(0)
        except BaseException:
            report.write_text(traceback.format_exc())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, report.read_text() if report.exists() else f"ended by signal {os.WTERMSIG(status)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_gives_a_result_or_a_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    count = -(-INPUTS // len(FORMATS))
    in_a_limited_process(lambda: read_damaged(FORMATS[name], tmp_path / "files", count), tmp_path / "trace")


@pytest.mark.slow
def test_a_damaged_config_in_a_manifest_gives_a_result_or_a_sentence(tmp_path: Path, micro: Config) -> None:
    with draft_artifact(tmp_path / "good", "shards", micro, {}) as draft:
        (draft.path / "a.txt").write_text("a")
    tree = json.loads((tmp_path / "good" / MANIFEST).read_text())
    tree.pop("seal")  # or nothing else would be read
    form = Format(MANIFEST, lambda path: read_manifest(path.parent, "shards"), tree=tree)
    (tmp_path / "files").mkdir()
    in_a_limited_process(lambda: read_damaged(form, tmp_path / "files", 500), tmp_path / "trace")


def test_a_reader_that_raises_or_dies_is_noticed(tmp_path: Path) -> None:
    actions: dict[str, Callable[[], object]] = {
        "KeyError": lambda: {"a": 1}["b"],
        "signal 9": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "MemoryError": lambda: bytearray(2 * MEMORY),
    }
    for words, action in actions.items():
        with pytest.raises(AssertionError, match=words):
            in_a_limited_process(action, tmp_path / words)
