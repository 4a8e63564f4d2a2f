"""The canonical form: a bijection, projections against brute force over all choices, and every refusal."""

from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import s3lab as s3

SPECS = [
    ("2:4", (3, 8), (6, 4, 1), 2),
    ("1:4", (3, 8), (6, 4, 1), 1),
    ("2:4@1x2", (2, 16), (4, 4, 2), 2),
    ("1:2@2x4", (4, 16), (4, 2, 8), 1),
    ("coupled-2:4", (2, 32), (8, 4, 2), 2),
    ("block16", (32, 32), (32, 2, 16), 1),
    ("mma-m16n8k16", (32, 16), (16, 2, 16), 1),
    ("50%", (3, 5), (1, 15, 1), 8),
    ("25%/row", (3, 8), (3, 8, 1), 2),
    ("25%/column", (8, 3), (3, 8, 1), 2),
    ("50% rows", (6, 4), (1, 6, 4), 3),
    ("25% columns", (3, 8), (1, 8, 3), 2),
    ("(K,M):(1,K) / (1,1) / (1,4) keep 1", (8, 3), (6, 4, 1), 1),
    ("(M,2,K/2):(K,1,2) / (1,2,1) / (1,1,2) keep 1", (2, 8), (4, 2, 2), 1),
]


@pytest.mark.parametrize(("text", "shape", "counts", "keep"), SPECS)
def test_canonical_counts(text, shape, counts, keep):
    part = s3.parse(text).bind(shape)
    assert ((part.S, part.B, part.E), part.keep) == (counts, keep)
    assert part.density == keep / counts[1]


