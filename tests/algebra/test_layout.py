"""Every operation on layouts by its defining law, on every coordinate."""

import copy
import itertools
import pickle
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lab.algebra.layout import Layout
from s3lab.errors import S3Error, SpecError

extents = st.integers(1, 4)
ANY_STRIDE, NO_GAP, GAP = st.integers(0, 13), st.just(1), st.integers(1, 3)


def nest(leaves, cut):
    """Group the leaves after the first ``cut`` into one mode."""
    return tuple(leaves) if cut >= len(leaves) - 1 else (*leaves[:cut], tuple(leaves[cut:]))


@st.composite
def layouts(draw, most_leaves=4, strides=ANY_STRIDE):
    """Any small layout, nested or not, injective or not."""
    shape = draw(st.lists(extents, min_size=1, max_size=most_leaves))
    stride = draw(st.lists(strides, min_size=len(shape), max_size=len(shape)))
    cut = draw(st.integers(0, len(shape)))
    return Layout(nest(shape, cut), nest(stride, cut))


@st.composite
def permuted(draw, padding=NO_GAP):
    """A compact layout with its modes in any order; with padding, gaps after any of them."""
    shape = draw(st.lists(extents, min_size=1, max_size=4))
    stride, below = [0] * len(shape), 1
    for k in draw(st.permutations(range(len(shape)))):
        stride[k] = below * draw(padding)
        below = stride[k] * shape[k]
    cut = draw(st.integers(0, len(shape)))
    return Layout(nest(shape, cut), nest(stride, cut))


padded = permuted(padding=GAP)


def table(layout):
    return [layout(i) for i in range(layout.size)]


def tiles(offsets, size):
    """Return where copies of ``offsets`` (which hold 0) must start to cover 0 to size − 1 once each, or None.

    The smallest free place can only be covered by a copy that starts there, so the answer is unique.
    """
    free, starts = set(range(size)), []
    while free:
        start = min(free)
        copy_ = {start + o for o in offsets}
        if not copy_ <= free:
            return None
        free -= copy_
        starts.append(start)
    return starts


def is_sum_of_progressions(values):
    """Return whether values that start at 0 are a layout's: a progression, or two such summed."""
    n = len(values)
    if n < 3:
        return True
    return values == [i * values[1] for i in range(n)] or any(
        is_sum_of_progressions(values[:run])
        and is_sum_of_progressions(values[::run])
        and all(values[i] == values[i - i % run] + values[i % run] for i in range(n))
        for run in range(2, n)
        if n % run == 0
    )


class TestFunction:
    def test_counts_in_row_major_order(self):
        assert table(Layout((2, 3))) == [0, 1, 2, 3, 4, 5]
        assert table(Layout((2, 3), (1, 2))) == [0, 2, 4, 1, 3, 5]
        assert Layout((4, (2, 3))).stride == (6, (3, 1))

    @given(layouts())
    def test_is_the_sum_over_leaves_in_lexicographic_order(self, layout):
        digits = itertools.product(*(range(extent) for extent, _ in layout.flat))
        expected = [sum(c * d for c, (_, d) in zip(cs, layout.flat, strict=True)) for cs in digits]
        assert table(layout) == list(layout.offsets()) == expected
        assert layout.size == len(expected) and layout.cosize == max(expected) + 1

    @given(layouts())
    def test_every_spelling_of_a_coordinate_agrees(self, layout):
        for index in range(layout.size):
            nested = layout.coordinates(index)
            assert layout(nested) == layout(index)
            if layout.rank > 1:
                assert layout(*nested) == layout(index)
        for modes in itertools.product(*(range(mode.size) for mode in layout)):
            assert layout(*modes) == sum(mode(i) for mode, i in zip(layout, modes, strict=True))

    @given(layouts())
    def test_concatenation_of_its_modes_gives_it_back(self, layout):
        assert Layout.of(*layout) == layout
        assert layout.rank == len(layout.modes) and prod(mode.size for mode in layout) == layout.size

    def test_an_integer_shape_is_its_own_mode(self):
        assert Layout(8, 2)[0] == Layout(8, 2) and Layout(8, 2).rank == 1

    @pytest.mark.parametrize(
        ("coordinate", "told"),
        [
            ((24,), "index 24 is outside the layout"),
            ((-1,), "index -1"),
            ((0, 6), "index 6 is outside mode 1 "),
            ((0, (0, 3)), r"index 3 is outside mode 1\.1"),
            ((0, 0, 0), "does not fit the layout"),
            (((0, 0), 0), "does not fit mode 0"),
            ((), "does not fit the layout"),
        ],
    )
    def test_refuses_coordinates_outside(self, coordinate, told):
        with pytest.raises(SpecError, match=told):
            Layout((4, (2, 3)))(*coordinate)

    @pytest.mark.parametrize("index", [-1, 24])
    def test_refuses_indices_outside(self, index):
        with pytest.raises(SpecError, match="its extent is 24"):
            Layout((4, (2, 3))).coordinates(index)


