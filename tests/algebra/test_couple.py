"""Couplings: who shares a fate and who a budget, on enumerated elements, and errors that show both grids."""

from math import comb

import pytest
import torch

import s3lab as s3

TEXTS = {
    "down: (M,1) & up: (1,K) follows keep 75%": {"down": (6, 8), "up": (8, 5)},
    "down: (M,1) & gate: (1,K) follows & up: (1,K) keep 4": {"down": (6, 8), "gate": (8, 5), "up": (8, 5)},
    "o: (M,4) & q: (4,K) keep 2": {"o": (6, 16), "q": (16, 6)},
    "q: (1,1) & k: (1,1) / (1,4) keep 2": {"q": (3, 8), "k": (3, 8)},
    "q: (1,1) & k: (1,1) by (1,0) / (1,4) keep 2": {"q": (3, 8), "k": (8, 3)},
    "q: (1,1) / (1,4) | k: (1,1) / (1,4) keep 4": {"q": (3, 8), "k": (3, 8)},
    "q: (1,1) | k: (1,1) | v: (1,1) keep 50%": {"q": (4, 4), "k": (2, 4), "v": (2, 4)},
    "a: (1,1) & b: (1,1) / (1,2) | c: (1,2) / (1,1) keep 2": {"a": (2, 4), "b": (2, 4), "c": (2, 4)},
    'a: (M,K/2,2):(K,2,1) / (1,1,2) & "b.*": (M,K/2,2):(K,1,K/2) / (1,1,2) keep 50%': {"a": (4, 8), "b.*": (4, 8)},
}


def scores_for(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_read_back(text):
    spec = s3.parse(text)
    assert s3.parse(str(spec)) == spec and str(spec) == text and hash(spec) == hash(s3.parse(text))


@pytest.mark.parametrize("text", TEXTS)
def test_masks_satisfy_the_coupling_and_are_read_back(text):
    spec, shapes = s3.parse(text), TEXTS[text]
    bound = spec.bind(shapes)
    masks = bound.project(scores_for(shapes))
    spec.check(masks)
    values = bound.blocks(masks)
    again = bound.scatter(values)
    assert all(torch.equal(again[name], masks[name]) for name in shapes)
    assert bound.mask_count == comb(bound.B, bound.keep) ** bound.S
    for name in shapes:
        broken = {**masks, name: masks[name].clone()}
        broken[name][0, 0] ^= True
        with pytest.raises(s3.SpecError):
            spec.check(broken)


def test_columns_and_the_rows_that_feed_them_go_together():
    text = "down: (M,1) & gate: (1,K) follows & up: (1,K) keep 4"
    scores = scores_for(TEXTS[text])
    masks = s3.parse(text).bind(TEXTS[text]).project(scores)
    best = (scores["down"].sum(0) + scores["up"].sum(1)).argsort(descending=True)[:4]
    kept = torch.zeros(8, dtype=torch.bool).scatter_(0, best, True)
    assert torch.equal(masks["down"], kept.expand(6, 8))
    assert torch.equal(masks["gate"], kept[:, None].expand(8, 5)) and torch.equal(masks["up"], masks["gate"])


def test_one_mask_for_two_tensors_and_for_one_transposed():
    scores = scores_for({"q": (3, 8), "k": (3, 8)})
    together = s3.parse("q: (1,1) & k: (1,1) / (1,4) keep 2").bind({"q": (3, 8), "k": (3, 8)}).project(scores)
    expected = s3.parse("2:4").bind((3, 8)).project(scores["q"] + scores["k"])
    assert torch.equal(together["q"], expected) and torch.equal(together["k"], expected)
    turned = s3.parse("q: (1,1) & k: (1,1) by (1,0) / (1,4) keep 2").bind({"q": (3, 8), "k": (8, 3)})
    found = turned.project({"q": scores["q"], "k": scores["k"].T.contiguous()})
    assert torch.equal(found["q"], expected) and torch.equal(found["k"].T, expected)


def test_scopes_of_two_tensors_share_a_budget():
    text = "q: (1,1) / (1,4) | k: (1,1) / (1,4) keep 4"
    scores = scores_for(TEXTS[text])
    masks = s3.parse(text).bind(TEXTS[text]).project(scores)
    for row in range(3):
        for at in (0, 4):
            pair = torch.cat([scores[name][row, at : at + 4] for name in "qk"])
            kept = torch.zeros(8, dtype=torch.bool).scatter_(0, pair.argsort(descending=True)[:4], True)
            assert torch.equal(torch.cat([masks[name][row, at : at + 4] for name in "qk"]), kept)


def test_a_global_budget_is_the_threshold_over_all():
    text = "q: (1,1) | k: (1,1) | v: (1,1) keep 50%"
    scores = scores_for(TEXTS[text])
    masks = s3.parse(text).bind(TEXTS[text]).project(scores)
    middle = torch.cat([s.flatten() for s in scores.values()]).sort().values[15]
    assert all(torch.equal(masks[name], scores[name] > middle) for name in scores)


MALFORMED = {
    "grids of other extents": (
        "down: (M,1) & up: (1,K) keep 50%",
        {"down": (6, 8), "up": (9, 5)},
        ["(1, 8)", "(9, 1)"],
    ),
    "the same tensor twice": ("down: (M,1) & down: (1,K) keep 50%", {"down": (8, 8)}, ["(1, K)", "(M, 1)"]),
    "an unknown name": (
        "down: (M,1) & up: (1,K) keep 50%",
        {"down": (6, 8), "gate": (8, 5)},
        ["up, a grid of (M, 1)", "down, a grid of (1, K)", "gate"],
    ),
    "no permutation": (
        "down: (M,1) & up: (1,K) by (1,1) keep 50%",
        {"down": (6, 8), "up": (8, 5)},
        ["(8, 1)", "(1, 8)", "by (1, 1)"],
    ),
    "a scope of other modes": ("a: (1,1) & b: (1,1) / (4) keep 2", {"a": (4, 4), "b": (4, 4)}, ["(4)", "(4, 4)"]),
    "other numbers of scopes": (
        "a: (1,1) / (1,4) | b: (1,1) / (1,4) keep 2",
        {"a": (4, 8), "b": (4, 4)},
        ["(4, 2)", "(4, 1)"],
    ),
    "only followers": ("a: (1,1) follows keep 50%", {"a": (4, 4)}, ["follow"]),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_coupling_shows_both_grids(fault):
    text, shapes, told = MALFORMED[fault]
    with pytest.raises(s3.SpecError) as error:
        s3.parse(text).bind(shapes)
    assert all(words in str(error.value) for words in told), str(error.value)


@pytest.mark.parametrize(
    "text", ["a: (1,1) & keep 2", "a (1,1) keep 2", "a: (1,1) by () keep 1", "a: (1,1)", '"a: (1,1) keep 2', "a: 2:4"]
)
def test_what_cannot_be_read_has_a_caret(text):
    with pytest.raises(s3.SpecError, match=r"\^"):
        s3.parse(text)


def test_a_coupling_is_for_several_tensors_and_only_for_them():
    with pytest.raises(s3.SpecError, match="by name"):
        s3.parse("a: (1,1) keep 50%").bind((4, 4))
    with pytest.raises(s3.SpecError, match="several"):
        s3.prune(torch.ones(4, 4), "a: (1,1) keep 50%", solver="magnitude")
    with pytest.raises(s3.SpecError, match="one tensor"):
        s3.prune({"a": torch.ones(4, 4)}, "2:4", solver="magnitude")
