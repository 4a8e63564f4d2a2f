"""Every solver on every pattern, on the reference model's layers and on generated ones, beside its peers.

    python benchmarks/compare_solvers.py                        # the first three suites, on a CPU
    python benchmarks/compare_solvers.py --suite speed --device cuda
    python benchmarks/compare_solvers.py --suite unseen         # once a release, never to tune by

quality   error on calibration and held-out tokens: seven matrices of a decoder layer, and layers of K = 512, 1024 and
          2048 with two spectra, six patterns
speed     time and memory with the peers in the same process: K = 1536 with M = 384, K = 3072 with M = 96, on 2:4
scaling   time over K at M = 256 and over M at K = 512, on 2:4
unseen    error on calibration and held-out tokens of layers that nothing was tuned on: a seeded third of SmolLM2's 210
          matrices, each with some of 32 patterns drawn for it.  Every look is counted in results/unseen_looks.csv.

Local search, many times slower than all others at these sizes, is in the quality suite alone, up to K = 768, unless
--methods asks for it.  Prints tables and writes one CSV per suite, layer by layer as they come:
benchmarks/results/compare_solvers_<suite>.csv unless --out says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from random import Random

import pandas as pd
from facts import describe
from peers import find_peers
from tqdm import tqdm

from s3lab.files import write
from s3lab.lab.study import bench
from s3lab.models.measure.layers import Layer, generate_layer, layers_of_model
from s3lab.models.structure.capture import find_linears
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import load_reference

RESULTS = Path(__file__).parent / "results"
PATTERNS = ["2:4", "2:4@1x2", "coupled-2:4", "block16", "8:16", "50%/row"]
DAMP = 1e-2
SIZES = [(384, 1536), (96, 3072)]
SEARCHED = 768  # inputs
UNSEEN_METHODS = ["sparsegpt", "sobs", "admm"]
UNSEEN_TOKENS = {"calibration": 64, "test": 16}  # sequences of 512
TIMED = [name for name in bench.METHODS if "refine" not in name]
UNSEEN = """
    2:4 4:8 8:16 16:32 50%/row 50% 2:4@1x2 2:4@1x8 coupled-2:4 block16 2:4@16x1 50%@4x4 50%@16x16 vnm-64:2:8
    transposable-2:4 2:4_plus_12:192 1:4 3:4 4:16 12:16 25%/row 75%/row 25% 75% 1:4@1x2 3:4@1x2 1:4@1x8 3:4@1x8 1:4@16x1
    3:4@16x1 25%@4x4 75%@4x4
"""
LOOKS = RESULTS / "unseen_looks.csv"
SCALING = [(256, K) for K in (256, 512, 1024, 2048)] + [(M, 512) for M in (64, 128, 512, 1024)]


def quality_layers(device: str) -> Iterator[Layer]:
    model, tokenizer = load_reference()
    calibration = corpus.tokens(tokenizer, "calibration", 256, 200, 0).to(device)
    test = corpus.tokens(tokenizer, "test", 256, 50, 0).to(device)
    yield from layers_of_model(model.to(device), calibration, test, "model.layers.3.*")
    for K in (512, 1024, 2048):
        for decay in (0.5, 1.0):
            yield generate_layer(256, K, 8 * K, decay=decay, device=device)


def run_quality(device: str, methods: list[str] | None) -> Iterator[dict]:
    for layer in quality_layers(device):
        names = methods or (list(bench.METHODS) if layer.W.shape[1] <= SEARCHED else TIMED)
        for pattern in tqdm(PATTERNS, desc=layer.name):
            for row in bench.measure(bench.make_methods(layer, pattern, names, DAMP), layer, count=False):
                yield {"pattern": pattern, **row}


def run_speed(device: str, methods: list[str], repeats: int, sizes: list[tuple[int, int]]) -> Iterator[dict]:
    for M, K in tqdm(sizes, desc="speed"):
        layer = generate_layer(M, K, 16384, device=device)
        ready = bench.make_methods(layer, "2:4", methods, DAMP) | find_peers(layer.W, layer.H, "2:4", DAMP)
        yield from ({"pattern": "2:4", **row} for row in bench.measure(ready, layer, repeats, count=False))


def draw_unseen(device: str, count: int) -> Iterator[Layer]:
    """Yield so many of SmolLM2's matrices, drawn with seed 0; a third of them, 70, is what nothing is tuned on."""
    model, tokenizer = load_model("smollm2", "float32", device)
    names = Random(0).sample(list(find_linears(model, "model.layers.*")), 70)[:count]
    tokens = [corpus.tokens(tokenizer, split, 512, count, 0).to(device) for split, count in UNSEEN_TOKENS.items()]
    yield from layers_of_model(model, *tokens, names)