class TestConstruction:
    @pytest.mark.parametrize(
        ("shape", "stride", "told"),
        [
            ((2, 0), None, "0 is no extent"),
            ((2, -3), None, "-3 is no extent"),
            ((), None, "is no extent"),
            ((2.0, 3), None, "2.0 is no extent"),
            ((True, 3), None, "True is no extent"),
            ((2, 3), (3, -1), "-1 is no stride"),
            ((2, 3), (3, 1, 1), "not nested alike"),
            ((2, 3), 1, "not nested alike"),
            ((2, (3, 4)), (12, 4), "not nested alike"),
        ],
    )
    def test_refuses_what_is_no_layout(self, shape, stride, told):
        with pytest.raises(SpecError, match=told):
            Layout(shape, stride)

    def test_concatenation_needs_a_mode(self):
        with pytest.raises(SpecError):
            Layout.of()

    def test_is_a_value(self):
        layout = Layout([4, [2, 3]])  # pyright: ignore[reportArgumentType]
        assert layout == Layout((4, (2, 3))) and hash(layout) == hash(Layout((4, (2, 3))))
        assert pickle.loads(pickle.dumps(layout)) == copy.deepcopy(layout) == layout
        with pytest.raises(AttributeError):
            layout.shape = (1,)  # pyright: ignore[reportAttributeAccessIssue]


class TestText:
    @given(layouts())
    def test_parse_undoes_str(self, layout):
        assert Layout.parse(str(layout)) == layout
        assert Layout.parse(f" {layout} ".replace(",", " , ")) == layout

    def test_a_shape_alone_is_compact(self):
        assert Layout.parse("(4,(2,3))") == Layout((4, (2, 3))) and Layout.parse("8") == Layout(8, 1)
        assert str(Layout((8,), (1,))) == "(8):(1)"

    @pytest.mark.parametrize(
        ("text", "column"),
        [
            *(("", 0), ("(4,", 3), ("(4,)", 3), ("()", 1), ("(4 2)", 3)),
            *(("4:-1", 2), ("4:1:1", 3), ("4 x", 2), ("(4:1", 2), ("²", 0)),
        ],
    )
    def test_points_at_what_it_cannot_read(self, text, column):
        with pytest.raises(SpecError) as caught:
            Layout.parse(text)
        assert str(caught.value).splitlines()[-2:] == [f"    {text}", f"    {' ' * column}^"]


