"""Perplexity is what a sum over single tokens says, in every window, and lm_eval counts the same."""

import json
import math

import numpy as np
import pytest
import torch

from s3lab.errors import DataError, SpecError
from s3lab.models.measure.evaluate import evaluate, evaluate_lm_eval, windows
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.pretraining import Recipe, build, train_tokenizer
from s3lab.models.text.reference import load_reference

pytest.importorskip("transformers")
TINY = Recipe(vocab=512, hidden=32, layers=2, intermediate=48, heads=4, kv_heads=2, head_dim=16, length=64)
TEXTS = [
    "The with statement wraps the execution of a block.\n\nIt is « naïve ».  " * 4,
    "[1, 2, 3]",  # no list
    " one word less than it seems",
    "x",
]


@pytest.fixture(scope="module")
def tiny():
    model = build(TINY)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)  # far from uniform: a token out of place is seen
    return model.eval(), train_tokenizer(TINY)


@pytest.fixture(scope="module")
def shipped():
    return load_reference()


def count_by_hand(model, tokenizer, text, length, stride):
    """Minus the log-likelihood of a text, and its tokens, by one forward pass for each token."""
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    loss, total = 0.0, len(ids) - 1
    for place in range(1, total + 1):
        window = 0 if place <= length else -(-(place - length) // stride)
        end = min(length + window * stride, total)
        context = torch.tensor([ids[max(0, end - length) : place]])
        with torch.no_grad():
            loss -= model(context).logits[0, -1].double().log_softmax(-1)[ids[place]].item()
    return loss, total


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (16, 1), (1, 1), (64, None)])
def test_perplexities_are_those_of_single_tokens_counted_by_hand(tiny, length, stride):
    result = evaluate(*tiny, TEXTS, length=length, stride=stride, batch=3)
    sums = [count_by_hand(*tiny, text, length, stride or length) for text in TEXTS]
    loss, tokens = (sum(column) for column in zip(*sums, strict=True))
    words = sum(len(text.split()) for text in TEXTS) + 2  # at an outer blank, lm_eval counts an empty word more
    counts = {"token": tokens, "word": words, "byte": sum(len(text.encode()) for text in TEXTS)}
    for unit, count in counts.items():
        assert result[f"{unit}s"] == count
        assert result[f"{unit}_perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert (result["length"], result["stride"], result["documents"]) == (length, stride or length, len(TEXTS))


@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("count", [1, 6, 7, 8, 30])
def test_windows_score_every_token_once_with_the_context_they_promise(count, stride):
    scored = []
    for first, begin, end in windows(count, 7, stride):
        assert end - first == min(7, end)
        assert begin == 0 or begin - first >= 7 - stride
        scored += range(begin, end)
    assert scored == list(range(count))


def test_an_indifferent_model_is_as_perplexed_as_its_vocabulary_is_large(tiny):
    model = build(TINY)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)  # tied: every logit becomes zero
    assert evaluate(model, tiny[1], TEXTS, length=64)["token_perplexity"] == pytest.approx(TINY.vocab)


def test_batches_do_not_matter_and_a_text_is_a_document(tiny):
    one, many = (evaluate(*tiny, TEXTS, length=20, stride=10, batch=batch) for batch in (1, 50))
    assert one == pytest.approx(many, rel=1e-5)
    assert evaluate(*tiny, TEXTS[0], length=20) == evaluate(*tiny, TEXTS[:1], length=20)


def test_more_context_helps_a_trained_model(shipped):
    text = corpus.text("test")[:6000]
    near, far = (evaluate(*shipped, text, length=length)["token_perplexity"] for length in (16, 128))
    whole = evaluate(*shipped, text, length=128, stride=32)["token_perplexity"]
    assert whole < far < near


