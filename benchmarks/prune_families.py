"""Ten model families of tiny random config, each pruned, saved and loaded by plain transformers, in one table.

    python benchmarks/prune_families.py [--spec 2:4] [--solver sobs]

Writes benchmarks/results/prune_families.csv.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import torch
import transformers

import s3lab as s3
from s3lab.models.storage.checkpoint import save_pruned

RESULTS = Path(__file__).parent / "results" / "prune_families.csv"
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4}
COMMON = {"vocab_size": 256, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = SIZES | COMMON
GROUPED = PLAIN | {"num_key_value_heads": 2}
OPT = {"hidden_size": 64, "num_hidden_layers": 3, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 256}
FAMILIES = {
    "Qwen3": GROUPED | {"head_dim": 16},
    "Qwen2": GROUPED,
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Gemma": GROUPED | {"head_dim": 16},
    "OPT": OPT | COMMON,
    "GPT2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "Qwen3Moe": GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "GPTNeoX": PLAIN,
    "Phi": GROUPED,
}


def prune_family(family: str, spec: str, solver: str) -> dict[str, object]:
    """Prune a random model of a family, save it, load it again, and return the row of the table."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 256, (16, 64))
    run = s3.prune_model(model, None, spec, solver, calibration=ids, progress=False)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_pruned(model, None, folder, run)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        apart = float((again(ids).logits - model(ids).logits).abs().max())
    return {
        "family": family,
        "layers": len(run.layers),
        "matrices": len(run.matrices),
        "left_dense": sum(row["density"] == 1 for row in run.matrices),
        "density": run.density,
        "largest_logit_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="2:4")
    parser.add_argument("--solver", default="sobs")
    args = parser.parse_args()
    rows = [prune_family(family, args.spec, args.solver) for family in FAMILIES]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
