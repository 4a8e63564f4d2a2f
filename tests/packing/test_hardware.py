"""Layouts that others prescribe, against what torch itself makes of the dense weight."""

import warnings

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import s3lab as s3
from s3lab.packing.codec import pack
from s3lab.packing.hardware import order_words, to_bsr, to_semi_structured


def prune(text, shape, dtype=torch.bfloat16):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return W.where(s3.parse(text).bind(shape).project(W.float().abs()), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 320)])
def test_2_4_is_stored_as_torch_stores_it(shape, dtype):
    W = prune("2:4", shape, dtype)
    values, indices = to_semi_structured(pack(W, "2:4"))
    theirs = sparse_semi_structured_from_dense_cutlass(W)
    assert torch.equal(values, theirs[0]) and torch.equal(indices, theirs[1])
    assert 16 * indices.numel() == W.numel()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, indices), W)


def test_a_kept_zero_of_2_4_keeps_its_place():
    """Where torch picks places of its own for zeros, ours are those of the pattern; the weight is the same."""
    W = prune("2:4", (32, 64))
    W[W.abs() < 0.8] = 0
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*to_semi_structured(pack(W, "2:4"))), W)


def test_the_order_of_words_leaves_none_out():
    assert order_words(96, 20).is_bijective


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("4:8", (32, 64), torch.bfloat16),
        ("2:4@1x2", (32, 64), torch.bfloat16),
        ("coupled-2:4", (32, 64), torch.bfloat16),
        ("2:4 plus 1:16", (32, 64), torch.bfloat16),
        ("2:4", (32, 64), torch.float32),
        ("2:4", (16, 64), torch.bfloat16),
        ("2:4", (32, 32), torch.bfloat16),
    ],
)
def test_what_hardware_has_no_index_for_is_refused(text, shape, dtype):
    with pytest.raises(s3.SpecError, match="hardware"):
        to_semi_structured(pack(prune(text, shape, dtype), text))


@pytest.mark.parametrize(
    ("text", "tile"),
    [("50%@4x4", (4, 4)), ("1:2@16x16", (16, 16)), ("50%@32x1", (32, 1)), ("block16", (1, 16)), ("2:4@1x2", (1, 2))],
)
def test_blocks_are_stored_as_torch_stores_them(text, tile):
    W = prune(text, (64, 96), torch.float32)
    found = to_bsr(pack(W, text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = W.to_sparse_bsr(tile)
    for part in ("crow_indices", "col_indices", "values"):
        assert torch.equal(getattr(found, part)(), getattr(theirs, part)())


@pytest.mark.parametrize("text", ["coupled-2:4", "8:16 plus 1:32", "4:8@8x1 then 2:4"])
def test_what_are_no_tiles_is_refused(text):
    with pytest.raises(s3.SpecError, match=r"tiles|several"):
        to_bsr(pack(prune(text, (64, 96)), text))
