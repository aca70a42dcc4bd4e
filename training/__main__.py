"""Command line of the training job: ``python -m training run | resume | list | lr-find | report``."""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from training import STARTED, checkpoint, data, device, recipe, train
from training.checkpoint import Checkpoint
from training.errors import ExplainedError
from training.files import make_place
from training.learner import Learner, TrainingError
from training.processes import Processes
from training.tables import markdown_table, percent, table_rows
from training.watch import Stopped, Watch

UNJUDGED = "trial without held-out images, so of unknown accuracy (--set data.validation=0.1)"


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line and return its exit code.

    ``started`` is the monotonic time from which ``--max-seconds`` counts; None: now. The exit code is 1
    for an error, 75 at the time limit and 128 + N for signal N; torchrun turns each of them into 1.
    """
    options = _parser().parse_args(arguments)
    processes = Processes()
    # Without markup: a path or a name may contain brackets, or text such as ":cat:".
    plain = partial(Console, markup=False, emoji=False, highlight=False, soft_wrap=True)
    console, errors = plain(quiet=not processes.first), plain(stderr=True)
    device.limit_threads()
    try:
        if options.command == "list":
            _list(console, options.markdown)
            return 0
        if options.command == "lr-find":
            if processes.count > 1:
                raise TrainingError("lr-find works in one process: start it without torchrun")
            _find_rate(options, console)
            return 0
        if options.command == "report":
            from training.report import pages  # matplotlib takes a second to import

            device.prepare(device.choose())
            with console.status("writing pages"):
                for page in pages.write(options.runs, options.out, console):
                    console.print(page)
            return 0
        watch = Watch(options.max_seconds, started)
        with processes.joined():
            return _train(options, processes, watch, console, errors)
    except (ExplainedError, OSError) as error:
        errors.print(f"error: {error}")
        return 1
    except torch.OutOfMemoryError as error:  # before the first step: other processes may fill the GPU
        reason = str(error).partition("\n")[0]
        errors.print(f"error: {reason}")
        return 1
    except KeyboardInterrupt:
        kept = "; a run goes on from its last checkpoint, if it has one"
        errors.print("interrupted" + kept * (options.command in ("run", "resume")))
        return 130


def _train(
    options: argparse.Namespace,
    processes: Processes,
    watch: Watch,
    console: Console,
    errors: Console,
) -> int:
    # The first process makes the folder and downloads the data set; the others then find both.
    dataset: data.DataSet | None = None
    folder = Path()
    if processes.first:
        folder, dataset = _create(options, console) if options.command == "run" else _open(options)
    folder = processes.agree(folder)
    console.print(f"run folder: {folder}")
    try:
        state = train.resume(
            folder,
            dataset or data.load(),
            console,
            watch,
            processes,
            tensorboard=options.tensorboard,
            compiled=options.compile,
        )
    except Stopped as stopped:
        if processes.first:
            errors.print(f"stopped by {stopped}; go on with: {checkpoint.resume_command(folder)}")
        return stopped.exit_code
    console.print(_outcome(state, folder))
    return 0


def _find_rate(options: argparse.Namespace, console: Console) -> None:
    from training import plots, range_test  # matplotlib takes a second to import

    chosen = recipe.load(options.recipe, options.set)
    tried = range_test.rates(options.low, options.high, options.steps)
    name = _name(options.recipe)
    out = options.out or Path("runs") / f"{name}-lr.png"
    plots.file_format(out)
    make_place(out)
    train_images, _ = data.split(data.load().train, chosen.data.validation)
    # Compiling takes longer than it would save in a hundred steps.
    learner = Learner(chosen, options.seed, train_images, Processes(), compiled=False)
    own = learner.lr
    points = range_test.measure(learner, tried)
    measured = list(track(points, total=len(tried), console=console, transient=True))
    suggestion = range_test.suggest(measured)
    table = Table("rate", "loss", "smoothed")
    every = max(1, len(tried) // 10)
    for point in measured[every - 1 :: every]:
        table.add_row(f"{point.rate:.4g}", f"{point.loss:.4f}", f"{point.smooth:.4f}")
    console.print(table)
    if len(measured) < len(tried):
        console.print(f"the loss diverged at rate {measured[-1].rate:.4g}")
    console.print(f"suggested learning rate {suggestion:.6g} (the recipe has {own:g})")
    title = f"Learning-rate range test of {name}: batches of {chosen.batch_size}"
    range_test.plot(measured, suggestion, own, title, out)
    console.print(out)


def _create(options: argparse.Namespace, console: Console) -> tuple[Path, data.DataSet]:
    overrides = list(options.set)
    if options.epochs is not None:
        overrides.append(f"epochs={options.epochs}")
    chosen = recipe.load(options.recipe, overrides)
    name = _name(options.recipe)
    complete = not overrides and options.limit is None
    trial = "" if complete else "-trial"  # others look for the full run in the folder without it
    usual = Path("runs") / f"{name}-seed{options.seed}{trial}"
    folder = options.out or _free_folder(usual)
    if not options.out and folder != usual:
        console.print(f"{usual} holds {_held(usual)}")
    if not complete and chosen.data.validation == 0:
        console.print(f"a {UNJUDGED}")
    dataset = data.load()
    train.create(
        folder,
        chosen,
        name,
        options.seed,
        dataset,
        limit=options.limit,
        unchanged=not overrides,
        deterministic=options.deterministic,
    )
    return folder, dataset


def _open(options: argparse.Namespace) -> tuple[Path, data.DataSet]:
    checkpoint.load_last(options.run / checkpoint.FILE)  # fails before the data set is looked for
    return options.run, data.load()


def _outcome(state: Checkpoint, folder: Path) -> str:
    end = f"after {state.seconds:.0f} s; {folder / checkpoint.FILE}"
    if (result := state.result) is not None:
        single = "" if result.views == "none" else f", {percent(result.single_view_accuracy)} without"
        return (
            f"test accuracy {percent(result.accuracy)} (views: {result.views}{single}) on "
            f"{result.test_images} images {end}"
        )
    val = state.history[-1].get("val_accuracy")
    if val is None:
        return f"{UNJUDGED} {end}"
    return f"val accuracy {percent(val)}, a trial: the test images were left alone; {end}"


def _name(name_or_path: str) -> str:
    """A recipe's name in the registry, its file's stem or, for the copy in a run's folder, the run's."""
    path = Path(name_or_path)
    run = path.with_name(checkpoint.FILE)
    if path.name == train.RECIPE and checkpoint.present(run):
        return checkpoint.load_last(run)[0].recipe_name
    return path.name.removesuffix(".toml")


def _free_folder(folder: Path) -> Path:
    """The first of ``folder``, ``folder-2``, ``folder-3``, ... that holds no run."""
    free, number = folder, 1
    while checkpoint.present(free / checkpoint.FILE):
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _held(folder: Path) -> str:
    try:
        if checkpoint.load_last(folder / checkpoint.FILE)[0].ended:
            return "a finished run"
    except ExplainedError:
        pass  # which the advice will tell
    return f"another run; to go on with that: {checkpoint.resume_command(folder)}"


def _list(console: Console, markdown: bool) -> None:
    rows = table_rows()
    if markdown:
        console.print(markdown_table(rows))
        return
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the networks of the reports, and better ones, on CIFAR-10.",
        epilog="CIFAR10_ROOT names the folder that holds cifar-10-batches-py; without it the data "
        "set is downloaded to ~/.cache/cifar10 once.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train a recipe to its end",
        description="Train a recipe. The run's folder gets recipe.toml (as resolved), metrics.jsonl "
        "(a line an epoch) and checkpoint.pt. Ctrl-C or SIGTERM leaves a checkpoint to resume from. "
        "A finished run of an unchanged recipe on all images is evaluated on the test images and adds "
        "its row to training/results.csv; a trial (--epochs, --limit, --set) is judged on held-out "
        "images only, if it has any (--set data.validation=0.1). torchrun --nproc-per-node N -m "
        "training run RECIPE shares it among N processes.",
    )
    run.add_argument("recipe", metavar="RECIPE", help="a name from 'list', or a .toml file")
    run.add_argument(
        "--out", type=Path, help="the run's folder (default: runs/RECIPE-seedN, of a trial ...-trial)"
    )
    run.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    run.add_argument("--epochs", type=int, help="epochs instead of the recipe's")
    run.add_argument(
        "--limit",
        type=_count,
        metavar="N",
        help="for trials: train and validate on the first N images only",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU too: the same seed, bitwise the same weights, resumed or not; slower",
    )
    _add_overrides(run)

    resume = commands.add_parser(
        "resume",
        help="go on with an interrupted run",
        description="Go on with an interrupted run, here or wherever its folder was copied to.",
    )
    resume.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    for command in (run, resume):
        command.add_argument(
            "--max-seconds",
            type=_count,
            metavar="N",
            help="stop within N seconds, with a checkpoint to resume from; the exit code is then 75 "
            "(torchrun's is 1). Compilation and the first step may overrun it",
        )
        command.add_argument(
            "--tensorboard",
            action="store_true",
            help="write TensorBoard events to the run's folder too",
        )
        command.add_argument(
            "--compile",
            action=argparse.BooleanOptionalAction,
            help="compile the steps, which takes g++, Python's headers, and a minute for each size of "
            "images (default: on a GPU where they are, but not with --deterministic or torchrun)",
        )

    finding = commands.add_parser(
        "lr-find",
        help="suggest a learning rate by L. Smith's range test",
        description="Train one step at each of a growing sequence of learning rates, plot the loss over "
        "them and suggest the rate at which it falls fastest. Uses training images only.",
    )
    finding.add_argument("recipe", metavar="RECIPE", help="a name from 'list', or a .toml file")
    finding.add_argument("--out", type=Path, help="the plot (default: runs/RECIPE-lr.png)")
    finding.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    finding.add_argument("--steps", type=_count, default=100, help="default: %(default)s")
    finding.add_argument("--low", type=float, default=1e-5, help="default: %(default)s")
    finding.add_argument("--high", type=float, default=1.0, help="default: %(default)s")
    _add_overrides(finding)

    reporting = commands.add_parser(
        "report",
        help="write pages about runs",
        description="Write an HTML page about each run, finished or not: its figures and curves, what "
        "its network gets wrong, its layers and its augmented images. Several runs get a page more "
        "that compares them. The test images are looked at only for runs that were evaluated on them.",
    )
    reporting.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    reporting.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a folder for all pages (default: RUN/report.html, and comparison.html above the runs)",
    )

    listing = commands.add_parser(
        "list", help="the recipes: report, parameters, reported and reached accuracy"
    )
    listing.add_argument("--markdown", action="store_true", help="as the README's table")
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="replace values of the recipe, as optimizer.lr=0.1 or augment.0.padding=2; mixing= removes "
        "the table",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:  # what torch's generators take
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to below 2**63")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