class TestInjectivity:
    def test_known_cases(self):
        assert Layout((2, 3), (3, 2)).is_injective  # 0 2 4 3 5 7, though 3 is below the reach of 2
        assert not Layout((3, 4), (3, 2)).is_injective  # 2·3 = 3·2
        assert not Layout((2, 2), (0, 1)).is_injective and Layout((1, 2), (0, 1)).is_injective
        assert Layout((2, 3, 4), (1, 8, 2)).is_bijective and not Layout(4, 2).is_bijective

    @given(layouts(strides=st.integers(0, 40)))
    def test_agrees_with_the_set_of_offsets(self, layout):
        offsets = table(layout)
        assert layout.is_injective == (len(set(offsets)) == layout.size)
        assert layout.is_bijective == (sorted(offsets) == list(range(layout.size)))

    def test_a_view_of_a_large_weight_is_decided_at_once(self):
        assert Layout((16384, 4096, 8, 2), (65536, 16, 1, 8)).is_bijective


class TestCoalesce:
    @given(layouts(strides=st.sampled_from([0, 1, 2, 4, 8])))
    def test_keeps_the_function_in_the_fewest_leaves(self, layout):
        small = layout.coalesce()
        assert table(small) == table(layout) and small.coalesce() == small
        assert all(d != s * e for (_, d), (s, e) in itertools.pairwise(small.flat))

    @given(st.lists(extents, min_size=1, max_size=4))
    def test_a_compact_layout_is_one_run(self, shape):
        assert table(Layout(tuple(shape)).coalesce()) == list(range(prod(shape)))
        assert Layout(tuple(shape)).coalesce().rank == 1


class TestCompose:
    def test_known_cases(self):
        transposed = Layout((3, 4), (1, 3))
        assert Layout((4, 4), (8, 1)).compose(Layout(4, 5)) == Layout(4, 9)  # the diagonal of a padded matrix
        # CuTe's (6,2):(8,2) after (4,3):(3,1) is ((2,2),3):((24,2),8), modes reversed
        assert str(Layout((2, 6), (2, 8)).compose(Layout((3, 4), (1, 3)))) == "(3,(2,2)):(8,(2,24))"
        assert transposed.compose(Layout((3, 4))) == transposed
        assert Layout(12, 5).compose(Layout((2, 3), (1, 4))) == Layout((2, 3), (5, 20))

    @given(layouts(4, st.sampled_from([0, 1, 2, 3, 4, 8])), layouts(3, st.sampled_from([0, 1, 2, 4, 8])))
    def test_whatever_it_returns_obeys_the_law(self, outer, inner):
        try:
            composed = outer.compose(inner)
        except SpecError:
            return
        assert [composed(i) for i in range(inner.size)] == [outer(inner(i)) for i in range(inner.size)]
        assert [mode.size for mode in composed] == [mode.size for mode in inner]

    @given(layouts(), st.data())
    def test_each_digit_of_the_outer_layout_can_be_taken(self, outer, data):
        weights = [prod(s for s, _ in outer.flat[k + 1 :]) for k in range(len(outer.flat))]
        leaves = [(s, w) for (s, _), w in zip(outer.flat, weights, strict=True)]
        chosen = data.draw(st.permutations(leaves))
        inner = Layout(tuple(s for s, _ in chosen), tuple(w for _, w in chosen))
        assert table(outer.compose(inner)) == [outer(inner(i)) for i in range(inner.size)]

    @given(st.lists(extents, min_size=1, max_size=4), st.data(), st.integers(1, 16), st.integers(0, 9))
    def test_a_run_is_refused_only_if_it_is_no_layout(self, shape, data, extent, step):
        """Strides far apart, so that what two carries add cannot cancel, and the answer is yes or no."""
        stride = data.draw(st.permutations([1009**k for k in range(len(shape))]))
        outer, inner = Layout(tuple(shape), tuple(stride)), Layout(extent, step)
        if inner.cosize <= outer.size and is_sum_of_progressions([outer(i * step) for i in range(extent)]):
            assert table(outer.compose(inner)) == [outer(i * step) for i in range(extent)]
        else:
            with pytest.raises(SpecError):
                outer.compose(inner)

    @pytest.mark.parametrize(
        ("outer", "inner", "told"),
        [
            (Layout(8), Layout(3, 4), "past size 8"),
            (Layout((4, 3), (1, 4)), Layout(4, 2), "carry"),  # 0, 2, and then into the next row
            (Layout((4, 4), (1, 4)), Layout((2, 4), (2, 1)), "carry"),  # 2 + 3 carries
            (Layout((2, 3), (1, 2)), Layout(6, 1).divide(Layout(2)), "carry"),
        ],
    )
    def test_refuses_what_is_no_layout(self, outer, inner, told):
        with pytest.raises(SpecError, match=told):
            outer.compose(inner)


