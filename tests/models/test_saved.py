"""A pruned model, once saved, needs s3lab no more."""

import json
import subprocess
import sys

import pytest
import torch

import s3lab as s3
from s3lab.models.measure.evaluate import evaluate
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.text.pretrained import load_model

TEXTS = [
    "The with statement wraps the execution of a block.",
    "A list comprehension is followed by at least one for clause.",
]
PLAIN = """
import json, sys
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

folder, texts = sys.argv[1], json.loads(sys.argv[2])
task = dict(
    task="plain", custom_dataset=lambda **_: {"test": Dataset.from_dict({"text": texts})}, test_split="test",
    output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text", metadata={"version": 1.0},
    metric_list=[dict(metric="word_perplexity", aggregation="weighted_perplexity", higher_is_better=False)],
)
found = simple_evaluate(
    HFLM(pretrained=folder, backend="causal", max_length=64, batch_size=2, device="cpu", dtype="float32"),
    tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=False,
)
assert not any(name.partition(".")[0] == "s3lab" for name in sys.modules)
print(found["results"]["plain"]["word_perplexity,none"])
"""


def test_a_plain_script_measures_the_same_perplexity(tmp_path):
    model, tokenizer = load_model("reference", torch.float32)
    ids = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))
    run = s3.prune_model(model, tokenizer, "2:4", "wanda", calibration=ids, progress=False)
    save_pruned(model, tokenizer, tmp_path / "pruned", run)
    ours = evaluate(model, tokenizer, TEXTS, length=64)["word_perplexity"]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "pruned"), json.dumps(TEXTS)]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert float(plain.split()[-1]) == pytest.approx(ours, rel=1e-3)