def run_unseen(device: str, methods: list[str] | None, cases: int) -> Iterator[dict]:
    """Yield the rows of the unseen matrices, each with ``cases`` patterns of its own."""
    draw, patterns = Random(0), [text.replace("_", " ") for text in UNSEEN.split()]
    for layer in tqdm(draw_unseen(device, 70), total=70, desc="unseen"):
        for pattern in draw.sample(patterns, cases):
            ready = bench.make_methods(layer, pattern, methods or UNSEEN_METHODS, DAMP)
            yield from ({"pattern": pattern, **row} for row in bench.measure(ready, layer, count=False))


def tell_unseen(table: pd.DataFrame, facts: dict) -> None:
    """Print how ADMM compares with S-OBS and SparseGPT, and add this look to the list of all."""
    for split in ("error", "error_test"):
        errors = table.pivot_table(split, ["layer", "pattern"], "method")
        for rival, limit in (("sobs", 1.0), ("sobs", 1.003), ("sparsegpt", 0.85)):
            ratios = errors["admm"] / errors[rival]
            print(
                f"{split}: ADMM / {rival} mean {ratios.mean():.4f}, largest {ratios.max():.4f}, "
                f"at most {limit} in {(ratios <= limit).mean():.1%} of {len(ratios)} cases"
            )
    looks = pd.read_csv(LOOKS) if LOOKS.exists() else pd.DataFrame()
    look = {"commit": facts["commit"], "cases": len(errors), "s3lab": facts["s3lab"]}
    write(LOOKS, pd.concat([looks, pd.DataFrame([look])]).to_csv(index=False).encode())


def run_scaling(device: str, methods: list[str], repeats: int) -> Iterator[dict]:
    for M, K in tqdm(SCALING, desc="scaling"):
        layer = generate_layer(M, K, 8 * K, device=device)
        ready = bench.make_methods(layer, "2:4", methods, DAMP)
        yield from ({"pattern": "2:4", **row} for row in bench.measure(ready, layer, repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["quality", "speed", "scaling", "unseen", "all"], default="all")
    parser.add_argument("--methods", nargs="+", choices=list(bench.METHODS))
    parser.add_argument("--inputs", nargs="+", type=int, default=[1536, 3072], help="K of the speed suite")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", type=int, default=3, help="patterns for each matrix of the unseen suite")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    facts = {
        "damp": DAMP,
        "seed": 0,
        "peak_gflops": bench.measure_peak(args.device),
        **describe(args.device, "sparsekit"),
    }
    suites = {
        "quality": lambda: run_quality(args.device, args.methods),
        "speed": lambda: run_speed(
            args.device, args.methods or TIMED, args.repeats, [(M, K) for M, K in SIZES if K in args.inputs]
        ),
        "scaling": lambda: run_scaling(args.device, args.methods or TIMED, args.repeats),
        "unseen": lambda: run_unseen(args.device, args.methods, args.cases),
    }
    for name in ["quality", "speed", "scaling"] if args.suite == "all" else [args.suite]:
        rows: list[dict] = []
        for _, of_layer in groupby(suites[name](), lambda row: row["layer"]):
            rows += ({**row, **facts} for row in of_layer)
            write(args.out / f"compare_solvers_{name}.csv", pd.DataFrame(rows).to_csv(index=False).encode())
        table = pd.DataFrame(rows)
        if name == "unseen":
            tell_unseen(table, facts)
            continue
        index = ["layer", "pattern"] if name == "quality" else ["M", "K"]
        value = "error" if name == "quality" else "time_s"
        print(table.pivot_table(value, index, "method", sort=False)[[*table["method"].unique()]].round(4).to_string())


if __name__ == "__main__":
    main()
