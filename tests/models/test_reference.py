"""The shipped model is what its card says, and the training that made it can be interrupted and repeated."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from s3lab.errors import DataError, SolveError, SpecError
from s3lab.models.text import corpus, pretraining
from s3lab.models.text.pretrained import SHIPPED
from s3lab.models.text.pretraining import Recipe, train, unigram_perplexity
from s3lab.models.text.reference import REFERENCE_DIR, load_reference, perplexity

pytest.importorskip("transformers")

TINY = Recipe(
    vocab=272, hidden=32, layers=2, intermediate=48, heads=4, kv_heads=2, head_dim=16,
    steps=3, batch=2, length=16, every=1, windows=4, dropout=0.1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def shipped():
    return load_reference()


def shorten(patch):
    """Leave a twentieth of the text, enough for three steps of training."""
    few = corpus.documents()[::20]
    patch.setattr(corpus, "documents", lambda: few)


@pytest.fixture
def brief(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return out, train(TINY, out, facts={"command": "by hand"})


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_shipped_architecture(shipped):
    model, tokenizer = shipped
    config = model.config
    assert config.model_type == "qwen3" and config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_hidden_layers >= 4 and config.hidden_size >= 192
    attention = model.model.layers[0].self_attn
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (config.head_dim,)
    assert all(size % 16 == 0 for p in model.parameters() for size in p.shape)
    assert len(tokenizer) == config.vocab_size and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_are_small_safe_and_of_the_recipe(name):
    folder = REFERENCE_DIR.parent / name
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= 12e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.csv", "README.md"} <= set(files)
    assert not [name for name in files if not name.endswith((".safetensors", ".json", ".csv", ".md"))]
    record = json.loads((folder / "record.json").read_text())
    assert Recipe(**record["recipe"]) == pretraining.RECIPES[name]
    assert record["parameters"] == sum(p.numel() for p in load_reference(folder)[0].parameters())


def test_each_shipped_model_weighs_what_the_next_larger_one_does_at_8_16():
    """Half of the matrices' weights and an index of 0.875 bits each (arXiv 2507.03052), the rest dense."""
    for larger, smaller in pairwise(SHIPPED):
        model, other = (load_reference(REFERENCE_DIR.parent / name)[0] for name in (larger, smaller))
        matrices = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
        pruned = matrices * (0.5 + 0.875 / 16) + sum(p.numel() for p in model.parameters()) - matrices
        assert sum(p.numel() for p in other.parameters()) == pytest.approx(pruned, rel=0.04)


def test_the_shipped_model_is_stored_in_bfloat16_and_loads_in_it(shipped):
    stored = load_reference(dtype=torch.bfloat16)[0]
    for one, other in zip(stored.parameters(), shipped[0].parameters(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one.float(), other)


def test_the_shipped_model_guesses_ten_times_better_than_frequencies(shipped):
    model, tokenizer = shipped
    test_ids = corpus.tokens(tokenizer, "test", 256)
    unigram = unigram_perplexity(corpus.tokens(tokenizer, "train", 256), test_ids, len(tokenizer))
    assert perplexity(model, test_ids) < unigram / 10


def test_there_is_text_enough_to_calibrate_and_to_measure(shipped):
    assert corpus.tokens(shipped[1], "calibration", 256).numel() >= 60_000
    assert corpus.tokens(shipped[1], "test", 256).numel() >= 25_000


def test_the_shipped_tokenizer_loses_nothing(shipped):
    text = "def f(x):\n\treturn 'naïve — ∑ 😀'  \n"
    assert shipped[1].decode(shipped[1].encode(text)) == text


def test_training_is_deterministic(brief, trained, tmp_path):
    state = torch.get_rng_state()
    record = train(TINY, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert weights(tmp_path) == weights(trained[0])
    assert (tmp_path / "training.csv").read_bytes() == (trained[0] / "training.csv").read_bytes()
    assert record["perplexity"] == trained[1]["perplexity"]


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_training_ends_in_the_same_bits(brief, trained, tmp_path, stop):
    def interrupt(row):
        if row["step"] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, log=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [pretraining.CHECKPOINT]
    steps = []
    train(TINY, tmp_path, progress=lambda left: steps.extend(left) or steps)
    assert steps == list(range(stop, 3))
    assert weights(tmp_path) == weights(trained[0])
    assert (tmp_path / "training.csv").read_bytes() == (trained[0] / "training.csv").read_bytes()


def test_training_leaves_a_whole_folder_and_its_record(trained):
    out, record = trained
    assert not [path.name for path in out.iterdir() if path.name.startswith(".") or "checkpoint" in path.name]
    assert json.loads((out / "record.json").read_text()) == record
    assert Recipe(**record["recipe"]) == TINY and record["command"] == "by hand"
    held_out = {}
    for line in (out / "training.csv").read_text().splitlines()[1:]:
        step, split, value = line.split(",")
        held_out |= {int(step): float(value)} if split == "held-out" else {}
    assert list(held_out) == [1, 2, 3] and record["best_step"] == min(held_out, key=held_out.__getitem__)


def test_the_best_measured_state_is_the_one_saved(brief, trained):
    model, tokenizer = load_reference(trained[0])
    ids = corpus.tokens(tokenizer, "calibration", TINY.length, TINY.windows, TINY.seed)
    rows = (trained[0] / "training.csv").read_text().splitlines()[1:]
    best = min(float(row.split(",")[2]) for row in rows if "held-out" in row)
    assert perplexity(model, ids) == pytest.approx(best, rel=2e-2)  # the weights were rounded to bfloat16


def test_a_checkpoint_of_another_recipe_is_refused(brief, tmp_path):
    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, log=interrupt)
    with pytest.raises(DataError, match="is of another recipe: delete it"):
        train(replace(TINY, seed=1), tmp_path)


def test_a_diverging_training_stops(brief, tmp_path):
    with pytest.raises(SolveError, match="lower lr=1e"):
        train(replace(TINY, lr=1e30), tmp_path)


def test_the_rate_rises_and_falls():
    recipe = Recipe(steps=100, warmup=0.1, lr=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[10] == 1
    assert sorted(rates[10:], reverse=True) == rates[10:] and 0.01 < rates[-1] < 0.02


def test_perplexity_of_an_indifferent_model_is_its_vocabulary():
    model = pretraining.build(TINY)
    torch.nn.init.zeros_(next(model.parameters()))  # the tied embeddings: every logit becomes zero
    model.train()
    assert perplexity(model, torch.arange(32).view(2, 16)) == pytest.approx(TINY.vocab)
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 200}, "hidden=200 is no positive multiple of 16"),
        ({"vocab": 0}, "vocab=0 is no positive multiple of 16"),
        ({"steps": 0}, "steps=0 leaves nothing to train"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        Recipe(**change)


def test_a_vocabulary_that_does_not_fit_is_refused(brief):
    with pytest.raises(DataError, match=r"gives 257 tokens, not vocab=16"):
        pretraining.train_tokenizer(replace(TINY, vocab=16))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(DataError, match="no model in"):
        load_reference(tmp_path)
