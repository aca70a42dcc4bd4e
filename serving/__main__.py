"""`python -m serving`: label a competition pickle from the command line, without a server."""

import argparse
import asyncio
import os
import sys
from errno import EEXIST, ESPIPE
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serving.batching import Batcher
from serving.errors import ModelError, RequestError, StartError
from serving.files import check_replaceable, replacing
from serving.model import Model
from serving.settings import Settings
from serving.submission import Submission, read_submission


def main() -> int:
    """Run a command; return the exit status: 0, 1 after one line on what went wrong, 130 on Ctrl-C."""
    options = _parser().parse_args()
    try:
        submit(options.pickle, options.csv, options.model)
    except StartError as error:
        return _failed(str(error))
    except RequestError as error:
        return _failed(f"{options.pickle}: {error}")
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        _failed("interrupted; nothing was written")
        return 130
    return 0


def _failed(message: str) -> int:
    print(f"python -m serving: error: {message}", file=sys.stderr)
    return 1


def submit(pickle: Path, csv: Path, model_file: Path | None) -> None:
    """Label the images of a competition pickle.

    The CSV has the same bytes as /submission's answer if the same provider runs the model; "auto" may
    mean one here and another in a service, which makes two runs at a time. It is written under another
    name in the same folder and then renamed, so it is never incomplete.

    Raises:
        StartError: a setting, the model file or the provider cannot be used, or the model fails.
        RequestError: the pickle cannot be read as images.
        OSError: a file cannot be read or written.
    """
    settings = Settings.from_environment()
    check_replaceable(csv)
    model_path = model_file or settings.model
    for path in (pickle, model_path):
        if csv.exists() and path.exists() and csv.samefile(path):
            raise FileExistsError(EEXIST, "this is read; the labels need another file", str(csv))
    with pickle.open("rb") as file:
        if not file.seekable():
            raise OSError(
                ESPIPE, "this is a pipe, which is read once only; it must be a file", str(pickle)
            )
        submission = read_submission(file, settings.max_rows)
    model = Model(
        model_path,
        settings.provider,
        settings.threads,
        max_batch_size=settings.max_batch_size,
    )
    labels = asyncio.run(_labels(model, submission))
    with replacing(csv) as written:
        written.write(submission.csv(labels))
    try:
        by = f"{model.name} {model.version} on {model.provider}"
        print(f"{len(submission)} labels in {csv}, by {by}", flush=True)
    except BrokenPipeError:  # nobody reads the message; the CSV is there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's flush at exit fails


async def _labels(model: Model, submission: Submission) -> list[int]:
    """Return the most probable class of each image, showing a progress bar on standard error.

    Raises:
        ModelError: the model fails on an image, or gives logits that are not finite.
    """
    batcher = Batcher(
        model.logits,
        max_batch_size=model.batch_size,
        chunk_size=model.chunk_size,
        waited=lambda seconds: None,
    )
    labels: list[int] = []
    with Progress(
        TextColumn("{task.description}", markup=False),  # a model's name may have brackets
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(f"{model.name} {model.version}", total=len(submission))
        batcher.start()
        try:
            async for logits in batcher.many(submission.images):
                labels.extend(logits.argmax(axis=1).tolist())
                progress.advance(task, len(logits))
        except Exception as error:  # onnxruntime has a dozen exceptions of its own
            raise ModelError(f"the model does not compute these images' labels: {error}") from error
        finally:
            await batcher.stop()
    return labels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description="Use the model from the command line; settings are the service's "
        "(SERVING_* environment variables).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "submit",
        help="label the images of a pickle and write the competition's CSV",
        description="Label the images of a competition pickle and write the CSV with the header "
        "ID,Labels: what POST /submission answers, too, if the same provider runs the model.",
        epilog="example: python -m serving submit cifar_test_nolabel.pkl submission.csv",
    )
    command.add_argument(
        "pickle",
        type=Path,
        metavar="PICKLE",
        help="a pickled dict with data: uint8 [N, 32, 32, 3], [N, 3, 32, 32] or [N, 3072] (all red "
        "values, then green, then blue), and optionally ids: N different integers",
    )
    command.add_argument("csv", type=Path, metavar="CSV", help="the file to write")
    command.add_argument(
        "--model",
        type=Path,
        metavar="ONNX",
        help="the model file (default: SERVING_MODEL, else the bundled model)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
