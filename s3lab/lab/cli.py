"""The command line: ``s3lab reproduce | prune | eval``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

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
_PRUNE = """\
Prune a causal language model decoder layer by decoder layer and save it where transformers can load it.

MODEL is "reference" for the small model that ships with s3lab, the folder of a saved model, or a model of the
Hugging Face hub.  After each decoder layer the run is saved in FOLDER/run: the same command goes on after a crash.
FOLDER then holds the model, its card README.md, and all figures in s3lab.json.
"""
_PRUNE_EXAMPLES = """\
examples:
  s3lab prune reference --spec 2:4 --solver sobs --out pruned
  s3lab prune my-model --spec '*.mlp.*=2:4' --spec '*.o_proj=8:16' --spec '*=dense' --out pruned
  s3lab prune Qwen/Qwen3-1.7B --spec 2:4 --calibration c4 --sequences 1024 --length 1024 --device cuda --out pruned

A spec or solver of the form GLOB=VALUE is for the matrices whose names match; the first that matches counts.
"""
_EVAL = """\
Measure the perplexity of a causal language model per token, word and byte, and lm_eval tasks if any are named.

MODEL is as in `s3lab prune`.  Each token is scored once, with at least LENGTH − STRIDE tokens before it.
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
    _add_prune(commands)
    _add_eval(commands)
    return parser


def _add_prune(commands: argparse._SubParsersAction) -> None:
    prune = commands.add_parser(
        "prune",
        help="prune a language model; see s3lab prune --help",
        description=_PRUNE,
        epilog=_PRUNE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prune.add_argument("model", metavar="MODEL")
    prune.add_argument(
        "--spec", action="append", required=True, metavar="SPEC", help="such as 2:4, or GLOB=SPEC, repeated"
    )
    prune.add_argument(
        "--solver", action="append", metavar="NAME", help="sobs, sparsegpt, …, or GLOB=NAME (default: sobs)"
    )
    prune.add_argument("--calibration", default="stdlib", metavar="TEXT", help="stdlib, a text file, c4, or wikitext")
    prune.add_argument("--sequences", type=int, default=128, metavar="N", help="of calibration text (default: 128)")
    prune.add_argument("--length", type=int, default=256, metavar="N", help="tokens in a sequence (default: 256)")
    prune.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the sequences (default: 0.1)")
    prune.add_argument("--damp", type=float, default=1e-2, help="share of the mean diagonal (default: 0.01)")
    prune.add_argument("--refit", action="store_true", help="fit the kept weights exactly after the solver")
    prune.add_argument("--hessians", choices=("pruned", "dense"), default="pruned", help="of which model's inputs")
    prune.add_argument("--batch", type=int, default=8, metavar="N", help="sequences at a time (default: 8)")
    prune.add_argument("--seed", type=int, default=0)
    prune.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    prune.add_argument("--dtype", default="auto", help="of the weights (default: as they were saved)")
    prune.add_argument("--out", required=True, metavar="FOLDER", help="for the run and the pruned model")
    prune.set_defaults(run=_prune)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    measure = commands.add_parser(
        "eval",
        help="measure a language model; see s3lab eval --help",
        description=_EVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measure.add_argument("model", metavar="MODEL")
    measure.add_argument("--text", default="stdlib", help="stdlib, a text file, c4, or wikitext (default: stdlib)")
    measure.add_argument("--documents", type=int, metavar="N", help="the first so many (default: all)")
    measure.add_argument("--length", type=int, default=256, metavar="N", help="tokens in a window (default: 256)")
    measure.add_argument("--stride", type=int, metavar="N", help="tokens scored in a window (default: all)")
    measure.add_argument("--batch", type=int, default=8, metavar="N", help="windows at a time (default: 8)")
    measure.add_argument("--tasks", nargs="*", default=[], metavar="NAME", help="tasks of lm_eval, such as wikitext")
    measure.add_argument("--seed", type=int, default=0, help="of the order in which the hub's text is read")
    measure.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    measure.add_argument("--dtype", default="auto", help="of the weights (default: as they were saved)")
    measure.set_defaults(run=_eval)


def _reproduce(options: argparse.Namespace) -> int:
    _need("papermill", "matplotlib", "pandas")
    from s3lab.lab.reproduce import reproduce, summarise

    outcomes = reproduce(options.names, options.profile, options.out)
    print(summarise(outcomes, options.out))
    return int(any(outcome.error for outcome in outcomes))


def _prune(options: argparse.Namespace) -> int:
    _need("transformers", "tqdm")
    from s3lab.models.checkpoint import save_pruned
    from s3lab.models.pretrained import load_model
    from s3lab.models.sequential import prune_model

    model, tokenizer = load_model(options.model, options.dtype)
    run = prune_model(
        model,
        tokenizer,
        _read_table(options.spec),
        _read_table(options.solver or ["sobs"]),
        calibration=options.calibration,
        sequences=options.sequences,
        length=options.length,
        damp=options.damp,
        refit=options.refit,
        held_out=options.held_out,
        hessians=options.hessians,
        batch=options.batch,
        seed=options.seed,
        device=options.device,
        out=Path(options.out) / "run",
        provenance={"model": options.model, "text": options.calibration},
    )
    save_pruned(model, tokenizer, options.out, run)
    errors = [row["error"] for row in run.matrices if row["error"] is not None]
    error = f"{sum(errors) / len(errors):.2%}" if errors else "none"
    print(f"kept {run.density:.1%} of {len(run.matrices)} matrices, mean error {error}: {options.out}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    _need("transformers", *(["lm_eval"] if options.tasks else []))
    from s3lab.models.corpus import read
    from s3lab.models.evaluate import evaluate, evaluate_lm_eval
    from s3lab.models.pretrained import load_model

    model, tokenizer = load_model(options.model, options.dtype, options.device)
    documents = list(islice(read("test", options.text, options.seed), options.documents))
    figures = evaluate(model, tokenizer, documents, length=options.length, stride=options.stride, batch=options.batch)
    if options.tasks:
        tasks = evaluate_lm_eval(model, tokenizer, tasks=options.tasks, length=options.length, batch=options.batch)
        figures |= {f"{task} {metric}": value for task, found in tasks.items() for metric, value in found.items()}
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<32} {value:.6g}")
    return 0


def _read_table(values: Sequence[str]) -> dict[str, str]:
    """Return {glob: value} from VALUE, which is for all, and GLOB=VALUE."""
    pairs = [value.partition("=") for value in values]
    return {glob if sign else "*": value if sign else glob for glob, sign, value in pairs}


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DataError(f"this needs {', '.join(missing)}: pip install 's3lab[all]'")
