import io
import os
import pickle
import pickletools
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import PickleError
from serving.pickles import MAX_OPCODES, read_pickle
from tests.serving.corpus.make import Call
from tests.serving.samples import EVIL, pickled, same

PROTOCOLS = (2, 3, 4, 5)

PLAIN = {
    b"bytes": b"\x00\xff" * 200,
    "text": "\u00e9\u20ac" * 200,
    "empty": [b"", "", [], {}, ()],
    "numbers": [0, -1, 255, 2**16, -(2**31), 2**70, 1.5, True, False, None],
    "nested": {"a": [(1, 2), (1, 2, 3, 4), {3: b"c"}]},
}
ARRAYS = {
    "C": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "F": np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    "strided": np.arange(100)[::-7],
    "big endian": np.arange(5, dtype=">i4"),
    "float": np.linspace(0, 1, 7, dtype=np.float32),
    "bool": np.array([True, False]),
    "scalar array": np.array(7),
    "empty": np.zeros((0, 3), np.uint8),
}


def read(content: bytes) -> Any:
    return read_pickle(io.BytesIO(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("old", [False, True], ids=["numpy2", "numpy1"])
def test_reads_what_pickle_reads(protocol: int, old: bool) -> None:
    content = pickled({**PLAIN, **ARRAYS, "again": [ARRAYS["C"], ARRAYS["C"]]}, protocol, old=old)
    assert same(read(content), pickle.loads(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_of_numpy(protocol: int) -> None:
    content = pickled([np.int64(3), np.uint8(200), np.float32(0.5), np.bool_(True)], protocol)
    assert same(read(content), [3, 200, 0.5, True])


def test_python_2() -> None:
    content = pickled({b"data": ARRAYS["C"], b"labels": [1, 2], b"long": b"x" * 300}, 2, python2=True)
    assert same(read(content), {b"data": ARRAYS["C"], b"labels": [1, 2], b"long": b"x" * 300})


def test_array_is_a_view_and_not_writable() -> None:
    array = read(pickled(np.arange(10), 5))
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("content", EVIL.values(), ids=EVIL.keys())
def test_anything_but_data_is_refused_and_nothing_runs(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PickleError) as refused:
        read(content)
    assert len(str(refused.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_the_payload_is_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own pickle runs what the reader refuses."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(EVIL["os.system"])
    assert [path.name for path in tmp_path.iterdir()] == ["ran"]


BYTE = (  # the dtype uint8
    b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02u1\x89\x88\x87R(K\x03\x8c\x01|NNN"
    + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


def header(shape: bytes, payload: bytes = b"C\x01\x00") -> bytes:
    """The pickle of a uint8 array that has one byte but claims a shape."""
    return (
        b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x0c_reconstruct\x93"
        b"\x8c\x05numpy\x8c\x07ndarray\x93K\x00\x85C\x01b\x87R(K\x01"
        + shape
        + BYTE
        + b"\x89"
        + payload
        + b"tb."
    )


def ordered(axes: bytes) -> bytes:
    """The pickle of a uint8 array [2, 3] whose axes are then put in an order."""
    start = b"\x80\x05\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(C\x06abcdef"
    return start + BYTE + b"K\x02K\x03\x86\x8c\x01K" + axes + b"tR."


PETABYTE = b"(" + b"J\x00\x00\x10\x00" * 3 + b"t"
BOMBS = {
    "petabyte array": header(PETABYTE),
    "negative extent": header(b"J\xff\xff\xff\xff\x85"),
    "float extent": header(b"G\x3f\xf0\x00\x00\x00\x00\x00\x00\x85"),
    "list as shape": header(b"]"),
    "list as contents": header(b"K\x01\x85", b"]"),
    "33 dimensions": header(b"(" + b"K\x01" * 33 + b"t"),
    "long bytes": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc.",
    "long bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.",
    "long text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"abc.",
    "wide text": pickle.dumps("\u20ac" + "a" * 2**16),
    "long int": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "long line": b"\x80\x02c" + b"a" * 10**6 + b"\nb\n.",
    "many opcodes": b"\x80\x02" + b"]" * (MAX_OPCODES + 1) + b".",
    "endless text as a name": b"\x80\x04)" + b"q\x00h\x00\x86" * 200 + b")\x93.",
    "copies of a text": b"\x80\x02c_codecs\nencode\nq\x00X\x00\x01\x00\x00"
    + b"a" * 256
    + b"X\x06\x00\x00\x00latin1\x86q\x01"
    + b"h\x00h\x01R" * 1000
    + b".",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS.keys())
def test_claims_are_checked_before_memory_is_spent(content: bytes) -> None:
    with pytest.raises(PickleError):
        read(content)


def test_arrays_made_by_hand_are_real_ones() -> None:
    assert same(read(header(b"K\x01\x85")), np.zeros(1, np.uint8))
    array = np.frombuffer(b"abcdef", np.uint8).reshape(2, 3)
    assert same(read(ordered(b"K\x01K\x00\x86")), array.T)


def test_nesting_of_any_depth_does_no_harm() -> None:
    depth = MAX_OPCODES // 3
    deep = b"]" * depth + b"a" * (depth - 1)
    doubled = b")" + b"q\x00h\x00\x86" * 1000
    content = b"\x80\x02}(X\x01\x00\x00\x00a" + deep + b"X\x01\x00\x00\x00b" + doubled
    assert list(read(content + b"X\x01\x00\x00\x00cK\x07u.")) == ["a", "b", "c"]


@pytest.mark.parametrize("index", [0, 255, 2**31 - 1, 2**32 - 1])
def test_memo_index_costs_no_memory(index: int) -> None:
    four = index.to_bytes(4, "little")
    assert read(b"\x80\x02K\x07r" + four + b"\x85j" + four + b"\x86.") == ((7,), 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (pickle.dumps([1], 0), "protocol 2 to 5"),
        (pickle.dumps([1], 1), "protocol 2 to 5"),
        (b"\x80\x06K\x01.", "protocol 2 to 5"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"\x80", "protocol 2 to 5"),
        (b"\x80\x04\x80\x06K\x01.", "protocol 6"),
        (pickled(b"x" * 1000)[:500], "truncated"),
        (b"\x80\x04\x95" + struct.pack("<Q", 4) + b"K\x01.", "4 bytes are announced, 3 are left"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.", f"{2**40} bytes are announced, 4 are"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"K\x01.", "are announced, 3 are left"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2) + b"J\x01\x00\x00\x00.", "behind the end of its frame"),
        (b"\x80\x04" + (b"\x95" + struct.pack("<Q", 11)) * 2 + b"K\x01.", "frame within a frame"),
        (b"\x80\x02.", "empty stack"),
        (b"\x80\x02(.", "empty stack"),
        (b"\x80\x02t.", "MARK"),
        (b"\x80\x02h\x05.", "has not stored"),
        (b"\x80\x02}(K\x01u.", "key without a value"),
        (b"\x80\x02}]K\x01s.", "keys must be"),
        (pickle.dumps({2**31: 1}), "A dict key is of type int; keys must be str, bytes or small ints"),
        *((ordered(axes), "order of axes") for axes in (b"K\x01N\x86", b"K\x01\x89\x86", b"K\x01\x85")),
        (b"\x80\x02K\x01K\x01a.", "not a list"),
        (b"\x80\x02\xff.", "damaged"),
        *(
            (b"\x80\x02" + start + b"cnumpy\nndarray\n" + end + b".", "holds a name")
            for start, end in [
                (b"", b""),
                (b"]", b"a"),
                (b"}K\x01", b"s"),
                (b"", b"\x85"),
                (b"]K\x01", b"\x86\x85a"),
                (b"}K\x01((", b"ttK\x01\x86s"),
            ]
        ),
        (pickle.dumps(Call(os.system, "true")), r"'posix.system'; only NumPy arrays"),
    ],
)
def test_message_says_what_was_wrong(content: bytes, message: str) -> None:
    with pytest.raises(PickleError, match=message):
        read(content)


def only_our_error(content: bytes) -> None:
    """Read the content, or fail with our own error and a message that can be sent."""
    message = ""
    try:
        read(content)
    except PickleError as error:
        message = str(error)
    assert len(message.encode("utf-8")) < 1000


@given(st.binary(max_size=200))
def test_random_bytes_only_raise_our_error(content: bytes) -> None:
    for start in (b"", b"\x80\x02", b"\x80\x04"):
        only_our_error(start + content)


OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]
ORIGINALS = [
    pickled({b"data": ARRAYS["C"], b"ids": np.arange(2), "more": [PLAIN]}, protocol, old=old)
    for protocol in PROTOCOLS
    for old in (False, True)
]


@given(st.sampled_from(ORIGINALS), st.randoms(use_true_random=False), st.integers(1, 5))
def test_damaged_pickles_only_raise_our_error(
    original: bytes, chance: random.Random, changes: int
) -> None:
    content = bytearray(original)
    for _ in range(changes):
        start = chance.randrange(len(content))
        match chance.randrange(4):
            case 0:
                content[start] = chance.randrange(256)
            case 1:
                del content[start : start + chance.randrange(1, 20)]
            case 2:
                source = chance.randrange(len(content))
                content[start:start] = content[source : source + chance.randrange(1, 40)]
            case 3:
                content[start:start] = bytes([chance.choice(OPCODES)])
    only_our_error(bytes(content))