class TestComplement:
    @given(st.one_of(layouts(), padded), st.integers(1, 60))
    def test_exists_just_if_copies_can_tile_and_is_where_they_start(self, layout, size):
        starts = tiles(set(layout.offsets()), size) if layout.is_injective else None
        if starts is None:
            with pytest.raises(SpecError):
                layout.complement(size)
        else:
            assert table(layout.complement(size)) == starts
            assert Layout.of(layout.complement(size), layout).is_bijective

    def test_known_cases(self):
        # CuTe's complements in 24 of 4:2 and (2,2):(1,6) are (2,3):(1,8) and (3,2):(2,12), modes reversed
        assert str(Layout(4, 2).complement(24)) == "(3,2):(8,1)"
        assert str(Layout((2, 2), (6, 1)).complement(24)) == "(2,3):(12,2)"

    @pytest.mark.parametrize("size", [0, -8])
    def test_of_nothing_is_refused(self, size):
        with pytest.raises(SpecError):
            Layout(1).complement(size)


class TestDivide:
    @given(permuted(), permuted(padding=st.integers(1, 2)))
    def test_reaches_every_offset_tile_by_tile(self, layout, tile):
        try:
            divided = layout.divide(tile)
        except SpecError:
            return
        starts = table(tile.complement(layout.size))
        assert divided.rank == 2 and divided.size == layout.size and divided[1].size == tile.size
        for rest, inside in itertools.product(range(len(starts)), range(tile.size)):
            assert divided(rest, inside) == layout(starts[rest] + tile(inside))

    @given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3), st.data())
    def test_zipped_cuts_every_mode_into_runs(self, factors, data):
        strides = data.draw(st.lists(st.integers(0, 9), min_size=len(factors), max_size=len(factors)))
        layout = Layout(tuple(rest * tile for rest, tile in factors), tuple(strides))
        divided = layout.zipped_divide([tile for _, tile in factors])
        assert [mode.size for mode in divided[0]] == [rest for rest, _ in factors]
        assert [mode.size for mode in divided[1]] == [tile for _, tile in factors]
        for rest in itertools.product(*(range(r) for r, _ in factors)):
            for inside in itertools.product(*(range(t) for _, t in factors)):
                place = [r * t + i for r, (_, t), i in zip(rest, factors, inside, strict=True)]
                assert divided(rest, inside) == layout(*place)

    def test_zipped_keeps_a_mode_nested_where_the_cut_does(self):
        divided = Layout((2, (3, 4)), (1, (2, 6))).zipped_divide((1, 8 // 2))
        assert str(divided) == "((2,3),(1,4)):((1,2),(0,6))"
        assert str(Layout((2, (4, 3)), (1, (2, 8))).zipped_divide((2, 6))) == ("((1,2),(2,(2,3))):((0,4),(1,(2,8)))")

    def test_known_cases(self):
        # CuTe's (4,2,3):(2,1,8) over 4:2 is ((2,2),(2,3)):((4,1),(2,8)), modes reversed
        assert str(Layout((3, 2, 4), (8, 1, 2)).divide(Layout(4, 2))) == "((3,2),(2,2)):((8,2),(1,4))"

    @pytest.mark.parametrize("tile", [(2,), (3, 1), (1, 5), (1, 0), (8, 1)])
    def test_zipped_refuses_tiles_that_do_not_divide(self, tile):
        with pytest.raises(SpecError):
            Layout((4, 8)).zipped_divide(tile)

    def test_two_of_four_in_blocks_of_two(self):
        grid, block = Layout((8, 32)).zipped_divide((1, 2))
        scopes, blocks = grid.zipped_divide((1, 4))
        assert str(Layout.of(scopes, blocks, block)) == "((8,4),(1,4),(1,2)):((32,8),(0,2),(0,1))"

    def test_the_coupled_view_of_two_rows_of_32(self):
        view = Layout((2, 32 // 16, 8, 2), (32, 16, 1, 8))
        assert view.is_bijective
        assert [view(0, 0, i, j) for i in range(8) for j in range(2)][:6] == [0, 8, 1, 9, 2, 10]
        grid, block = view.zipped_divide((1, 1, 1, 2))
        scopes, blocks = grid.zipped_divide((1, 1, 4, 1))
        assert (scopes.size, blocks.size, block.size) == (8, 4, 2)
        canonical = Layout.of(scopes, blocks, block)
        assert canonical.is_bijective
        scope = [[canonical(5, b, e) for e in range(2)] for b in range(4)]
        assert scope == [[36, 44], [37, 45], [38, 46], [39, 47]]  # row 1: columns 4 to 7 and 12 to 15


class TestProduct:
    def test_known_cases(self):
        # CuTe's (2,2):(4,1) times 6:1 is ((2,2),(2,3)):((4,1),(2,8)), modes reversed
        assert str(Layout((2, 2), (1, 4)).product(Layout(6))) == "((3,2),(2,2)):((8,2),(1,4))"

    @given(st.one_of(layouts(), padded), layouts(most_leaves=2, strides=st.integers(0, 4)))
    def test_puts_copies_on_the_free_offsets_in_order(self, layout, other):
        try:
            product = layout.product(other)
        except SpecError:
            return
        end = max([s * d for s, d in layout.flat if s > 1], default=1)
        starts = tiles(set(layout.offsets()), end * other.cosize)
        assert starts and product.rank == 2 and product[1] == layout
        assert table(product[0]) == [starts[other(j)] for j in range(other.size)]
        assert product.is_injective == other.is_injective

    @given(padded, st.integers(1, 4))
    def test_a_layout_that_tiles_can_always_be_repeated_to_fill(self, layout, times):
        end = max([s * d for s, d in layout.flat if s > 1], default=1)
        assert layout.product(Layout(times * end // layout.size)).is_bijective


class TestInverses:
    @given(st.one_of(permuted(), padded, layouts().filter(lambda layout: layout.is_injective)))
    def test_right_inverse_is_the_longest_run(self, layout):
        inverse = layout.right_inverse()
        offsets = set(layout.offsets())
        assert [layout(inverse(i)) for i in range(inverse.size)] == list(range(inverse.size))
        assert inverse.size == next(n for n in itertools.count() if n not in offsets)

    @given(layouts())
    def test_right_inverse_of_any_layout_is_one(self, layout):
        inverse = layout.right_inverse()
        assert [layout(inverse(i)) for i in range(inverse.size)] == list(range(inverse.size))

    @given(padded)
    def test_left_inverse_finds_the_index(self, layout):
        inverse = layout.left_inverse()
        assert [inverse(layout(i)) for i in range(layout.size)] == list(range(layout.size))

    @given(layouts())
    def test_left_inverse_is_right_or_refused(self, layout):
        try:
            inverse = layout.left_inverse()
        except SpecError:
            return
        assert [inverse(layout(i)) for i in range(layout.size)] == list(range(layout.size))

    @given(layouts().filter(lambda layout: not layout.is_injective))
    def test_what_is_not_injective_has_no_left_inverse(self, layout):
        with pytest.raises(SpecError, match="no left inverse"):
            layout.left_inverse()

    @given(permuted())
    def test_a_permutation_has_one_inverse(self, layout):
        assert table(layout.left_inverse()) == table(layout.right_inverse())


def test_errors_are_value_errors():
    assert issubclass(SpecError, S3Error) and issubclass(S3Error, ValueError)
