"""Searches for bytes that break the readers of clients' bytes: ``python -m tests.serving.fuzz``.

Atheris (libFuzzer) mutates files of the corpus and others, and goes on with those that reach new lines
of a reader; each reader has a process of its own. Bytes are a finding if they raise anything but the
errors that a client may see, run or open anything, or take over 10 seconds or over a gibibyte. Findings
are kept in ``fuzzing/READER/``, and the command fails; once fixed, they belong in tests/serving/corpus.
Bytes that reached new lines are kept in ``fuzzing/READER/`` too, and the next search begins with them.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from tests import ROOT

CORPUS = Path(__file__).parent / "corpus"
FOUND = ROOT / "fuzzing"
INSTRUMENTED = ("serving.", "pickletools", "PIL.")
MODULES = (
    *("serving.submission", "serving.images", "serving.inference_protocol"),
    *(f"PIL.{kind}ImagePlugin" for kind in ("Png", "Jpeg", "WebP", "Gif", "Bmp")),
)

# Python's audit events that reading data has no reason to raise.
FORBIDDEN = ("exec", "compile", "import", "open", "pickle.", "os.", "subprocess.", "ctypes.", "socket.")

MAX_PIXELS = 1_000_000
MAX_ROWS = 1000
MAX_IMAGES = 40

_watching = False


@contextmanager
def nothing_run() -> Iterator[None]:
    """Fail on anything that would run, import or open something."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(FORBIDDEN):
        raise AssertionError(f"reading led to {event}{arguments!r}"[:500])


sys.addaudithook(_audit)


def read_pickle_bytes(content: bytes) -> None:
    """Read an uploaded file as /submission does."""
    from serving.errors import PickleError, TooLargeError
    from serving.submission import read_submission

    with nothing_run(), suppress(PickleError, TooLargeError):
        submission = read_submission(BytesIO(content), MAX_ROWS)
        assert submission.images.shape == (len(submission), 32, 32, 3)
        assert submission.images.dtype == np.uint8
        assert submission.images.nbytes <= len(content)
        assert submission.csv([0] * len(submission)).count(b"\n") == len(submission) + 1


def read_image_bytes(content: bytes) -> None:
    """Read an image as /classify does."""
    from serving.errors import ImageError, TooLargeError
    from serving.images import decode

    with suppress(ImageError, TooLargeError):
        image = decode(content, MAX_PIXELS)
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8


def read_inference_bytes(content: bytes) -> None:
    """Read a body as /v2/models/NAME/infer does; the first line, if any, is the JSON's length header."""
    from serving import inference_protocol
    from serving.errors import RequestError

    header, feed, body = content.partition(b"\n")
    length = header.decode("latin-1") if feed and header else None
    with nothing_run(), suppress(RequestError):
        inference = inference_protocol.read(body, length, MAX_IMAGES)
        assert inference.images.shape == (len(inference.images), 32, 32, 3)
        assert inference.images.dtype == np.uint8


TARGETS: dict[str, Callable[[bytes], None]] = {
    "pickles": read_pickle_bytes,
    "images": read_image_bytes,
    "inference": read_inference_bytes,
}


def seeds(reader: str) -> dict[str, bytes]:
    """Files to begin with, by name: the corpus, and valid files of every kind."""
    from PIL import Image

    from tests.serving.samples import encoded, pickled

    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 32, 32, 3)
    if reader == "inference":
        return _inference_seeds(pixels)
    files = {path.name: path.read_bytes() for path in (CORPUS / reader).iterdir()}
    if reader == "pickles":
        content = {b"data": pixels, b"ids": np.array([7, 5]), "more": [None, True, 1.5, {"a": (b"b",)}]}
        for protocol in (2, 3, 4, 5):
            files[f"numpy1-{protocol}"] = pickled(content, protocol, old=True)
            files[f"numpy2-{protocol}"] = pickled(content, protocol)
        files["fortran"] = pickled({"data": np.asfortranarray(pixels), "ids": [1, 2]}, 5)
        files["python2"] = pickled({b"data": pixels.reshape(2, 3072)}, 2, python2=True)
        return files
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        files[f"small.{kind}"] = encoded(pixels[0, :9, :7].copy(), kind)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        buffer = BytesIO()
        Image.new(mode, (5, 6)).save(buffer, "PNG")
        files[f"{mode}.PNG"] = buffer.getvalue()
    return files


def _inference_seeds(pixels: Any) -> dict[str, bytes]:
    tensor = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8"}
    binary = {"inputs": [{**tensor, "parameters": {"binary_data_size": 3072}}]}
    outputs = [{"name": "logits", "parameters": {"binary_data": True, "classification": 3}}]
    head = json.dumps({**binary, "outputs": outputs, "id": "a"}).encode()
    values = pixels[0].flatten().tolist()
    whole = {"inputs": [{**tensor, "data": values}], "parameters": {"binary_data_output": True}}
    nested = {
        "inputs": [{**tensor, "data": pixels[:1].tolist()}],
        "outputs": [{"name": "probabilities"}],
    }
    return {
        "binary": b"%d\n" % len(head) + head + pixels[0].tobytes(),
        "flat": b"\n" + json.dumps(whole).encode(),
        "nested": b"\n" + json.dumps(nested).encode(),
        "ragged": b"\n" + json.dumps({"inputs": [{**tensor, "data": [1, [2]]}]}).encode(),
    }


def search(reader: str, seconds: int, runs: int, folder: Path) -> int:
    """Search in a process of its own; returns its exit code, 0 if nothing was found."""
    place = folder / reader
    begin, found = place / "begin", place / "reached"
    for path in (begin, found):
        path.mkdir(parents=True, exist_ok=True)
    for name, content in seeds(reader).items():
        (begin / name).write_bytes(content)
    command = [sys.executable, "-m", __spec__.name, "--here", "--only", reader]
    options = ["--seconds", str(seconds), "--runs", str(runs), "--folder", str(folder)]
    done = subprocess.run([*command, *options], cwd=ROOT, check=False)
    shutil.rmtree(begin)
    return done.returncode


def _fuzz(reader: str, seconds: int, runs: int, folder: Path) -> None:
    """Search in this process, which ends with the search."""
    import atheris

    place = folder / reader
    with atheris.instrument_imports(include=list(INSTRUMENTED), enable_loader_override=False):
        for module in MODULES:
            importlib.import_module(module)
    for path in (place / "begin").iterdir():
        TARGETS[reader](path.read_bytes())  # imports at first use are not the fault of the bytes
    options = {
        "artifact_prefix": f"{place}/",
        "max_total_time": seconds,
        "runs": runs,
        "max_len": 2**16,
        "timeout": 10,  # seconds
        "rss_limit_mb": 1024,
        "verbosity": 0,
        "print_final_stats": 1,
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    folders = [str(place / "reached"), str(place / "begin")]
    atheris.Setup([sys.argv[0], *arguments, *folders], TARGETS[reader])
    atheris.Fuzz()


def main() -> int:
    """Run the command line; returns the exit code, 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of each reader (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=-1, help="of each reader at most (default: no limit)"
    )
    parser.add_argument("--folder", type=Path, default=FOUND, help="default: fuzzing/")
    parser.add_argument("--only", choices=TARGETS, metavar="READER", help=", ".join(TARGETS))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    if options.here:
        _fuzz(options.only, options.seconds, options.runs, options.folder)
    readers = [options.only] if options.only else TARGETS
    limits = options.seconds, options.runs
    failed = [reader for reader in readers if search(reader, *limits, options.folder)]
    for reader in failed:
        print(f"found: see {options.folder / reader}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
