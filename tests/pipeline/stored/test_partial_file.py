"""A file of which some blocks are here: what is read is right, and fetched once."""

import itertools
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.stored import artifact, partial_file
from prefcache.pipeline.stored.partial_file import Block, PartialFile

DATA = os.urandom(1000)
BORDERS = [0, 100, 150, 400, 1000]


def blocks_of(data: bytes, borders: list[int]) -> list[Block]:
    return [Block(a, b, artifact.checksum_bytes(data[a:b])) for a, b in itertools.pairwise(borders)]


class Source:
    """Bytes that are fetched, and a list of what was."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data, self.fetched = data, list[tuple[int, int]]()

    def __call__(self, start: int, end: int) -> bytes:
        self.fetched.append((start, end))
        return self.data[start:end]


def open_file(folder: Path, source: Source) -> PartialFile:
    return PartialFile(folder / "a", "s3://bucket/a", blocks_of(DATA, BORDERS), source)


def test_each_block_is_fetched_once_by_all_processes_together(tmp_path):
    source = Source()
    with open_file(tmp_path, source) as file:
        assert file.read_at(90, 110) == DATA[90:110]
        assert file.read_at(0, 150) == DATA[:150]
    assert source.fetched == [(0, 100), (100, 150)]
    with open_file(tmp_path, source) as file:  # as another process would
        assert file.read_at(20, 401) == DATA[20:401]
    assert source.fetched[2:] == [(150, 400), (400, 1000)]


def test_it_reads_as_a_file_does(tmp_path):
    with open_file(tmp_path, Source()) as file:
        assert file.seek(-10, os.SEEK_END) == 990 and file.read() == DATA[990:] and file.read() == b""
        assert file.seek(5) == 5 and file.read(3) == DATA[5:8] and file.tell() == 8
        assert file.seek(2, os.SEEK_CUR) == 10 and file.read(1) == DATA[10:11]


def test_a_block_of_other_bytes_is_refused_and_not_kept(tmp_path):
    wrong = Source(DATA[:120] + bytes([DATA[120] ^ 1]) + DATA[121:])
    with open_file(tmp_path, wrong) as file:
        assert file.read_at(0, 100) == DATA[:100]
        with pytest.raises(IntegrityError, match=r"s3://bucket/a has other bytes than were written \(checksum\)"):
            file.read_at(0, 101)
    with open_file(tmp_path, Source()) as file:
        assert file.read_at(0, 150) == DATA[:150]


@pytest.mark.parametrize("answer", [b"", b"x", DATA + b"x"])
def test_an_answer_of_another_length_is_refused(tmp_path, answer):
    with open_file(tmp_path, lambda start, end: answer) as file, pytest.raises(IntegrityError, match="checksum"):
        file.read_at(0, 10)


@pytest.mark.parametrize("log", [b"0\n1\n2\n3\n", b"0", b"0\nx\n", b"9\n", b"-1\n", b"\xff\n", b"1 2\n"])
def test_what_the_log_says_is_believed_of_no_block_without_its_bytes(tmp_path, log):
    (tmp_path / "a.blocks").write_bytes(log)
    (tmp_path / "a").write_bytes(bytes(1000))
    with open_file(tmp_path, Source()) as file:
        assert file.read_at(0, 1000) == DATA


def test_a_copy_that_has_changed_is_fetched_again(tmp_path):
    source = Source()
    with open_file(tmp_path, source) as file:
        file.require(0, 1000)
    (tmp_path / "a").write_bytes(DATA[:500] + bytes(500))
    with open_file(tmp_path, source) as file:
        assert file.read_at(0, 1000) == DATA
    assert source.fetched[4:] == [(400, 1000)]


def test_a_large_block_is_fetched_a_piece_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(partial_file, "_PIECE_BYTES", 250)
    source = Source()
    with open_file(tmp_path, source) as file:
        assert file.read_at(500, 510) == DATA[500:510]
    assert source.fetched == [(400, 650), (650, 900), (900, 1000)]


def test_a_failed_fetch_leaves_the_file_as_it_was(tmp_path):
    def fail(start: int, end: int) -> bytes:
        raise OSError("the network is down")

    with open_file(tmp_path, fail) as file, pytest.raises(OSError, match="down"):
        file.read_at(0, 10)
    assert (tmp_path / "a.blocks").read_bytes() == b""


def test_threads_may_read_at_once(tmp_path):
    source, wrong = Source(), list[int]()
    with open_file(tmp_path, source) as file:

        def read(first: int) -> None:
            wrong.extend(i for i in range(first, 990, 7) if file.read_at(i, i + 10) != DATA[i : i + 10])

        threads = [threading.Thread(target=read, args=[n]) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and len(source.fetched) == 4


def test_what_was_removed_is_fetched_again(tmp_path):
    source = Source()
    with open_file(tmp_path, source) as file:
        file.require(0, 10)
    assert partial_file.remove(tmp_path / "a") and not partial_file.remove(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with open_file(tmp_path, source) as file:
        assert file.read_at(0, 10) == DATA[:10]
    assert source.fetched == [(0, 100), (0, 100)]


def test_a_sparse_file_takes_the_space_of_what_is_there(tmp_path):
    size, last = 1 << 30, bytes(4096)
    blocks = [Block(0, size - 4096, "0" * 32), Block(size - 4096, size, artifact.checksum_bytes(last))]
    with PartialFile(tmp_path / "a", "a", blocks, lambda start, end: last) as file:
        file.require(size - 4096, size)
    assert (tmp_path / "a").stat().st_size == size and (tmp_path / "a").stat().st_blocks * 512 < 1 << 20


def test_arrow_reads_a_table_of_which_nothing_is_there(tmp_path):
    table = pa.table({"a": list(range(500)), "b": [f"text {i}" for i in range(500)]})
    pq.write_table(table, tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    with PartialFile(tmp_path / "part", "t", blocks_of(data, [0, 40, 900, len(data)]), Source(data)) as part:
        assert pq.ParquetFile(part).read() == table
