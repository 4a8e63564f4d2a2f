"""The command line: ``s3lab show | check | reproduce | fetch | prune | eval | pack | unpack | inspect``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from s3lab.errors import DataError, S3Error
from s3lab.lab.options import make_parser

_WIDE = 200
_SHAPE = re.compile("[0-9]{1,9}x[0-9]{1,9}")
_SHOWN = 2**22


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit status: 0, or 1 and 2 as its help says.

    An interrupt is 130, as in a shell.
    """
    commands = {
        "show": _show,
        "check": _check,
        "reproduce": _reproduce,
        "fetch": _fetch,
        "prune": _prune,
        "eval": _eval,
        "pack": _pack,
        "unpack": _unpack,
        "inspect": _inspect,
    }
    try:
        options = make_parser(commands).parse_args(arguments)
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
    _need("rich", "matplotlib")
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
    _need("papermill", "matplotlib", "pandas", *(["distributed"] if options.dask else []))
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


def _fetch(options: argparse.Namespace) -> int:
    _need("transformers", "gguf")
    from s3lab.models.text.fetch import describe, fetch

    print(describe(fetch(options.model, options.cache, log=print)))
    return 0


def _prune(options: argparse.Namespace) -> int:
    _need("transformers", "tqdm")
    from s3lab.folder import claim
    from s3lab.models.prune.jobs import check_texts
    from s3lab.models.prune.sequential import prune_model
    from s3lab.models.search.prepare import prepare
    from s3lab.models.storage.checkpoint import save_pruned
    from s3lab.models.text.pretrained import load_model
    from s3lab.solvers import make_solver
    from s3lab.tensors.processes import assemble

    specs = _read_table(options.spec)
    solvers = {glob: make_solver(name) for glob, name in _read_table(options.solver or ["best"]).items()}
    check_texts(specs)
    with (
        assemble(options.distributed, options.device) as (processes, device),
        processes.united(),
        claim(options.out if processes.rank == 0 else None, options.force),
    ):
        model, tokenizer = load_model(options.model, options.dtype)
        prepared = prepare(
            model,
            tokenizer,
            specs,
            rotation=options.rotate,
            permutation=options.permute,
            calibration=options.calibration,
            sequences=options.sequences,
            length=options.length,
            held_out=options.held_out,
            batch=options.batch,
            seed=options.seed,
        )
        run = prune_model(
            model,
            tokenizer,
            specs,
            solvers,
            calibration=options.calibration,
            sequences=options.sequences,
            length=options.length,
            damp=options.damp,
            refit=options.refit,
            refine=options.refine,
            held_out=options.held_out,
            hessians=options.hessians,
            moments=options.moments,
            batch=options.batch,
            seed=options.seed,
            device=device,
            out=Path(options.out) / "run",
            provenance={"model": options.model, "text": options.calibration, **prepared},
            distributed=processes,
        )
        if processes.rank > 0:
            return 0
        save_pruned(model, tokenizer, options.out, run)
    errors = [row["error"] for row in run.matrices if row["error"] is not None]
    error = f"{sum(errors) / len(errors):.2%}" if errors else "none"
    print(f"kept {run.density:.1%} of {len(run.matrices)} matrices, mean error {error}: {options.out}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    _need("transformers", *(["lm_eval"] if options.tasks else []))
    from s3lab.models.measure.evaluate import evaluate, evaluate_lm_eval
    from s3lab.models.text.corpus import read
    from s3lab.models.text.pretrained import load_model

    model, tokenizer = load_model(options.model, options.dtype, options.device)
    documents = list(islice(read("test", options.text, options.seed), options.documents))
    figures = evaluate(model, tokenizer, documents, length=options.length, stride=options.stride, batch=options.batch)
    if options.tasks:
        tasks = evaluate_lm_eval(model, tokenizer, tasks=options.tasks, length=options.length, batch=options.batch)
        figures |= {f"{task} {metric}": value for task, found in tasks.items() for metric, value in found.items()}
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<32} {value:.6g}")
    return 0


def _pack(options: argparse.Namespace) -> int:
    _need("safetensors")
    from s3lab.folder import claim
    from s3lab.models.storage.packed import pack_model
    from s3lab.packing.weigh import summarise, weigh

    with claim(options.out, options.force):
        dense = pack_model(options.model, options.out, values=options.values, group=options.group)
    for name, reason in dense.items():
        print(f"{name}: dense, {reason}")
    print(f"{summarise(weigh(options.out))}: {options.out}")
    return 0


def _unpack(options: argparse.Namespace) -> int:
    _need("safetensors")
    from s3lab.folder import claim
    from s3lab.models.storage.packed import unpack_model

    with claim(options.out, options.force):
        unpack_model(options.model, options.out)
    print(options.out)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    _need("safetensors")
    from s3lab.packing.weigh import report, weigh

    print(report(weigh(options.path)))
    return 0


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


def _read_table(values: Sequence[str]) -> dict[str, str]:
    """Return {glob: value} from VALUE, which is for all, and GLOB=VALUE."""
    pairs = [value.partition("=") for value in values]
    return {glob if sign else "*": value if sign else glob for glob, sign, value in pairs}


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DataError(f"this needs {', '.join(missing)}: pip install 's3lab[all]'")
