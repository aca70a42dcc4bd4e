"""Command line: ``python -m export CHECKPOINT OUT.onnx``."""

import argparse
import sys
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from export import graph, metadata, parity
from training import checkpoint as checkpoints
from training.checkpoint import CheckpointError
from training.data import DataError
from training.evaluate import Classifier
from training.recipe import RecipeError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 1 where no file was written."""
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Turn a checkpoint into a model file (ONNX) that holds all that serving needs, "
        "and check on real test images that it computes what PyTorch computes.",
        epilog="The images are those of the CIFAR-10 test set where it is present (CIFAR10_ROOT or "
        "the cache folder of the training job), else the 1,000 of the bundled sample.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run's checkpoint.pt")
    parser.add_argument("out", type=Path, metavar="OUT.onnx", help="the model file to write")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        report = export(options.checkpoint, options.out)
    except (CheckpointError, RecipeError, DataError, parity.ParityError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        return 1
    console.print(_table(report))
    console.print(f"wrote {options.out} ({options.out.stat().st_size:,} bytes)", markup=False)
    return 0


def export(checkpoint_file: Path, out: Path) -> parity.Parity:
    """Write the model file of a checkpoint, beside ``out`` first and renamed when it has passed.

    Raises:
        CheckpointError, RecipeError: a checkpoint that cannot be used.
        DataError: a data set that is present but damaged.
        ParityError: the file does not compute what PyTorch does; nothing is left behind.
    """
    state = checkpoints.load(checkpoint_file)
    classifier = Classifier(state.network(), state.parsed_recipe())
    model = graph.build(classifier)
    images, source = parity.test_images()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".new")
    try:
        onnx.save(model, beside)
        report = parity.compare(beside, classifier, images, source)
        report.check()
        metadata.write(model, state, checkpoint_file, report)
        onnx.save(model, beside)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return report


def _table(report: parity.Parity) -> Table:
    table = Table("parity with PyTorch", "measured", "limit")
    table.add_row("test images", f"{report.images} ({report.source})", "at least 1000")
    table.add_row(
        "scaled difference of logits",
        f"{report.max_scaled_difference:.2e}",
        f"{parity.MAX_SCALED_DIFFERENCE:.0e}",
    )
    table.add_row("top-1 agreement", f"{100 * report.top1_agreement:.2f} %", "100 %")
    table.add_row("accuracy of the model file", f"{100 * report.accuracy:.2f} %", "")
    return table


if __name__ == "__main__":
    sys.exit(main())
