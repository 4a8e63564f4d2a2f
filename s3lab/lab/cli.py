"""The command line: ``s3lab show | check | reproduce | fetch | prune | tune | eval | pack | unpack | inspect``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from s3lab.errors import DataError, S3Error
from s3lab.lab import commands
from s3lab.lab.arguments import need
from s3lab.lab.options import make_parser

_WIDE = 200
_SHAPE = re.compile("[0-9]{1,9}x[0-9]{1,9}")
_SHOWN = 2**22


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit status: 0, or 1 and 2 as its help says.

    An interrupt is 130, as in a shell.
    """
    run = {
        "show": _show,
        "check": _check,
        "reproduce": _reproduce,
        "fetch": commands.fetch,
        "prune": commands.prune,
        "tune": commands.tune,
        "eval": commands.measure,
        "pack": commands.pack,
        "unpack": commands.unpack,
        "inspect": commands.inspect,
    }
    try:
        options = make_parser(run).parse_args(arguments)
        return options.run(options)
    except S3Error as error:
        print(f"s3lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ns3lab: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `s3lab show --list | head`: what is left to say goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that is read-only, a path through a file
        where = f"{str(error.filename)!r}: " if error.filename else ""
        print(f"s3lab: {where}{error.strerror or error}; what was finished is kept", file=sys.stderr)
        return 2


def _show(options: argparse.Namespace) -> int:
    need("rich", "matplotlib")
    from rich.console import Console

    from s3lab.algebra.patterns import parse
    from s3lab.lab.draw import terminal

    # Where the output goes to a file, or to another program, nothing is cut.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDE)
    if options.list:
        console.print(terminal.list_patterns())
        return 0
    if options.spec is None:
        raise DataError("tell a spec to show, such as 2:4, or --list")
    bound = terminal.bind(parse(options.spec), _read_shapes(options.shape))
    pictures = terminal.project(bound, options.seed)
    if options.out:
        terminal.save(pictures, bound.text, Path(options.out))
        print(options.out)
        return 0
    console.print(terminal.describe(bound), soft_wrap=True)
    for picture in pictures:
        console.print(f"\n{picture.title}" if picture.title else "")
        console.print(terminal.draw(picture, console.width, console.options.ascii_only), soft_wrap=True)
    console.print(f"\n{terminal.LEGEND}", style="dim", soft_wrap=True)
    return 0


def _check(options: argparse.Namespace) -> int:
    from s3lab.lab import installation

    findings = installation.check()
    print(installation.report(findings))
    return int(not installation.works(findings))


def _reproduce(options: argparse.Namespace) -> int:
    need("papermill", "matplotlib", "pandas", *(["distributed"] if options.dask else []))
    from s3lab.lab.run.reproduce import reproduce, summarise

    name = Path(options.profile).stem
    out = options.out or ("figures" if name == "quick" else f"figures/{name}")
    outcomes = reproduce(
        options.names,
        options.profile,
        out,
        values=options.set,
        grid=options.grid,
        workers=options.jobs,
        dask=options.dask,
        force=options.force,
    )
    print(summarise(outcomes, out))
    return int(any(outcome.error for outcome in outcomes))


def _read_shapes(texts: Sequence[str] | None) -> dict[str, tuple[int, int]] | tuple[int, int] | None:
    """Return (M, K) from MxK, {name: (M, K)} from NAME=MxK, None from nothing; DataError for anything else."""
    shapes: dict[str, tuple[int, int]] = {}
    for text in texts or ():
        name, _, extents = text.rpartition("=")
        extents = extents.replace("×", "x")
        M, _, K = extents.partition("x")
        if not _SHAPE.fullmatch(extents) or name in shapes:
            raise DataError(f"--shape {text} is no shape, or one too many: write 8x16, or NAME=8x16 for each weight")
        shapes[name] = (int(M), int(K))
        if int(M) * int(K) > _SHOWN:
            raise DataError(f"--shape {text} is of more than {_SHOWN} weights: a smaller one shows the same pattern")
    return shapes[""] if len(shapes) == 1 and "" in shapes else shapes or None
