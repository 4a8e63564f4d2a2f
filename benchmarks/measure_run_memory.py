"""Peak memory of a run over a 12-layer, hidden 512 random Qwen3, at N and 8 N calibration tokens, a process for each.

    python benchmarks/measure_run_memory.py [--sequences 16] [--length 256]

Writes benchmarks/results/run_memory.csv.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import s3lab as s3

RESULTS = Path(__file__).parent / "results" / "run_memory.csv"


def prune(sequences: int, length: int, out: str) -> None:
    """Prune the random model and print the peak resident memory of this process, in MiB."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1024, "vocab_size": 2048, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=8, num_key_value_heads=4))
    ids = torch.randint(2048, (sequences, length))
    s3.prune_model(model, None, "2:4", "sparsegpt", calibration=ids, out=out, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        return prune(args.sequences, args.length, args.out)
    peaks = []
    for sequences in (args.sequences, 8 * args.sequences):
        with tempfile.TemporaryDirectory() as out:
            command = [
                sys.executable,
                __file__,
                "--sequences",
                str(sequences),
                "--length",
                str(args.length),
                "--out",
                out,
            ]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append({"tokens": sequences * args.length, "peak_mib": float(told)})
        print(f"{sequences * args.length:>8} tokens: {float(told):7.0f} MiB")
    print(f"8 times the tokens: {peaks[1]['peak_mib'] / peaks[0]['peak_mib'] - 1:+.1%}")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, peaks[0])
        writer.writeheader()
        writer.writerows(peaks)


if __name__ == "__main__":
    main()
