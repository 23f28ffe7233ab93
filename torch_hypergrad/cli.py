"""The command line: ``torch-hypergrad train | resume | report | view | compare | predict``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from . import __version__
from .experiment.config import Config, ConfigError
from .experiment.options import one_line
from .experiment.parsing import Request, add_config, as_yaml, class_asked_for, config_of, lay_over, parse
from .experiment.stopping import TrainingError

OK, FAILED, REFUSED, UNTUNED = 0, 1, 2, 3
STOPPED = 128  # and the number of the signal, as shells do


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0; 1 if training failed, or its report could not be written; 2 for a configuration or
        folder that is refused; 3 if all hyper steps of a run were skipped; 128 and the signal's number if a
        signal stopped the run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, commands = _parser()
    try:
        configured = commands[argv[0]] if argv and argv[0] in CONFIGURED else None
        if configured is not None and (asked := class_asked_for(argv)) is not None:
            return _class_help(*asked)
        request = parse(parser, argv, configured)
        command = request.arguments.command
        return COMMANDS[command](request, request.arguments[command])
    except ConfigError as error:
        return _say(f"torch-hypergrad: error: {' '.join(str(error).split())}", REFUSED)
    except TrainingError as error:
        return _say(f"torch-hypergrad: {error}", FAILED)
    except KeyboardInterrupt:
        return _say(
            "Interrupted at once: what came after the last checkpoint is lost. Go on with: torch-hypergrad "
            "resume and the folder that was printed at the start.",
            STOPPED + signal.SIGINT,
        )


@cache
def _parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(
        prog="torch-hypergrad",
        description="Trains models and tunes their hyperparameters by hypergradients.",
        exit_on_error=False,
        version=__version__,
    )
    commands = {
        name: ArgumentParser(
            exit_on_error=False, description=one_line(run.__doc__), usage=f"torch-hypergrad {USAGE[name]}"
        )
        for name, run in COMMANDS.items()
    }
    _add_arguments(commands)
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, command in commands.items():
        subcommands.add_subcommand(name, command, help=command.description)
    return parser, commands


def _add_arguments(commands: dict[str, ArgumentParser]) -> None:
    for name in CONFIGURED:
        add_config(commands[name])
    for command, names in PLACES.items():
        for name, (kind, number, meaning) in names.items():
            commands[command].add_argument(name, type=kind, nargs=number, help=meaning)
    for command, flags in FLAGS.items():
        for name, (kind, default, meaning) in flags.items():
            bare: dict[str, Any] = {"nargs": "?", "const": True} if kind is bool else {}
            commands[command].add_argument(name, type=kind, default=default, help=meaning, **bare)


RUNS = {"run_dirs": (Path, "+", "folders of runs; several are compared")}
FINISHED = {"run_dir": (Path, None, "the folder of a finished run")}
PLACES: dict[str, dict[str, tuple[Any, str | None, str]]] = {
    "resume": {"run_dir": (Path | None, "?", "the folder of the run")},
    "report": {**RUNS},
    "view": {**RUNS},
    "export": {**FINISHED},
    "predict": {**FINISHED, "files": (Path, "+", "pictures, tables or texts, as the run has")},
}
FLAGS: dict[str, dict[str, tuple[Any, Any, str]]] = {
    "train": {
        "--dry_run": (bool, False, "check and build everything, train nothing"),
        "--print_config": (bool, False, "print the configuration that results, train nothing"),
        "--fixed": (str | None, None, "train.fixed, with one episode and no hyper steps"),
        "--baseline": (bool | None, None, "output.baseline"),
        "--seeds": (int, 1, "how many runs, with seeds from train.seed on, and one report"),
        "--jobs": (int, 1, "how many of these at a time, each a process"),
    },
    "resume": {"--last": (bool, False, "the run in runs/ that was last written to")},
    "report": {"--out": (Path | None, None, "folder of the report")},
    "view": {"--port": (int, 8765, "of 127.0.0.1; 0 takes a free one")},
    "export": {
        "--to": (str, "onnx", "onnx, torchscript or state_dict"),
        "--out": (Path | None, None, "the file"),
    },
    "search": {
        "--sampler": (str, "tpe", "tpe, random, grid, gp, cmaes, nsga2 or another of torch_hypergrad.search"),
        "--trials": (int, 20, "how many runs"),
        "--pruner": (
            str,
            "none",
            "none, median, percentile, asha or hyperband: gives up runs that lag behind",
        ),
        "--storage": (str | None, None, "URL of the study, for others to join. null is a file in its folder"),
        "--workers": (int, 1, "how many runs at a time, each a process"),
    },
    "compare": {
        "--seeds": (int, 3, "how many seeds, from train.seed on"),
        "--jobs": (int, 1, "how many runs at a time, each a process"),
    },
}
USAGE = {
    "train": "train [--config FILE] [--KEY VALUE ...] [--fixed FILE] [--seeds N] [--jobs N]",
    "resume": "resume RUN_DIR | --last",
    "report": "report RUN_DIR [RUN_DIR ...] [--out FOLDER]",
    "search": "search [--config FILE] [--KEY VALUE ...] [--sampler NAME] [--trials N] [--pruner NAME] "
    "[--storage URL] [--workers N]",
    "view": "view RUN_DIR [RUN_DIR ...] [--port N]",
    "compare": "compare [--config FILE] [--KEY VALUE ...] [--seeds N] [--jobs N]",
    "export": "export RUN_DIR --to onnx|torchscript|state_dict [--out FILE]",
    "predict": "predict RUN_DIR FILE [FILE ...]",
}


CONFIGURED = ("train", "search", "compare")  # which take the keys of a configuration


def _class_help(section: str, name: str) -> int:
    from .experiment.catalog import arguments_of  # knows all classes, and with them torch

    print(arguments_of(section, name))
    return OK


def _train(request: Request, arguments: Namespace) -> int:
    """Trains by a configuration, tunes while training, and writes a report."""
    config = config_of(_with_shorthands(request.content, arguments))
    if arguments.print_config:
        print(as_yaml(config), end="")
        return OK
    from .experiment import start
    from .experiment.build import build

    _keep_freed_memory()
    if arguments.dry_run:
        build(config)
        print("The configuration can be run.")
        return OK
    if arguments.seeds != 1 or arguments.jobs != 1:
        return _train_seeds(config, _name(request), arguments)
    return _end(*start.train(config, _name(request)))


def _with_shorthands(content: dict[str, Any], arguments: Namespace) -> dict[str, Any]:
    """``--fixed`` and ``--baseline`` in the places of their keys."""
    if arguments.fixed is not None:
        lay_over(
            content, {"train": {"fixed": arguments.fixed, "episodes": 1, "hyper_every": None, "warmup": 0}}
        )
    if arguments.baseline is not None:
        lay_over(content, {"output": {"baseline": arguments.baseline}})
    return content


def _train_seeds(config: Config, name: str, arguments: Namespace) -> int:
    from .experiment.seeds import train_seeds

    folder, runs, stopped_by = train_seeds(config, name, arguments.seeds, arguments.jobs)
    if stopped_by is not None:
        return _stopped(folder, stopped_by)
    print()
    return _show(runs, folder / "report")


def _stopped(folder: Path, signal_number: int) -> int:
    go_on = f"Stopped. Go on with the same command and --output.folder {folder}"
    return _say(go_on, STOPPED + signal_number)


def _resume(request: Request, arguments: Namespace) -> int:
    """Goes on with a run that was stopped, killed or lost; the result is bitwise the same on a CPU."""
    if (arguments.run_dir is not None) == arguments.last:
        raise ConfigError("resume takes the folder of a run, or --last for the last one in runs/.")
    from .experiment import start

    _keep_freed_memory()
    return _end(*start.resume(start.last_run() if arguments.last else arguments.run_dir.expanduser()))


def _report(request: Request, arguments: Namespace) -> int:
    """Writes the report of a run, or compares several."""
    out = arguments.out and arguments.out.expanduser()
    return _show([folder.expanduser() for folder in arguments.run_dirs], out)


def _view(request: Request, arguments: Namespace) -> int:
    """Shows the report of a run in the browser, renewed while training goes on."""
    from .experiment.view import WriteReport, view

    def load() -> WriteReport:
        from .experiment.report import write_report

        return write_report

    view([folder.expanduser() for folder in arguments.run_dirs], arguments.port, load)
    return OK


def _compare(request: Request, arguments: Namespace) -> int:
    """Trains the same model with fixed, searched and tuned hyperparameters, and compares them on the test
    set."""
    from .experiment.compare import compare

    _keep_freed_memory()
    config = config_of(request.content)
    folder, runs, stopped_by = compare(config, _name(request), arguments.seeds, arguments.jobs)
    if stopped_by is not None:
        return _stopped(folder, stopped_by)
    print()
    return _show(runs, folder / "report")


def _search(request: Request, arguments: Namespace) -> int:
    """Trains many runs, and searches what space names; hypergradients tune the rest."""
    from .experiment.search import report_of_study, search, table_of_study
    from .experiment.start import folder_of
    from .experiment.study import Search

    _keep_freed_memory()
    config, name = config_of(request.content), _name(request)
    folder = folder_of(config, f"search-{name}")
    study = Search(
        config,
        config.space,
        folder,
        sampler=arguments.sampler,
        pruner=arguments.pruner,
        num_trials=arguments.trials,
        storage=arguments.storage,
        name=name,
    )
    stopped_by = search(study, arguments.workers)
    print(f"\n{table_of_study(study)}\n\nReport: {report_of_study(study)}", flush=True)
    if stopped_by is not None:
        return _stopped(folder, stopped_by)
    return OK


def _export(request: Request, arguments: Namespace) -> int:
    """Writes the network of a finished run in another format."""
    from .experiment.export import export

    out = arguments.out and arguments.out.expanduser()
    try:
        print(export(arguments.run_dir.expanduser(), arguments.to, out))
    except ModuleNotFoundError as error:
        raise ConfigError(str(error)) from error
    return OK


def _predict(request: Request, arguments: Namespace) -> int:
    """Prints what the network of a finished run says of files."""
    from .experiment.trained import load_run

    for row in load_run(arguments.run_dir).predict([file.expanduser() for file in arguments.files]):
        print(*row, sep="\t")
    return OK


COMMANDS: dict[str, Callable[[Request, Namespace], int]] = {
    "train": _train,
    "resume": _resume,
    "report": _report,
    "search": _search,
    "view": _view,
    "compare": _compare,
    "export": _export,
    "predict": _predict,
}


def _end(folder: Path, stopped_by: int | None) -> int:
    """What a user sees at the end of training."""
    if stopped_by is not None:
        return _say(f"Stopped. Go on with: torch-hypergrad resume {folder}", STOPPED + stopped_by)
    print()
    code = _show([folder])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if code == OK and summary["num_skipped"] and not summary["num_hyper_steps"]:
        skipped = summary["num_skipped"]
        return _say(
            f"Nothing was tuned: all {skipped} hyper steps were skipped. The report says why.", UNTUNED
        )
    return code


def _show(folders: Sequence[Path], out: Path | None = None) -> int:
    """The table of runs, what their hyper steps warned of, and then, as it may fail, the report."""
    from .experiment.report import table_of, warnings_of, write_report

    print("\n\n".join([table_of(folders), *warnings_of(folders)]), flush=True)
    try:
        page = write_report(folders, out)
    except OSError as error:
        again = f"torch-hypergrad report {' '.join(map(str, folders))} --out FOLDER"
        return _say(f"The report could not be written: {error}. Write it elsewhere: {again}", FAILED)
    print(f"\nReport: {page}")
    return OK


def _keep_freed_memory() -> None:
    """For the whole process, which is the command's own."""
    from .device import host_memory  # not before there is something to train: torch takes seconds

    host_memory.keep_freed_memory()


def _name(request: Request) -> str:
    """A run's name: that of its configuration file."""
    return request.files[0].stem if request.files else "run"


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
