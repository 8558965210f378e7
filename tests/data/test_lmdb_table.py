from __future__ import annotations

import errno
import hashlib
import multiprocessing
import operator
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmd2.data.lmdb_table import (
    FIRST_MAP,
    NUMBERS,
    ROWS_PER_BATCH,
    Column,
    Table,
    TableWriter,
)
from dmd2.errors import Refused

COLUMNS = {
    "prompt": Column("text"),
    "latent": Column("float16", (4, 2, 2)),
    "label": Column("int64"),
    "png": Column("bytes"),
}


def row(index: int) -> dict[str, Any]:
    latent = np.random.default_rng(index).normal(size=(4, 2, 2)).astype(np.float16)
    return {"prompt": f"Bär {index}", "latent": latent, "label": index, "png": bytes(index % 7)}


def written(path: Path, columns: Mapping[str, Column], rows: Iterable[Mapping[str, Any]]) -> Path:
    with TableWriter(path, columns) as writer:
        for one in rows:
            writer.append(one)
    return path


def bits(value: Any) -> Any:
    return np.asarray(value).tobytes() if isinstance(value, np.ndarray | int) else value


def same(got: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Equal to the bit, so that NaN is NaN."""
    return {name: bits(value) for name, value in got.items()} == {n: bits(v) for n, v in expected.items()}


def content(path: Path) -> str:
    digest = hashlib.sha256()
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        for pair in transaction.cursor():
            digest.update(repr(pair).encode())
    return digest.hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.lmdb", COLUMNS, map(row, range(5)))


def test_rows_return_as_they_were_appended(path: Path) -> None:
    table = Table(path)
    assert len(table) == 5
    assert all(same(got, row(index)) for index, got in enumerate(table))
    assert table.column("prompt", 4) == "Bär 4"
    assert table.column("png", 3) == bytes(3)
    assert os.listdir(path.parent) == ["rows.lmdb"]


def test_dtype_and_shape_are_inside(path: Path) -> None:
    table = Table(path)
    assert table.columns == COLUMNS
    assert list(table.columns) == list(COLUMNS)
    latent = table.column("latent", 0)
    assert isinstance(latent, np.ndarray)
    assert (latent.dtype.name, latent.shape) == ("float16", (4, 2, 2))
    latent += 1  # belongs to the caller
    assert same(table[0], row(0))


def values(column: Column) -> st.SearchStrategy[Any]:
    if column.dtype == "bytes":
        return st.binary(max_size=9000)
    return st.text() if column.dtype == "text" else hnp.arrays(column.dtype, column.shape)


shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
some_columns = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_.-]{1,9}", fullmatch=True),
    st.sampled_from([Column("bytes"), Column("text")]) | st.builds(Column, st.sampled_from(NUMBERS), shapes),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    some_columns.flatmap(
        lambda columns: st.tuples(
            st.just(columns),
            st.lists(st.fixed_dictionaries({n: values(c) for n, c in columns.items()}), max_size=4),
        )
    )
)
def test_any_columns_return_to_the_bit(made: tuple[dict[str, Column], list[dict[str, Any]]]) -> None:
    columns, rows = made
    with TemporaryDirectory() as folder:
        table = Table(written(Path(folder) / "t", columns, rows))
        assert table.columns == columns
        assert len(table) == len(rows)
        assert all(same(got, expected) for got, expected in zip(table, rows, strict=True))


def test_the_map_grows_past_its_first_size_and_no_row_is_lost(tmp_path: Path) -> None:
    images = {"image": Column("uint8", (30_000,))}
    count = 2 * ROWS_PER_BATCH + 200
    rows = ({"image": np.full(30_000, index % 251, np.uint8)} for index in range(count))
    table = Table(written(tmp_path / "big", images, rows))
    assert table.path.stat().st_size > 32 * FIRST_MAP
    assert table.path.stat().st_size < 1.1 * count * 32_768  # each row fills eight pages
    assert [int(np.ptp(got["image"]) + got["image"][0]) for got in table] == [i % 251 for i in range(count)]


def test_a_forked_process_reads_what_its_parent_opened(path: Path) -> None:
    table, also = Table(path), Table(path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put([table[3], also[4], table[1]]))
    process.start()
    got = queue.get(timeout=60)
    process.join()
    assert all(map(same, got, map(row, (3, 4, 1))))
    assert same(table[2], row(2))


def test_a_spawned_process_reads_a_pickled_table(path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert same(pool.apply(operator.getitem, (Table(path), 3)), row(3))


def test_a_pickle_holds_the_path_only(path: Path) -> None:
    assert len(pickle.dumps(Table(path))) < len(str(path)) + 150
    with pytest.raises(Refused, match="no column"):
        pickle.loads(pickle.dumps(Table(path))).column("x", 0)


def in_a_child(action: Callable[[], object]) -> int:
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_a_killed_writer_leaves_no_table_and_the_next_one_starts_anew(tmp_path: Path) -> None:
    def killed() -> None:
        with TableWriter(tmp_path / "t", COLUMNS) as writer:
            for index in range(ROWS_PER_BATCH + 1):
                writer.append(row(index))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(killed) == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".t.partial"]
    assert len(Table(written(tmp_path / "t", COLUMNS, [row(0)]))) == 1
    assert os.listdir(tmp_path) == ["t"]


def test_a_writer_that_failed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        written(tmp_path / "t", COLUMNS, (row(6 // (2 - index)) for index in range(3)))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("limit", [4096, 1 << 16, 3_000_000])
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files cuts writes short as a full disk does."""

    def filling() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            written(tmp_path / "t", {"x": Column("bytes")}, ({"x": bytes(9000)} for _ in range(2500)))
        except OSError as error:
            os._exit(0 if error.filename == str(tmp_path / "t") else error.errno or 1)

    assert in_a_child(filling) == 0
    assert not os.listdir(tmp_path)


def test_a_cut_write_is_named_no_space(tmp_path: Path) -> None:
    def filling() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            written(tmp_path / "t", {"x": Column("bytes")}, [{"x": bytes(500_000)}])
        except OSError as error:
            os._exit(error.errno or 1)

    assert in_a_child(filling) == errno.ENOSPC


def test_the_same_rows_give_the_same_bytes(path: Path, tmp_path: Path) -> None:
    again = written(tmp_path / "again", COLUMNS, map(row, range(5)))
    assert again.read_bytes() == path.read_bytes()
    assert content(again) == content(path)
    more = [written(tmp_path / name, COLUMNS, map(row, range(3333))) for name in "ab"]
    assert more[0].read_bytes() == more[1].read_bytes()
    assert content(written(tmp_path / "other", COLUMNS, map(row, range(1, 6)))) != content(path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("latent", np.zeros((4, 2, 2), np.float32), r"takes float16 \(4, 2, 2\), not float32 \(4, 2, 2\)"),
        ("latent", np.zeros((4, 4), np.float16), r"not float16 \(4, 4\)"),
        ("latent", 3, "not int 3"),
        ("label", 2**63, "takes int64"),
        ("label", 1.0, "not float 1.0"),
        ("prompt", b"bytes", "takes text, not bytes b'bytes'"),
        ("prompt", "\ud800", "takes text"),
        ("png", "text", "takes bytes, not str"),
    ],
)
def test_a_wrong_value_is_refused_with_its_row_and_column(
    tmp_path: Path, name: str, value: Any, words: str
) -> None:
    with pytest.raises(Refused, match=rf"row 1 of .*{name}.*{words}"):
        written(tmp_path / "t", COLUMNS, [row(0), row(1) | {name: value}])
    assert not os.listdir(tmp_path)