@pytest.mark.parametrize(("text", "shape", "counts", "keep"), SPECS)
def test_blocks_and_scatter_are_inverse(text, shape, counts, keep):
    part = s3.parse(text).bind(shape)
    W = torch.arange(shape[0] * shape[1]).view(shape)
    blocks = part.blocks(W)
    assert blocks.shape == counts and sorted(blocks.flatten().tolist()) == W.flatten().tolist()
    assert torch.equal(part.scatter(blocks), W)
    assert torch.equal(part.blocks(W.T.contiguous().T), blocks)
    for s, b, e in [(0, 0, 0), (part.S - 1, part.B - 1, part.E - 1), (part.S // 2, part.B // 2, part.E // 2)]:
        assert blocks[s, b, e] == part.layout(s, b, e)


def test_the_coupled_pattern_is_the_papers():
    blocks = s3.parse("coupled-2:4").bind((2, 32)).blocks(torch.arange(64).view(2, 32))
    assert blocks[0].tolist() == [[0, 8], [1, 9], [2, 10], [3, 11]]
    assert blocks[1].tolist() == [[4, 12], [5, 13], [6, 14], [7, 15]]


@pytest.mark.parametrize("name", ["block16", "mma-m16n8k16"])
def test_row_pairs_are_eight_apart(name):
    rows = s3.parse(name).bind((32, 16)).blocks(torch.arange(32 * 16).view(32, 16)) // 16
    pairs = {tuple(sorted({int(r) for r in block[:, 0]})) for block in rows}
    assert pairs == {(r, r + 8) for r in [*range(8), *range(16, 24)]}


def test_blocks_share_storage_where_strides_allow():
    W = torch.zeros(4, 16)
    s3.parse("2:4").bind((4, 16)).blocks(W)[3, 2, 0] = 1
    assert W.flatten()[3 * 4 + 2] == 1


@given(st.sampled_from([s for s in SPECS if comb(s[2][1], s[3]) ** 1 <= 70]), st.integers(0, 999))
def test_projection_is_the_best_of_all_choices(case, seed):
    text, shape, (_, B, _), keep = case
    part = s3.parse(text).bind(shape)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = part.project(scores)
    part.check(mask)
    summed = part.blocks(scores).sum(-1)
    best = [max(sum(float(scope[b]) for b in choice) for choice in combinations(range(B), keep)) for scope in summed]
    assert (part.blocks(scores) * part.blocks(mask)).sum((1, 2)).tolist() == pytest.approx(best)


@pytest.mark.parametrize(("text", "shape", "counts", "keep"), SPECS)
def test_ties_keep_exactly_the_first(text, shape, counts, keep):
    part = s3.parse(text).bind(shape)
    kept = part.blocks(part.project(torch.zeros(shape)))
    assert kept[:, :keep].all() and not kept[:, keep:].any()


def test_mask_count_and_storage():
    part = s3.parse("2:4").bind((2, 4))
    assert part.mask_count == 36
    # arXiv 2507.03052: bits per element of the mask's index
    bits = {
        "2:4": 0.75,
        "4:8": 0.875,
        "8:16": 0.875,
        "16:32": 0.938,
        "4:256": 0.109,
        "8:256": 0.191,
        "16:256": 0.328,
    }
    for text, figure in bits.items():
        assert s3.parse(text).bind((1, 256)).storage_bits == pytest.approx(figure, abs=6e-4)


def test_storage_of_a_large_scope_nears_the_entropy():
    assert s3.parse("50%").bind((512, 512)).storage_bits == pytest.approx(1, abs=1e-3)


def test_check_names_the_first_scope_at_fault():
    spec = s3.parse("2:4@1x2")
    mask = spec.bind((4, 16)).project(torch.rand(4, 16))
    spec.check(mask)
    wrong = mask.clone()
    wrong[1, 8:16] = True
    with pytest.raises(s3.SpecError, match=r"scope 3 \(from row 1, column 8\): it keeps 4 of 4 blocks, not 2$"):
        spec.check(wrong)
    cut = mask.clone()
    cut[0, 0] = ~cut[0, 0]
    with pytest.raises(s3.SpecError, match=r"scope 0 .*cuts a block in two"):
        spec.check(cut)


@pytest.mark.parametrize("square", [[0b1111, 0b1111, 0, 0], [0b0011] * 4, [0b1100, 0b1010, 0b0101, 0b0011]])
def test_check_counts_rows_and_columns_of_what_is_kept_each_way(square):
    """Eight of sixteen each time: right by columns alone, by rows alone, and by both."""
    mask = torch.tensor([[bool(row >> j & 1) for j in range(4)] for row in square])
    spec, both = s3.parse("2:4 each way"), torch.cat([torch.zeros(4, 4).bool(), mask], 1)
    both[:, :4] = torch.eye(4).bool() | torch.eye(4).bool().roll(1, 1)
    if (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all():
        spec.check(both)
    else:
        with pytest.raises(s3.SpecError, match=r"scope 1 \(from row 0, column 4\).*8, 2 in each row and column"):
            spec.check(both)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("2:4", (4, 30), "scope of 2:4 takes 4 of the 30 blocks along mode 1.*remainder.*such as 3"),
        ("1:10006", (1, 20014), "takes 10006 of the 20014 .*such as 2$"),
        ("1:5", (1, 7), "such as 1$"),
        ("1:16", (4, 8), "such as 8$"),
        ("1:2@16x16", (24, 32), "block of .* takes 16 of the 24 elements along mode 0.*such as 12"),
        ("5:4", (4, 8), "keep 5 is 5 of the 4 blocks.*between 1 and 4"),
        ("1%/row", (4, 8), "keep 1% is 0 of the 8 blocks"),
        ("(M,K):(1,1) / (1,1) / (1,4) keep 2", (4, 8), "overlaps or leaves gaps.*0 to 31, each once"),
        ("(M,K):(2*K,2) / (1,1) / (1,4) keep 2", (4, 8), "overlaps or leaves gaps"),
        ("(M,K/2):(K,1) / (1,1) / (1,4) keep 2", (4, 8), "holds 16 elements.*of 32"),
        ("(M,K):(K,1) / (1,1,1) / (1,4) keep 2", (4, 8), "the block .* has 3 modes"),
        ("(M,K):(K,1) / (1,1) / (1,4,1) keep 2", (4, 8), "the scope .* has 3 modes"),
        ("(M,K):(K,1) / (1,1) / (1,(2,2)) keep 2", (4, 8), "the scope .* is nested"),
        ("(M,K):(K,1) / (1,(1,1)) / (1,4) keep 2", (4, 8), "the block .* is nested"),
        ("(M,K):(K,(1,1)) / (1,1) / (1,4) keep 2", (4, 8), "not nested alike"),
    ],
)
def test_specs_that_cannot_be(text, shape, message):
    with pytest.raises(s3.SpecError, match=message):
        s3.parse(text).bind(shape)


def test_a_nested_view_reads_as_its_leaves_do():
    nested, flat = (s3.parse(text).bind((4, 16)) for text in ("(M,(K/4,4)):(K,(4,1)) / (1,1) / (1,4) keep 2", "2:4"))
    assert list(nested.layout.offsets()) == list(flat.layout.offsets())


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: s3.View(("M", ("K", ())), ("K", (1, 1))), "the view's shape"),
        (lambda: s3.View(("M", "K"), ("K", ())), "the view's stride"),
        (lambda: s3.Block((1, ())), "the block"),
        (lambda: s3.Scope(((), 4), keep=2), "the scope"),
    ],
)
def test_what_is_no_group_of_sizes_is_told_by_its_part(make, what):
    with pytest.raises(s3.SpecError, match=rf"^{what} \(\) is no group of sizes"):
        make()


