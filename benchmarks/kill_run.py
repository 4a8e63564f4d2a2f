"""Kill a run at random moments with SIGKILL, start it again each time, and compare with an undisturbed run's weights.

python benchmarks/kill_run.py [--kills 10] [--solver sparsegpt] [--sequences 24]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--solver", default="sparsegpt")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    options = ["--spec", "2:4", "--solver", args.solver, "--sequences", str(args.sequences), "--out"]
    command = [str(Path(sys.executable).with_name("s3lab")), "prune", "reference", *options]
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([*command, f"{folder}/whole"], check=True, stderr=subprocess.DEVNULL)
        lasted = time.perf_counter() - began
        whole = load_file(f"{folder}/whole/model.safetensors")
        equal = 0
        for kill in range(args.kills):
            out = Path(folder) / f"killed-{kill}"
            run = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            moment = chance.uniform(0, lasted)
            try:
                run.wait(moment)
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
            layers = len(list(out.glob("run/layers/*.safetensors")))
            subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            again = load_file(out / "model.safetensors")
            same = again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
            equal += same
            verdict = "bit-equal" if same else "DIFFERS"
            print(f"killed after {moment:5.1f} of {lasted:.1f} s, {layers} layers done: {verdict}")
        print(f"{equal} of {args.kills} bit-equal")


if __name__ == "__main__":
    main()
