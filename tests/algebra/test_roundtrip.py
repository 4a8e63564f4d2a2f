"""Text to spec and back, for the whole gallery and for 500 generated patterns: equal specs, equal masks."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s3lab as s3
from s3lab.algebra.couple import Coupled, Group, Member

M, K = 32, 64
SCORES = torch.rand(M, K, generator=torch.Generator().manual_seed(0))
POWERS = st.sampled_from([1, 2, 4, 8])
SHARES = st.sampled_from([Fraction(1, 2), Fraction(1, 4), Fraction(1, 3), Fraction(2, 3), Fraction(3, 8)])


@st.composite
def budgets(draw, blocks):
    if blocks > 1 and draw(st.booleans()):
        return draw(SHARES.filter(lambda share: round(share * blocks) >= 1))
    return draw(st.integers(1, blocks))


@st.composite
def matrix_specs(draw, rows=M, columns=K):
    """Tiles on the matrix as it is, in scopes of any extent, or in squares that keep as many each way."""
    tile = draw(POWERS), draw(POWERS)
    grid = rows // tile[0], columns // tile[1]
    if draw(st.integers(0, 4)) == 0:
        side = draw(st.sampled_from([2, 4]).filter(lambda n: n <= min(grid)))
        return s3.Spec(
            s3.View(), s3.Block(tile), s3.Scope((side, side), keep=draw(st.integers(1, side)), each_way=True)
        )
    scope = tuple(draw(st.sampled_from([n for n in (1, 2, 4, 8, 16, 32, 64) if n <= size])) for size in grid)
    return s3.Spec(s3.View(), s3.Block(tile), s3.Scope(scope, keep=draw(budgets(scope[0] * scope[1]))))


@st.composite
def viewed_specs(draw):
    """Columns taken apart, in another order of modes."""
    inner = draw(st.sampled_from([2, 4, 8]))
    modes = [("M", "K"), (f"K/{inner}", inner), (inner, 1)]
    modes = draw(st.permutations(modes))
    sizes = {"M": M, f"K/{inner}": K // inner, inner: inner}
    extents = [sizes[shape] for shape, _ in modes]
    block = tuple(draw(st.sampled_from([n for n in (1, 2, 4) if n <= size])) for size in extents)
    grid = [size // cut for size, cut in zip(extents, block, strict=True)]
    scope = tuple(draw(st.sampled_from([n for n in (1, 2, 4) if n <= size])) for size in grid)
    view = s3.View(tuple(shape for shape, _ in modes), tuple(stride for _, stride in modes))
    return s3.Spec(view, s3.Block(block), s3.Scope(scope, keep=draw(budgets(scope[0] * scope[1] * scope[2]))))


@st.composite
def chains(draw):
    first = draw(matrix_specs())
    part = first.bind((M, K))
    rows, columns = (mode.size for mode in part.layout[1])
    left = (M // rows * part.keep, K) if columns == 1 else (M // rows, K // columns * part.keep)
    keep = draw(st.integers(1, 2))
    second = s3.parse(f"{keep}:2" if left[1] % 2 == 0 else f"{keep}:{left[1]}" if left[1] >= keep else "1:1")
    return s3.Then(first, second)


@st.composite
def sums(draw):
    main = draw(st.one_of(matrix_specs(), viewed_specs(), chains()))
    return s3.Plus(main, draw(st.one_of(matrix_specs(), viewed_specs())))


@st.composite
def couplings(draw):
    """Tiles of one tensor with tiles of another, and groups of such with one budget."""
    groups = []
    for number in range(draw(st.integers(1, 2))):
        tile = draw(POWERS), draw(POWERS)
        turned = draw(st.booleans())
        members = [
            Member(f"a{number}", s3.Block(tile)),
            Member(
                draw(st.sampled_from(["b.", "*", "mlp up."])) + str(number),
                s3.Block(tile),
                order=(1, 0) if turned else (),
                follows=draw(st.booleans()),
            ),
        ]
        groups.append((Group(tuple(members)), tile, turned))
    shapes = {}
    for group, tile, turned in groups:
        grid = 4, 8
        shapes[group.members[0].name] = grid[0] * tile[0], grid[1] * tile[1]
        rows, columns = grid[::-1] if turned else grid
        shapes[group.members[1].name] = rows * tile[0], columns * tile[1]
    scope = draw(st.sampled_from([None, (1, 4), (2, 2), (4, 1)]))
    keep = draw(st.sampled_from([Fraction(1, 2), 1, 2, 3]))
    return Coupled(tuple(Group(group.members, scope) for group, _, _ in groups), keep), shapes


def check(spec, shape, scores):
    again = s3.parse(str(spec))
    assert again == spec and hash(again) == hash(spec) and str(again) == str(spec)
    first, second = spec.bind(shape).project(scores), again.bind(shape).project(scores)
    if isinstance(first, dict):
        assert all(torch.equal(first[name], second[name]) for name in shape)
    else:
        assert torch.equal(first, second)
    spec.check(first)


def test_the_gallery_is_read_back():
    for name, text in s3.PATTERNS.items():
        shape = (256, 512)
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        assert s3.parse(name) == s3.parse(text)
        check(s3.parse(name), shape, scores)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.one_of(matrix_specs(), viewed_specs(), chains(), sums()))
def test_a_generated_spec_is_read_back(spec):
    check(spec, (M, K), SCORES)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(couplings())
def test_a_generated_coupling_is_read_back(case):
    spec, shapes = case
    generator = torch.Generator().manual_seed(0)
    check(spec, shapes, {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()})