def test_a_budget_may_be_a_share_or_all_there_are():
    half = s3.Spec(s3.View(), s3.Block((1, 1)), s3.Scope((1, 4), keep=0.5))
    assert half.bind((2, 8)).keep == 2 and str(half.block) == "(1,1)"
    assert s3.parse("4:4").bind((2, 8)).density == 1


def test_what_is_kept_each_way_needs_a_square():
    for shape in ((2, 4), (4, 2), (1, 4)):
        with pytest.raises(s3.SpecError, match="needs a square"):
            s3.Spec(s3.View(), s3.Block((1, 1)), s3.Scope(shape, keep=1, each_way=True)).bind((8, 8))


@pytest.mark.parametrize("text", ["1:4 each way", "3:4 each way"])
def test_what_is_kept_each_way_is_what_is_checked(text):
    spec = s3.parse(text)
    mask = spec.bind((4, 8)).project(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)))
    spec.check(mask)
    with pytest.raises(s3.SpecError, match="in each row and column"):
        spec.check(mask[[1, 0, 2, 3]] & mask)


def test_a_share_is_no_count_of_each_row_and_column():
    with pytest.raises(s3.SpecError, match="keep 50% each way: give a count"):
        s3.Scope((4, 4), keep=0.5, each_way=True)


@pytest.mark.parametrize("extent", [0, -2])
def test_no_block_is_smaller_than_one(extent):
    spec = s3.Spec(s3.View(), s3.Block((extent, 1)), s3.Scope((1, 4), keep=2))
    with pytest.raises(s3.SpecError, match=f"takes {extent} of the 4 elements along mode 0.*such as 1$"):
        spec.bind((4, 8))


def test_a_square_may_lie_along_any_two_modes_of_a_view():
    part = s3.parse("(M,2,K/2):(K,K/2,1) / (1,1,1) / (4,1,4) keep 2 each way").bind((4, 16))
    assert (part.B, part.keep, part.lines) == (16, 8, 2)
    assert s3.parse("1:2 each way").bind((4, 4)).lines == 1
    with pytest.raises(s3.SpecError, match=r"the scope .* has 2 by 4 blocks"):
        s3.parse("(M,K):(K,1) / (1,1) / (2,4) keep 2 each way").bind((4, 16))


def test_a_pattern_is_told_by_its_kind_and_its_text():
    for text, kind in (("2:4", "Spec"), ("2:4 plus 1:16", "Plus"), ("4:8@8x1 then 2:4", "Then")):
        assert repr(s3.parse(text)) == f"{kind}({text!r})"


def test_infinite_scores_of_both_signs_are_scores():
    part = s3.parse("2:4").bind((1, 4))
    assert part.project(torch.tensor([[torch.inf, 1.0, -torch.inf, 0.0]])).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("shape", [(4,), (4, 8, 2), (0, 8), (4, -8), (4.0, 8)])
def test_shapes_that_cannot_be(shape):
    with pytest.raises(s3.ShapeError, match="positive extents"):
        s3.parse("2:4").bind(shape)


def test_tensors_of_another_shape_are_refused():
    part = s3.parse("2:4").bind((4, 8))
    for call in (part.blocks, part.scatter, part.choose, part.project, part.check):
        with pytest.raises(s3.ShapeError):
            call(torch.zeros(4, 4))
    with pytest.raises(s3.ShapeError, match="NaN"):
        part.project(torch.full((4, 8), torch.nan))
