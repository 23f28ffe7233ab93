"""Time and memory of hypergradients, ours beside peers' and the plain loop's.

    python -m benchmarks.bench [--suite quick|targets|small|resnet18|grid|scaling ...]
                              [--out docs/results/bench.md]

Prints a table for each case as soon as it is measured, and writes all as one page. Answers are cross-checked:
a wrong one ends the run. ``--profile`` shows instead in which functions our time goes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import page, plots
from .contestants import CONTESTANTS
from .measure import Limits
from .results import DisagreementError, Table
from .running import Run
from .suites import SUITES, blocks


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(c.name for of_task in CONTESTANTS.values() for c in of_task))
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["quick"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", help="only cases with these models")
    parser.add_argument("--max-size", type=int, help="only cases with at most so many steps or terms")
    parser.add_argument("--contestants", nargs="+", choices=names, help="only these")
    parser.add_argument(
        "--time-limit", type=float, default=Limits.seconds, help="seconds for one measurement"
    )
    parser.add_argument("--memory-limit", type=float, default=Limits.gigabytes, help="GB for one measurement")
    parser.add_argument("--threads", type=int, help="of torch, instead of its default")
    parser.add_argument(
        "--allocator",
        choices=page.ALLOCATORS,
        default=Limits.allocator,
        help="of all contestants alike: keep freed memory, or the default settings",
    )
    parser.add_argument("--profile", action="store_true", help="where our time goes, by function")
    parser.add_argument("--out", type=Path, help="the page to write; pictures go beside it")
    return parser.parse_args(arguments)


def chosen_cases(options: argparse.Namespace) -> list:
    cases = [case for suite in options.suite for case in SUITES[suite]]
    return [
        case
        for case in dict.fromkeys(cases)
        if (options.models is None or case.model in options.models)
        and (options.max_size is None or case.size <= options.max_size)
    ]


def tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
        SystemExit: with a message, if an answer is wrong or one of our contestants failed.
    """
    options = parse(arguments)
    limits = Limits(options.time_limit, options.memory_limit, options.threads, options.allocator)
    run = Run(options.repeats, limits, tell, options.contestants)
    command = shlex.join(
        ["python", "-m", "benchmarks.bench", *(sys.argv[1:] if arguments is None else arguments)]
    )
    head = page.header(command, limits)
    cases = chosen_cases(options)
    if options.profile:
        sections = [head, *(page.profile(case.title, run.profiles(case)) for case in cases)]
        print("\n".join(sections))
        write(options.out, sections)
        return
    head += "\n" + page.how_to_read(options.repeats, limits)
    print(head)
    tables: list[Table] = []
    try:
        for block in blocks(cases):
            tables += run.tables(block)
            print("\n".join(page.section(table) for table in tables[-len(block) :]))
    except DisagreementError as error:
        raise SystemExit(f"Hypergradients disagree. {error}") from None
    finish(options.out, head, tables)


def finish(out: Path | None, head: str, tables: list[Table]) -> None:
    """Targets, legend, pictures and the page; then what of ours failed."""
    ends = [text for text in (page.targets(tables), page.legend(tables)) if text]
    print("\n".join(ends))
    pictures = plots.draw(tables, out) if out is not None else []
    write(out, [head, *pictures, ends[0] if len(ends) == 2 else "", *map(page.section, tables), ends[-1]])
    failures = [failure for table in tables for failure in table.failures()]
    if failures:
        raise SystemExit("Our own contestants failed:\n" + "\n".join(failures))


def write(out: Path | None, sections: list[str]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(section for section in sections if section), encoding="utf-8")


if __name__ == "__main__":
    main()