def test_lm_eval_counts_the_same_on_the_reference_model(shipped):
    texts = [text[:3000] for text in list(corpus.read("test"))[:8]] + TEXTS
    ours, theirs = evaluate(*shipped, texts), evaluate_lm_eval(*shipped, texts)["text"]
    for unit in ("word", "byte"):
        assert ours[f"{unit}_perplexity"] == pytest.approx(theirs[f"{unit}_perplexity"], rel=1e-5)
    assert math.log2(ours["byte_perplexity"]) == pytest.approx(theirs["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lm_eval_counts_the_same_in_any_dtype(tiny, dtype):
    model = build(TINY).to(dtype)
    ours = evaluate(model, tiny[1], TEXTS, length=16)["word_perplexity"]
    theirs = evaluate_lm_eval(model, tiny[1], TEXTS, length=16)["text"]["word_perplexity"]
    assert math.log(ours) == pytest.approx(math.log(theirs), rel=1e-4 if dtype == torch.float32 else 1e-3)


def test_measuring_leaves_everything_as_it_was(tiny):
    model, tokenizer = build(TINY).train(), tiny[1]
    before = {name: p.clone() for name, p in model.named_parameters()}
    states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(model, tokenizer, TEXTS, length=16)
    evaluate_lm_eval(model, tokenizer, TEXTS, length=16)
    assert model.training and tokenizer.pad_token is None
    assert states == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and not p.is_inference()


def test_the_mode_of_the_model_survives_a_failure(tiny):
    model = build(TINY).train()
    model.lm_head = None
    with pytest.raises(TypeError):
        evaluate(model, tiny[1], TEXTS, length=16)
    assert model.training


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"length": 65}, SpecError, "length=65 does not fit the model: take 1 to 64 tokens"),
        ({"length": 0}, SpecError, "length=0 does not fit"),
        ({"length": 8, "stride": 9}, SpecError, "stride=9 is not between 1 and length=8"),
        ({"length": 8, "stride": 0}, SpecError, "stride=0 is not between"),
        ({"length": 8, "batch": 0}, SpecError, "batch=0 holds no window"),
        ({"length": 8, "documents": ["", ""]}, DataError, "2 documents without a token"),
        ({"length": 8, "documents": []}, DataError, "0 documents without a token"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, change, error, message):
    with pytest.raises(error, match=message):
        evaluate(*tiny, change.pop("documents", TEXTS), **change)


def test_a_tokenizer_without_a_beginning_is_refused(tiny):
    tokenizer = train_tokenizer(TINY)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="set its bos_token"):
        evaluate(tiny[0], tokenizer, TEXTS, length=16)


def test_lm_eval_tasks_that_cannot_be_had_are_named(tiny):
    with pytest.raises(DataError, match="no documents and no tasks"):
        evaluate_lm_eval(*tiny)
    with pytest.raises(DataError, match="lm_eval knows no task nonesuch: "):
        evaluate_lm_eval(*tiny, tasks=["wikitext", "nonesuch"], length=16)
    with pytest.raises(DataError, match=r"the data of wikitext cannot be read \(.*\): without a network"):
        evaluate_lm_eval(*tiny, tasks=["wikitext"], length=16)


def test_lm_eval_tasks_go_by_their_names(tiny, monkeypatch):
    import datasets

    data = {
        "wikitext": {"page": ["One page of plain words", "and another\none"]},
        "ai2_arc": {
            "question": ["Which is a colour?"] * 3,
            "choices": [{"text": ["red", "seven"], "label": ["A", "B"]}] * 3,
            "answerKey": ["A", "B", "A"],
        },
    }

    def load_dataset(path, name=None, **options):
        rows = next(rows for part, rows in data.items() if part in path)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_dict(rows)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = evaluate_lm_eval(*tiny, "some text", tasks=["wikitext", "arc_easy"], length=16)
    assert set(found) == {"text", "wikitext", "arc_easy"}
    ours = evaluate(*tiny, data["wikitext"]["page"], length=16)
    assert found["wikitext"]["word_perplexity"] == pytest.approx(ours["word_perplexity"], rel=1e-5)
    assert round(3 * found["arc_easy"]["acc"], 6) in (1, 2)  # the same answer three times, twice or once right
    assert found["arc_easy"]["acc_stderr"] == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    first = evaluate_lm_eval(*tiny, tasks=["arc_easy"], length=16, limit=1)["arc_easy"]["acc"]
    assert first in (0, 1)


def test_the_model_that_ships_is_loaded_by_its_name(shipped):
    model, tokenizer = load_model("reference", dtype="float32")
    assert not model.training and len(tokenizer) == len(shipped[1])
    for one, other in zip(model.parameters(), shipped[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_saved_folder_is_loaded_in_its_own_dtype_or_another(tiny, tmp_path):
    build(TINY).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype=torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["some/model", "./nowhere/to/be/found", "nowhere"])
def test_a_model_that_is_nowhere_is_named(name):
    with pytest.raises(DataError, match=rf"no model can be loaded from '{name}' \(.*or one of reference, small"):
        load_model(name)


def test_a_folder_with_half_a_model_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(DataError, match="no model can be loaded from"):
        load_model(tmp_path)
    tiny[0].save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights of its model, model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match="no model can be loaded from"):
        load_model(tmp_path)


def test_code_that_comes_with_a_model_is_never_run(tiny, tmp_path):
    tiny[0].save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoModelForCausalLM": "strange.Model", "AutoConfig": "strange.C"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "strange.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match="no model can be loaded from"):
        load_model(tmp_path)
