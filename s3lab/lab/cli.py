"""The command line: ``s3lab reproduce``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from s3lab import __version__
from s3lab.errors import DataError, S3Error

_REPRODUCE = """\
Run the notebooks of a profile and leave their tables, figures and records in a folder.

The quick profile takes minutes and needs neither a GPU nor a network; the paper profile takes the paper's
sizes and a CUDA device.  A profile is a YAML file, {notebook: {parameter: value}}; an unknown notebook or
parameter is an error before anything runs.  Executed notebooks are kept in FOLDER/runs/, with the traceback
where one failed; a failed one does not stop the others.
"""
_EXAMPLES = """\
examples:
  s3lab reproduce                                  every notebook of the quick profile
  s3lab reproduce 01 02                            these two, by number
  s3lab reproduce 02 --profile paper               Table 1 at the paper's size
  s3lab reproduce --profile mine.yaml --out mine   your own parameters, your own folder

exit status: 0 all notebooks ran, 1 one or more failed, 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit status: 0, or 1 and 2 as its help says."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except S3Error as error:
        print(f"s3lab: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="s3lab", description="Structured sparsity as a layout.")
    parser.add_argument("--version", action="version", version=f"s3lab {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    reproduce = commands.add_parser(
        "reproduce",
        help="run the notebooks of a profile; see s3lab reproduce --help",
        description=_REPRODUCE,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reproduce.add_argument(
        "names", nargs="*", metavar="NAME", help="notebooks, by number or name (default: all of the profile)"
    )
    reproduce.add_argument("--profile", default="quick", help="quick, paper, or a YAML file (default: quick)")
    reproduce.add_argument("--out", default="figures", metavar="FOLDER", help="for the results (default: figures)")
    reproduce.set_defaults(run=_reproduce)
    return parser


def _reproduce(options: argparse.Namespace) -> int:
    missing = [name for name in ("papermill", "matplotlib", "pandas") if find_spec(name) is None]
    if missing:
        raise DataError(f"reproduce needs {', '.join(missing)}: pip install 's3lab[all]'")
    from s3lab.lab.reproduce import reproduce, summarise

    outcomes = reproduce(options.names, options.profile, options.out)
    print(summarise(outcomes, options.out))
    return int(any(outcome.error for outcome in outcomes))
