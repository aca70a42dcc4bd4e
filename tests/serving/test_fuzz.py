"""Bytes of all kinds for the readers of clients' bytes: a short search, and known values."""

import io
import json
import pickle
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from serving.errors import PickleError, RequestError
from serving.inference_protocol import read
from serving.pickles import SYMBOLS, read_pickle
from tests import ROOT
from tests.serving.fuzz import TARGETS, nothing_run, seeds
from tests.serving.samples import pickled, same

RUNS = {"pickles": 500, "images": 500, "inference": 50_000}  # three seconds or more on an idle core


@pytest.mark.parametrize("reader", TARGETS)
def test_search(reader: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    limits = ["--runs", str(RUNS[reader]), "--seconds", "600"]
    command = [sys.executable, "-m", "tests.serving.fuzz", *limits]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--only", reader],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert any((tmp_path / reader / "reached").iterdir())


def test_a_finding_fails_the_search() -> None:
    """A reader that opens a file is noticed, whatever exceptions it catches."""
    with pytest.raises(AssertionError, match="reading led to open"), nothing_run():
        Path(__file__).read_bytes()


# Pickles, compared with what Python's own module makes of them.

numbers = st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4).flatmap(
    lambda shape: st_numpy.arrays(
        st.sampled_from(["?", "u1", "i1", "<i2", ">i4", "<u8", ">f2", "<f4", "<f8"]),
        shape,
        elements={"allow_nan": False},
    )
)
arrays = st.builds(lambda array, order: np.array(array, order=order), numbers, st.sampled_from("CF"))
texts = st.text(max_size=300)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.binary()
values = st.recursive(
    plain | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(texts | st.binary() | st.integers(-(2**31), 2**31 - 1), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(values, st.integers(2, 5), st.booleans())
@example([np.zeros(0, np.uint8), {b"": 0}], 5, True)
def test_what_is_written_is_read(value: Any, protocol: int, old: bool) -> None:
    content = pickled(value, protocol, old=old)
    with nothing_run():
        found = read_pickle(io.BytesIO(content))
    assert same(found, pickle.loads(content))


class NamesOfNumPy(pickle.Unpickler):
    """Python's own unpickler, for files that our reader accepted: they name nothing but `SYMBOLS`."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in SYMBOLS
        return super().find_class(module, name)


SEEDS = {
    reader: {name: content for name, content in seeds(reader).items() if len(content) < 2**14}
    for reader in TARGETS
}


@given(st.sampled_from(sorted(SEEDS["pickles"])), st.data())
def test_what_is_taken_is_what_pickle_makes_of_it(name: str, data: st.DataObject) -> None:
    content = damaged(SEEDS["pickles"][name], data)
    tracemalloc.start()
    try:
        with nothing_run():
            found = read_pickle(io.BytesIO(content))
    except PickleError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20 + 200 * len(content)
    encoding = "bytes" if name == "python2" else "ASCII"
    assert alike(found, NamesOfNumPy(io.BytesIO(content), encoding=encoding).load())


def alike(a: Any, b: Any) -> bool:
    """As `same`, for values that contain themselves, or others too often to be followed one by one."""
    pairs, seen = [(a, b)], set()
    while pairs:
        a, b = pairs.pop()
        if not isinstance(a, dict | list | tuple):
            if not (same(a, b) or repr(a) == repr(b)):  # NaN is not equal to itself
                return False
        elif type(a) is not type(b) or len(a) != len(b):
            return False
        elif (id(a), id(b)) not in seen:
            seen.add((id(a), id(b)))
            pairs += zip(a, b, strict=True)
            if isinstance(a, dict) and isinstance(b, dict):
                pairs += zip(a.values(), b.values(), strict=True)
    return True


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """A file with up to three of its bytes, or runs of bytes, changed."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, min(len(changed), 600)))
        end = start + data.draw(st.integers(0, 4))
        changed[start:end] = data.draw(st.binary(max_size=4))
    return bytes(changed)


@pytest.mark.parametrize("reader", TARGETS)
@given(data=st.data())
def test_damaged_files_only_raise_what_a_client_may_see(reader: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SEEDS[reader])))
    TARGETS[reader](damaged(SEEDS[reader][name], data))


# Inference requests: JSON of almost the right form.

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("images") | json_values,
        "shape": st.just([1, 32, 32, 3]) | st.lists(st.integers(), max_size=5) | json_values,
        "datatype": st.just("UINT8") | json_values,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.just(3072) | json_values}),
        "data": st.just([0] * 3072) | st.just([[[[0] * 3] * 32] * 32]) | json_values,
    },
)
wanted = st.fixed_dictionaries(
    {"name": st.sampled_from(["logits", "probabilities"]) | json_values},
    optional={
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data": json_values, "classification": st.integers() | json_values}
        )
    },
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, max_size=2) | json_values},
    optional={"outputs": st.lists(wanted, max_size=3), "id": json_values, "parameters": json_values},
)


@given(requests, st.sampled_from([b"", b"\0" * 3072]), st.none() | st.integers(-3, 3))
def test_inference_requests(request: Any, binary: bytes, off: int | None) -> None:
    head = json.dumps(request).encode()
    length = None if off is None else str(len(head) + off)
    with suppress(RequestError):
        inference = read(head + binary, length, 40)
        assert inference.images.shape == (1, 32, 32, 3)
