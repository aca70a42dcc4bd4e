"""Command line: ``python -m export write CHECKPOINT... OUT.onnx`` and ``verify FILE.onnx``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.table import Column, Table

from export import graph, reliability
from export.metadata import Description
from export.parity import ELSEWHERE, LIMITS, Finding, Parity, Precision
from export.verify import verify
from export.write import PRECISIONS, Written, write
from serving.errors import ProviderError
from training import device
from training.errors import ExplainedError
from training.files import make_place
from training.plots import file_format
from training.recipe import Views
from training.tables import percent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    It is 0 on success, 1 if a file is not written or fails verification, and 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    # No markup: paths and names may contain brackets.
    console, errors = (
        Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
        for stderr in (False, True)
    )
    device.limit_threads()
    try:
        if options.command == "write":
            _write(options, console)
        else:
            _verify(options, console)
    except (ExplainedError, ProviderError, OSError) as error:
        errors.print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Model files (ONNX) that hold all that serving needs.",
        epilog="Real test images decide: those of the CIFAR-10 test set where it is present "
        "(CIFAR10_ROOT or the cache folder of the training job), else the 1,000 of the bundled sample.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser(
        "write",
        help="turn checkpoints into model files",
        description="Turn a checkpoint, or an ensemble of several (their probabilities are averaged), "
        "into a model file, written only if it computes on the test images what it should.",
    )
    write.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a run's checkpoint.pt"
    )
    write.add_argument("out", type=Path, metavar="OUT.onnx", help="the model file to write")
    write.add_argument(
        "--precision",
        choices=[*PRECISIONS, "all"],
        default="fp32",
        help="fp16 is for CUDA, int8 for CPUs; all writes OUT.onnx in fp32, OUT.fp16.onnx and "
        "OUT.int8.onnx, or none of them (default: fp32)",
    )
    write.add_argument(
        "--tta",
        choices=get_args(Views),
        help="flip: the logits of an image and its mirror image are averaged; flip_shift: those of both "
        "shifted by a pixel to two corners too (default: as the recipe's views say)",
    )
    write.add_argument(
        "--calibration-from",
        type=Path,
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="for runs that held no images out: trials of the same recipes with data.validation above "
        "0, on whose held-out images the calibration is fitted",
    )
    write.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="a plot of the probabilities' reliability (.png, .svg, .pdf)",
    )
    check = commands.add_parser(
        "verify",
        help="check a model file and say what it is",
        description="Say what a model file is, and check that it keeps the contract and computes here, "
        "by every provider, what it says.",
    )
    check.add_argument("file", type=Path, metavar="FILE.onnx", help="a model file of ours")
    check.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="those that it was made from, to compare it with PyTorch",
    )
    return parser


def _write(options: argparse.Namespace, console: Console) -> None:
    if options.plot is not None:
        file_format(options.plot)
        make_place(options.plot)
    with console.status("writing, and running the test images"):
        files = _files(options.out, options.precision)
        written = write(options.checkpoints, files, options.tta, options.calibration_from)
    for file in written:
        console.print(_report(file))
        console.print(f"wrote {file.path} ({file.path.stat().st_size:,} bytes)")
        if file.full_precision:
            console.print("it asks for full precision: in a shorter type it is beyond the limits")
    fitted = written[0].calibration
    console.print(_calibration(fitted.temperature, fitted.exponent, fitted.origin))
    if options.plot is not None:
        before, after = written[0].reliability
        curves = {"test images": after}
        if fitted.val_images:
            curves = {"without calibration": before, "with calibration": after}
        reliability.plot(curves, f"{written[0].path.name} on the test images", options.plot)
        console.print(f"wrote {options.plot}")


def _files(out: Path, precision: Precision | Literal["all"]) -> dict[Precision, Path]:
    if precision != "all":
        return {precision: out}
    files = {each: out.with_name(f"{out.stem}.{each}{out.suffix}") for each in PRECISIONS}
    return files | {"fp32": out}


def _report(file: Written) -> Table:
    table = Table(file.precision, "measured", "limit")
    here = file.parity[0]
    table.add_row("test images", f"{here.images} ({here.source})", "")
    table.add_row("accuracy", percent(here.accuracy), "")
    for report in file.parity:
        limits = LIMITS if report is here else ELSEWHERE
        _add_parity(table, report, report.findings(limits[file.precision]))
    before, after = file.reliability
    table.add_row("expected calibration error", percent(after.error), "")
    if file.calibration.val_images:
        table.add_row("without calibration", percent(before.error), "")
    return table


def _verify(options: argparse.Namespace, console: Console) -> None:
    with console.status("running the test images"):
        found = verify(options.file, options.checkpoint)
    console.print(_description(options.file, found.metadata))
    table = Table("check", "measured", "limit")
    for finding in found.measured:
        table.add_row(finding.what, finding.measured, finding.limit)
    for report, findings in found.parity:
        _add_parity(table, report, findings)
    console.print(table)
    found.check()
    console.print(f"{options.file} is good")


def _description(path: Path, values: Description) -> Table:
    table = Table(*(Column(title, overflow="fold") for title in (str(path), values.name)))
    table.add_row("version", values.version)
    table.add_row("precision", values.precision)
    table.add_row("parameters", str(values.parameters))
    for member in values.members:
        table.add_row("member", f"{member.name} seed {member.seed}, views {member.views}")
        table.add_row("commit", member.commit)
        table.add_row("checkpoint_sha256", member.checkpoint_sha256)
    calibration = values.calibration
    table.add_row("calibration", _calibration(values.temperature, values.exponent, calibration.origin))
    if calibration.val_ece_before is not None and calibration.val_ece_after is not None:
        change = _change(calibration.val_ece_before, calibration.val_ece_after)
        table.add_row("calibration error on val", change)
    change = _change(calibration.test_ece_before, calibration.test_ece_after)
    table.add_row("calibration error on test", change)
    made = values.parity
    table.add_row("accuracy when made", f"{percent(made.accuracy)} of {made.images} test images")
    table.add_row("graph", f"opset {graph.OPSET}, IR {graph.IR_VERSION}, {path.stat().st_size:,} bytes")
    return table


def _calibration(temperature: float, exponent: float, origin: str) -> str:
    return f"temperature {temperature:g}, exponent {exponent:g}: {origin}"


def _change(before: float, after: float) -> str:
    return percent(after) if before == after else f"{percent(before)} before, {percent(after)} after"


def _add_parity(table: Table, report: Parity, findings: list[Finding]) -> None:
    table.add_section()
    sides = (side.removesuffix("ExecutionProvider") for side in (report.provider, report.reference))
    table.add_row(" against ".join(sides))
    for finding in findings:
        table.add_row(f"  {finding.what}", finding.measured, finding.limit)
    table.add_section()


if __name__ == "__main__":
    sys.exit(main())