def test_wrong_columns_are_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "'float16'" in refusal(lambda: Column("flaot16"))
    assert "no column of text has rows of shape (3,)" in refusal(lambda: Column("text", (3,)))
    assert "a/b" in refusal(lambda: TableWriter(tmp_path / "t", {"a/b": Column("text")}))
    assert "one or more" in refusal(lambda: TableWriter(tmp_path / "t", {}))
    missing = {"prompt": "x"}
    assert "has columns ['prompt']" in refusal(lambda: written(tmp_path / "t", COLUMNS, [missing]))


def test_what_is_not_there_is_refused(path: Path, refusal: Callable[..., str]) -> None:
    table = Table(path)
    assert "no row 5; it has 5" in refusal(lambda: table[5])
    assert "no row -1" in refusal(lambda: table[-1])
    assert "did you mean 'latent'" in refusal(lambda: table.column("latents", 0))


def test_a_path_in_use_is_refused(path: Path, refusal: Callable[..., str]) -> None:
    assert "exists" in refusal(lambda: written(path, COLUMNS, []))
    with TableWriter(path.with_name("t"), COLUMNS) as writer:
        assert "is writing" in refusal(lambda: written(path.with_name("t"), COLUMNS, []))
        writer.append(row(0))
    assert len(Table(path.with_name("t"))) == 1


def pairs(path: Path, content: Mapping[str, bytes]) -> Path:
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        for key, value in content.items():
            transaction.put(key.encode(), value)
    return path


def test_files_that_are_no_table_are_refused(path: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "text").write_bytes(b"hello" * 3000)
    (tmp_path / "empty").touch()
    for name in ("text", "empty"):
        assert "cannot be opened as an LMDB database" in refusal(lambda name=name: Table(tmp_path / name))
    for name in ("nowhere", "."):
        assert "is not a file" in refusal(lambda name=name: Table(tmp_path / name))
    for name, value in {"a": b"{}", "b": b"\xff", "c": b"[]"}.items():
        other = pairs(tmp_path / name, {"table": value})
        assert "but no table" in refusal(lambda other=other: Table(other))
    later = pairs(tmp_path / "later", {"table": b'{"version": 2}'})
    assert "layout 2" in refusal(lambda: Table(later))


@pytest.mark.parametrize("missing", [1, 9000, 200_000, 449_000])
def test_a_truncated_file_is_refused_and_no_bus_error(
    tmp_path: Path, refusal: Callable[..., str], missing: int
) -> None:
    table = written(tmp_path / "t", {"x": Column("bytes")}, [{"x": bytes(9000)}] * 50)
    os.truncate(table, table.stat().st_size - missing)
    assert "is truncated to" in refusal(lambda: Table(table))
