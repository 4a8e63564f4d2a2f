"""What is packed comes back bit by bit, in as many bits as the algebra counts, for every pattern."""

from math import log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s3lab as s3
from s3lab.algebra.coupled import CoupledPartition
from s3lab.packing.codec import ALONE, Packed, bind, pack
from tests.algebra.test_roundtrip import K, M, chains, couplings, matrix_specs, sums, viewed_specs

DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def draw(shape, dtype, seed=0):
    """Any bits at all: zeros of both signs, subnormal numbers, infinities and NaNs of all payloads are among them."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-(2**31), 2**31, shape, generator=generator)
    bits = wide.to(DTYPES[dtype])
    bits[torch.rand(shape, generator=generator) < 0.05] = 0
    return bits.view(dtype)


def prune(W, mask):
    """Zeros, plain ones, where nothing is kept; the bits of W where something is, a zero of either sign among them."""
    return W.where(mask, 0)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(DTYPES[a.dtype]), b.view(DTYPES[b.dtype]))


def reread(packed):
    """What the bytes alone say."""
    return Packed(packed.pattern, packed.shapes, packed.values, packed.index.clone()).unpack()


def project(spec, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(shape, dict):
        return spec.bind(shape).project({name: torch.rand(own, generator=generator) for name, own in shape.items()})
    return spec.bind(shape).project(torch.rand(shape, generator=generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", s3.PATTERNS)
def test_the_gallery_comes_back_in_as_many_bits_as_are_counted(name, dtype):
    spec, shape = s3.parse(name), (256, 512)
    mask = project(spec, shape)
    W = prune(draw(shape, dtype), mask)
    packed = pack(W, spec)
    assert packed.pattern == spec
    assert same_bits(reread(packed), W)
    spec.check(packed.masks()[ALONE])
    bound = spec.bind(shape)
    theory = bound.density * 8 * dtype.itemsize + bound.storage_bits
    assert packed.bits_per_weight == pytest.approx(theory, rel=1e-3)  # salient blocks are found, not known
    assert packed.theory_bits == pytest.approx(theory, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "index"), [("2:4", 0.75), ("8:16", 0.875), ("4:8", 0.875), ("1:4", 0.5), ("3:4", 0.5)]
)
def test_n_m_takes_what_the_literature_counts(text, index):
    """⌈log2 C(M, N)⌉ bits a scope, arXiv 2507.03052."""
    mask = project(s3.parse(text), (64, 64))
    packed = pack(prune(draw((64, 64), torch.bfloat16), mask), text)
    assert packed.bits_per_weight == 16 * float(mask.double().mean()) + index


@settings(max_examples=60)
@given(st.one_of(matrix_specs(), viewed_specs(), chains(), sums()), st.sampled_from(list(DTYPES)), st.integers(0, 99))
def test_a_generated_pattern_comes_back(spec, dtype, seed):
    mask = project(spec, (M, K), seed)
    W = prune(draw((M, K), dtype, seed), mask)
    packed = pack(W, spec)
    assert same_bits(reread(packed), W)
    kept = packed.masks()[ALONE]
    assert not (W.view(DTYPES[dtype]) != 0)[~kept].any()
    if isinstance(spec, s3.Spec):
        assert packed.pattern == spec and kept.sum() == mask.sum()
    if packed.pattern == spec:
        bits = 8 * len(packed.index) / (M * K)
        assert bits <= spec.bind((M, K)).storage_bits * 1.05 + 120 / (M * K)


@settings(max_examples=25)
@given(couplings(), st.sampled_from(list(DTYPES)))
def test_a_generated_coupling_comes_back_with_one_index(case, dtype):
    spec, shapes = case
    masks = project(spec, shapes)
    W = {name: prune(draw(shape, dtype, number), masks[name]) for number, (name, shape) in enumerate(shapes.items())}
    packed = pack(W, spec)
    found = reread(packed)
    assert found.keys() == W.keys() and all(same_bits(found[name], W[name]) for name in W)
    spec.check(packed.masks())
    bound = bind(spec, shapes)
    assert isinstance(bound, CoupledPartition)
    assert 8 * len(packed.index) <= bound.storage_bits * packed.weights + 8


@pytest.mark.parametrize("share", [0.03, 0.1, 0.25, 0.4, 0.5, 0.75, 0.97])
def test_wide_scopes_take_their_entropy(share):
    """Rows of 4096 blocks against log2 of the number of their choices."""
    n, rows = 4096, 64
    keep = round(share * n)
    spec = s3.Spec(s3.View(), s3.Block((1, 1)), s3.Scope((1, "K"), keep=keep))
    packed = pack(project(spec, (rows, n)).bfloat16(), spec)
    entropy = rows * log2(spec.bind((1, n)).mask_count)
    assert 0.999 * entropy <= 8 * len(packed.index) <= 1.02 * entropy


def test_a_scope_that_keeps_zeros_is_completed():
    W = torch.tensor([[0.0, 0, 0, 0, 0, 5, 0, 0, -0.0, 0, 0, -0.0]])
    packed = pack(W, "2:4")
    assert packed.masks()[ALONE].tolist() == [[number not in (2, 3, 6, 7, 9, 10) for number in range(12)]]
    assert same_bits(reread(packed), W)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:4", "at scope 3: 3 of its 4 blocks are not zero, and 2 are kept"),
        ("4:8@4x1 then 2:4", "scope 0"),
        ("2:4 each way", "at scope 0: no 2 blocks of each row and column"),
        ("1:4 plus 2:16", "no choice of salient blocks"),
        ("50%", "at scope 0"),
    ],
)
def test_a_weight_that_is_not_pruned_so_is_refused(text, message):
    W = torch.ones(4, 16) if text != "2:4" else torch.tensor([[1.0, 1, 0, 0] * 3 + [1, 0, 1, 1]] * 4)
    with pytest.raises(s3.SpecError, match=message):
        pack(W, text)


def test_what_is_no_weight_is_refused():
    for W in (torch.ones(4), torch.ones(4, 4, dtype=torch.long)):
        with pytest.raises(s3.ShapeError, match="cannot be packed"):
            pack(W, "2:4")


def test_a_weight_of_any_strides_is_packed():
    mask = project(s3.parse("2:4"), (16, 32))
    W = prune(draw((16, 32), torch.bfloat16), mask)
    assert same_bits(reread(pack(W.T.contiguous().T, "2:4")), W)


@pytest.mark.parametrize(
    "text", ["2:4", "8:16", "16:256", "25%", "2:4 each way", "4:8@16x1 then 2:4", "8:16 plus 1:32"]
)
def test_a_damaged_index_is_an_error_or_another_mask_of_the_pattern(text):
    """Never a mask that the pattern has not, and never anything but a DataError."""
    spec, shape = s3.parse(text), (32, 512)
    packed = pack(prune(draw(shape, torch.bfloat16), project(spec, shape)), spec)
    generator, refused = torch.Generator().manual_seed(0), 0
    for turn in range(30):
        index = packed.index.clone()
        if turn % 3 == 0:
            index = index[: int(torch.randint(len(index), (1,), generator=generator))]
        elif turn % 3 == 1:
            index = torch.cat([index, index[:1]])
        else:
            at = torch.randint(len(index), (4,), generator=generator)
            index[at] = torch.randint(256, (4,), generator=generator).to(torch.uint8)
        try:
            found = Packed(packed.pattern, packed.shapes, packed.values, index).masks()
        except s3.DataError as error:
            assert "damaged" in str(error)
            refused += 1
        else:
            spec.check(found[ALONE])
    assert refused >= 20
