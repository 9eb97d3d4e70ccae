"""Arrays of archives are read by ranges as numpy reads them whole, and what lies is refused before it is allocated."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.interop import FormatError
from buffers.interop.arrays import Archive, as_flags, given_arrays, npy_directory, tree_of
from tests.interop.npy_files import npy, npz, pickled_objects, with_central_sizes

DTYPES = ["?", "u1", "<i2", ">i4", "<u8", "<f2", ">f4", "<f8", "<c8", "=i8"]


@settings(max_examples=15)
@given(data=st.data())
def test_any_range_of_rows_in_any_order_is_what_numpy_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = str(tmp_path_factory.mktemp("arrays") / "a.npz")
    dtype, is_fortran = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    shape = data.draw(st.sampled_from([(9,), (9, 3), (9, 2, 2), (9, 1)]))
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    values = np.asfortranarray(values) if is_fortran else values
    (np.savez_compressed if data.draw(st.booleans()) else np.savez)(path, values=values)
    archive = Archive(path)
    for _ in range(6):
        start = data.draw(st.integers(0, 9))
        stop = data.draw(st.integers(start, 9))
        rows = archive.columns["values"].rows(start, stop)
        np.testing.assert_array_equal(rows, np.load(path)["values"][start:stop])
        assert rows.dtype == np.dtype(dtype).newbyteorder("=") and rows.flags.c_contiguous and rows.flags.writeable
    archive.close()
    np.testing.assert_array_equal(archive.columns["values"].all(), values)
    archive.close()


def test_directories_of_npy_files_and_arrays_in_memory_are_read_alike(tmp_path: Path):
    values = {"obs": np.arange(6.0).reshape(3, 2), "flags": np.array([0, 1, 1], bool)}
    for name, array in values.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "notes.txt").write_text("hello")
    for arrays in (npy_directory(str(tmp_path)), given_arrays(values)):
        assert sorted(arrays.columns) == ["flags", "obs"]
        for name, array in values.items():
            np.testing.assert_array_equal(arrays.columns[name].rows(1, 3), array[1:])
        arrays.close()
    assert npy_directory(str(tmp_path)).unread == {"notes.txt": "no array"}


def test_what_is_no_rows_of_numbers_is_named_and_left_alone(tmp_path: Path):
    members = {
        "text.npy": npy(np.array(["ab", "c"])),
        "objects.npy": pickled_objects(),
        "scalar.npy": npy(np.float64(3)),
        "empty.npy": npy(np.zeros((4, 0))),
        "dates.npy": npy(np.array(["2020-01-01"], "M8[D]")),
        "records.npy": npy(np.zeros(2, [("a", "<f4"), ("b", "<i2")])),
        "long.npy": npy(np.zeros(2), descr="<f16", shape=(1,)),
        "readme.txt": b"hello",
        "numbers.npy": npy(np.arange(3)),
    }
    archive = Archive(str(npz(tmp_path / "a.npz", members)))
    archive.close()
    assert list(archive.columns) == ["numbers"]
    assert archive.unread == {
        "text": "text",
        "objects": "pickled objects",
        "scalar": "one value without rows",
        "empty": "empty, of shape (4, 0)",
        "dates": "dates",
        "records": "records of several values",
        "long": "float128, which torch does not have",
        "readme.txt": "no array",
    }


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    archive = Archive(str(npz(tmp_path / "a.npz", {"objects.npy": pickled_objects()})))
    archive.close()
    assert not archive.columns


GOOD = npy(np.arange(6.0))


@pytest.mark.parametrize(
    ("member", "found"),
    [
        (npy(np.arange(6.0), shape=(10**12,)), "says that it has the shape"),
        (npy(np.arange(6.0), shape=(10**12, 0)), "says that it has the shape"),
        (npy(np.arange(6.0), shape=(10**17, 10**17)), "says that it has the shape"),
        (npy(np.arange(6.0), shape=(5,)), "says that it has the shape"),
        (npy(np.arange(6.0), descr="<x8"), "unknown type"),
        (npy(np.arange(6.0), descr="<f7"), "unknown type"),
        (npy(np.arange(6.0), descr="<f888888"), "unknown type"),
        (npy(np.arange(6.0), fortran_order=7), "has the header"),
        (npy(np.arange(6.0), shape=[6]), "has the header"),
        (b"", "is no .npy array"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr': ", "has the header"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "says that its header"),
        (b"\x93NUMPY\x09\x00" + GOOD[8:], "is no .npy array"),
        (GOOD[:-3], "says that it has the shape"),
        (GOOD + b"1", "says that it has the shape"),
    ],
)
def test_an_array_that_lies_is_refused_by_name(tmp_path: Path, member: bytes, found: str):
    path = npz(tmp_path / "a.npz", {"good.npy": GOOD, "bad.npy": member})
    with pytest.raises(FormatError, match=found) as error:
        Archive(str(path))
    assert error.value.path == str(path) and "`bad`" in str(error.value)


@pytest.mark.parametrize(
    "sizes", [{"file_size": 2**31}, {"compress_size": 2**31}, {"file_size": 2**31, "compress_size": 2**31}]
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_sizes_that_the_file_cannot_have_are_refused_before_they_are_allocated(
    tmp_path: Path, sizes: dict[str, int], compression: int
):
    header = npy(np.zeros(1), shape=((2**31 - 128) // 8,))
    path = npz(tmp_path / "a.npz", {"values.npy": header}, compression)
    with_central_sizes(path, "values.npy", **sizes)
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"a\.npz"):
        Archive(str(path)).columns["values"].all()
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("writes", [np.savez, np.savez_compressed])
def test_a_file_cut_anywhere_is_refused_when_it_is_opened(tmp_path: Path, writes):
    writes(tmp_path / "whole.npz", a=np.arange(50.0), b=np.arange(8))
    content = (tmp_path / "whole.npz").read_bytes()
    for size in [0, 1, 3, 29, 40, *range(50, len(content) - 1, 97), len(content) - 1]:
        (tmp_path / "cut.npz").write_bytes(content[:size])
        with pytest.raises(FormatError, match=r"cut\.npz"):
            Archive(str(tmp_path / "cut.npz"))


@pytest.mark.parametrize("writes", [np.savez, np.savez_compressed])
def test_bytes_that_changed_are_found_by_the_checksum(tmp_path: Path, writes):
    writes(tmp_path / "a.npz", values=np.arange(4000))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 8
    (tmp_path / "a.npz").write_bytes(content)
    archive = Archive(str(tmp_path / "a.npz"))
    with pytest.raises(FormatError, match="cannot be read"):
        for start in range(0, 4000, 100):
            archive.columns["values"].rows(start, start + 100)
    archive.close()


def test_members_that_numpy_does_not_write_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.npy", GOOD)
        archive.writestr("a.npy", GOOD)
    with pytest.raises(FormatError, match="two members of one name"):
        Archive(str(tmp_path / "twice.npz"))
    npz(tmp_path / "bzip.npz", {"a.npy": GOOD}, zipfile.ZIP_BZIP2)
    with pytest.raises(FormatError, match="another method than deflate"):
        Archive(str(tmp_path / "bzip.npz"))


def test_what_is_no_archive_is_refused(tmp_path: Path):
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "array.npy", np.arange(3))
    os.mkfifo(tmp_path / "pipe.npz")
    for name, found in [
        ("text.npz", "not a zip"),
        ("array.npy", "not a zip"),
        ("pipe.npz", "no file"),
        ("none.npz", "not there"),
    ]:
        with pytest.raises(FormatError, match=found) as error:
            Archive(str(tmp_path / name))
        assert str(tmp_path / name) in str(error.value)


def test_a_file_that_was_replaced_by_another_is_noticed(tmp_path: Path):
    np.savez(tmp_path / "a.npz", values=np.arange(5))
    archive = Archive(str(tmp_path / "a.npz"))
    archive.close()
    np.savez(tmp_path / "a.npz", values=np.arange(7))
    with pytest.raises(FormatError, match="another array"):
        archive.columns["values"].all()
    archive.close()


def test_the_headers_of_old_pythons_are_read(tmp_path: Path):
    content = npy(np.arange(6).reshape(2, 3)).replace(b"(2, 3)", b"(2L, 3L)").replace(b"  \n", b"\n")
    (tmp_path / "a.npy").write_bytes(content)
    found = npy_directory(str(tmp_path)).columns["a"]
    np.testing.assert_array_equal(found.all(), [[0, 1, 2], [3, 4, 5]])
    found.close()


def test_where_stored_values_begin_is_found_and_compressed_ones_are_told_apart(tmp_path: Path):
    np.savez(tmp_path / "a.npz", first=np.arange(3), second=np.arange(7.0))
    archive = Archive(str(tmp_path / "a.npz"))
    place = archive.stored_array("second")
    archive.close()
    assert place is not None
    content = (tmp_path / "a.npz").read_bytes()[place[0] :]
    np.testing.assert_array_equal(np.frombuffer(content[:56], "<f8"), np.arange(7.0))
    np.savez_compressed(tmp_path / "b.npz", first=np.arange(3))
    archive = Archive(str(tmp_path / "b.npz"))
    assert archive.stored_array("first") is None
    archive.close()


def test_flags_are_zeros_and_ones(tmp_path: Path):
    for values in (np.array([0.0, 1.0]), np.array([[0], [1]]), np.array([False, True])):
        assert as_flags("p", "f", values).tolist() == [False, True]
    for values in (np.array([0, 2]), np.array([0.5, 1]), np.zeros((2, 2)), np.array([np.nan, 1])):
        with pytest.raises(FormatError, match="`f`.*no array of flags"):
            as_flags("p", "f", values)


def test_names_with_slashes_become_nested_dicts_unless_they_clash():
    assert tree_of("p", {"a/b": 1, "a/c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    for names in (["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"], ["/a"], ["a//b"], ["a/"]):
        with pytest.raises(FormatError, match="Rename"):
            tree_of("p", dict.fromkeys(names, 1))


def test_closing_leaves_no_file_open(tmp_path: Path):
    np.savez(tmp_path / "a.npz", values=np.arange(5))
    before = len(os.listdir("/proc/self/fd"))
    archive = Archive(str(tmp_path / "a.npz"))
    archive.columns["values"].rows(0, 2)
    archive.close()
    with pytest.raises(FormatError):
        Archive(str(npz(tmp_path / "b.npz", {"a.npy": b""})))
    assert len(os.listdir("/proc/self/fd")) == before


def test_npy_bytes_of_the_tests_are_numpys():
    assert np.array_equal(np.load(io.BytesIO(GOOD)), np.arange(6.0))
