"""Watching the model file and loading it."""

import asyncio
import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import deployment
from serving.deployment import Deployment, FileState, file_state, replacements
from serving.errors import ModelError
from serving.model import Model
from serving.settings import Settings
from tests.serving.models import METADATA

A, B, C = (1,), (2,), (3,)


@pytest.mark.parametrize(
    ("states", "taken"),
    [
        ([A, A, A], []),
        ([B, B, B], [2]),
        ([A, B, C, C], [4]),  # B was still being written
        ([None, None, None, B, B], [5]),
        ([B, B, A, A, A, C, C], [2, 7]),  # A is served still
    ],
)
def test_a_file_is_taken_once_two_looks_find_the_same(
    states: list[FileState | None],
    taken: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks: list[FileState | None] = []

    def look(path: Path) -> FileState | None:
        if len(looks) == len(states):
            raise EOFError
        looks.append(states[len(looks)])
        return looks[-1]

    async def main() -> list[int]:
        found: list[int] = []
        with suppress(EOFError):
            async for _ in replacements(Path(), lambda: A):
                found.append(len(looks))
        return found

    monkeypatch.setattr(deployment, "LOOK_SECONDS", 0)
    monkeypatch.setattr(deployment, "file_state", look)
    assert asyncio.run(main()) == taken
    assert caplog.text.count("is gone; the model goes on") == (None in states)


def test_a_refused_file_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "LOOK_SECONDS", 0)
    monkeypatch.setattr(deployment, "RETRY_SECONDS", 0)
    monkeypatch.setattr(deployment, "file_state", lambda path: B)
    served = A

    async def main() -> None:
        nonlocal served
        looks = replacements(Path(), lambda: served)
        async with asyncio.timeout(60):
            for _ in range(3):
                await anext(looks)
        served = B
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(looks)

    asyncio.run(main())


def test_a_look_for_which_there_is_no_thread_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    states: Iterator[FileState | RuntimeError] = iter([RuntimeError("no thread"), B, B])

    def look(path: Path) -> FileState:
        state = next(states)
        if isinstance(state, RuntimeError):
            raise state
        return state

    async def main() -> None:
        async with asyncio.timeout(60):
            await anext(replacements(Path(), lambda: A))

    monkeypatch.setattr(deployment, "LOOK_SECONDS", 0)
    monkeypatch.setattr(deployment, "file_state", look)
    asyncio.run(main())
    assert next(states, None) is None


def test_without_threads_for_the_new_model_the_old_one_is_reported(
    model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving import metrics

    deployed = []
    for name in ("old", "new"):
        path = model_file(METADATA | {"name": name}, name=f"{name}.onnx")
        deployed.append(Deployment(path, Settings(provider="cpu", threads=2), metrics))
    old, new = deployed
    metrics.serves(old.model)
    begin, begun = threading.Thread.start, list[threading.Thread]()

    def start(self: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(self)
        begin(self)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                new.start(old)

    asyncio.run(main())
    begun[0].join(60)
    assert not begun[0].is_alive()
    served = metrics.model_info.labels("old", old.model.version, old.model.provider)
    assert served._value.get() == 1


def test_any_other_file_has_another_state(tmp_path: Path) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"one")
    before, modified = file_state(file), file.stat().st_mtime_ns
    shutil.copy2(file, other)
    other.write_bytes(b"two")
    os.utime(other, ns=(0, modified))
    other.replace(file)
    renamed = file_state(file)
    assert renamed != before, "of the same size and time"
    file.write_bytes(b"six")
    os.utime(file, ns=(0, modified + 1))
    written = file_state(file)
    assert written != renamed, "of the same size, in its place"
    file.write_bytes(b"seven")
    os.utime(file, ns=(0, modified + 1))
    assert file_state(file) != written
    unreadable = file_state(file)
    file.chmod(0o600)
    assert file_state(file) != unreadable, "with other permissions"
    file.unlink()
    assert file_state(file) is None


def test_a_file_that_changes_while_it_is_loaded_is_refused(
    model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving import metrics

    path = model_file()

    def loaded(*arguments: Any, **options: Any) -> Any:
        found = Model(*arguments, **options)
        os.utime(path)
        return found

    monkeypatch.setattr(deployment, "Model", loaded)
    with pytest.raises(ModelError, match="changed while it was loaded"):
        Deployment(path, Settings(provider="cpu", threads=1), metrics)


def test_a_replaced_model_leaves_memory(model_file: Callable[..., Path]) -> None:
    """Without a garbage collection, which may never come."""
    from serving import metrics

    async def main() -> weakref.ref[Model]:
        deployed = Deployment(model_file(), Settings(provider="cpu", threads=1), metrics)
        deployed.start()
        await deployed.batcher.one(np.zeros((32, 32, 3), np.uint8))
        await deployed.batcher.finish()
        return weakref.ref(deployed.model)

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()


def test_no_copy_is_kept_of_a_file_that_has_changed(tmp_path: Path) -> None:
    file, kept = tmp_path / "a", tmp_path / "kept"
    file.write_bytes(b"new")
    kept.write_bytes(b"old")
    with pytest.raises(OSError, match="changed while it was copied"):
        deployment._copy(file, kept, A)
    assert kept.read_bytes() == b"old"
