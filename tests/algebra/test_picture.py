"""A drawing shows each weight once, in the colour of its block, full where it is kept; every result shows itself."""

import re
from xml.etree import ElementTree

import pytest
import torch

from s3lab import PATTERNS, parse, prune
from s3lab.algebra.fit import fit
from s3lab.algebra.partition import Partition
from s3lab.algebra.picture import COLOURS, Cells, draw_cells, find_places, sample_mask

SVG = "{http://www.w3.org/2000/svg}"


def painted(svg: str) -> dict[tuple[int, int], tuple[str, str]]:
    """The colour and the opacity of each cell, read back from the drawing."""
    found = {}
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if "fill-opacity" in path.attrib:
            for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", path.attrib["d"]):
                for column in range(int(x), int(x) + int(width)):
                    assert (int(y), column) not in found
                    found[int(y), column] = path.attrib["fill"], path.attrib["fill-opacity"]
    return found


@pytest.mark.parametrize("text", ["2:4", "coupled-2:4", "block16", "2:4 each way"])
def test_each_cell_has_the_colour_of_its_block_and_is_full_where_kept(text):
    part = fit(parse(text))
    M, K = part.shape
    mask = sample_mask(part)
    part.check(torch.tensor(mask).view(M, K))
    scope, block = find_places(part, range(M * K))
    cells = painted(draw_cells(Cells(K, range(M * K), scope, block, mask), label=text))
    assert len(cells) == M * K
    for (m, k), (colour, opacity) in cells.items():
        assert colour == COLOURS[block[m * K + k] % 7] and (opacity == "1") is mask[m * K + k]


def test_places_are_those_of_the_layout_whether_few_or_all_are_asked_for():
    part = parse("coupled-2:4").bind((4, 64))
    asked = [7, 100, 255]
    scope, block = find_places(part, asked)
    everything = find_places(part, range(256))
    for i, offset in enumerate(asked):
        assert offset in [part.layout(scope[i], block[i], e) for e in range(part.E)]
        assert (scope[i], block[i]) == (everything[0][offset], everything[1][offset])


@pytest.mark.parametrize("text", [*PATTERNS, "down: (M,1) & up: (1,K) follows keep 75%"])
def test_every_pattern_shows_itself(text):
    pattern = parse(text)
    shown = pattern._repr_html_()
    assert shown is not None and "<svg" in shown and "kept" in shown
    ElementTree.fromstring(shown)
    if isinstance(bound := fit(pattern), Partition):
        bound.check(torch.tensor(sample_mask(bound)).view(bound.shape))


def test_a_pattern_that_fits_nothing_small_and_a_text_of_signs_do_no_harm():
    assert parse("1:2@509x1")._repr_html_() is None
    assert "<&>" not in draw_cells(Cells(1, [0], [0], [0], [True]), label="<&>")


def test_a_solution_shows_the_corner_of_its_mask():
    solution = prune(torch.ones(64, 128), "2:4", solver="magnitude")
    shown = solution._repr_html_()
    svg = re.search(r"<svg.*</svg>", shown)[0]
    assert {cell: opacity == "1" for cell, (_, opacity) in painted(svg).items()} == {
        (m, k): bool(solution.mask[m, k]) for m in range(32) for k in range(64)
    }
