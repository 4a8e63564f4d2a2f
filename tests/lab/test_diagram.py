import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgb

from s3lab import parse
from s3lab.lab.draw import diagram, plot


def segments(ax, which: int) -> set[tuple]:
    lines = [c for c in ax.collections if isinstance(c, LineCollection)][which]
    return {tuple(map(tuple, np.sort(line, axis=0).astype(int).tolist())) for line in lines.get_segments()}


@pytest.mark.parametrize("text", ["1:4", "2:4", "2:4@1x2", "coupled-2:4", "block16", "50% rows"])
def test_a_pattern_has_its_cells_dots_and_outlines(text):
    partition = parse(text).bind((16, 32))
    mask = partition.project(torch.rand(16, 32, generator=torch.Generator().manual_seed(0)))
    (ax,) = diagram.draw_pattern(partition, mask).axes
    (dots,) = [c for c in ax.collections if isinstance(c, PatchCollection)]
    corners = {tuple(np.floor(path.vertices[0]).astype(int)[::-1].tolist()) for path in dots.get_paths()}
    assert corners == {tuple(cell) for cell in torch.argwhere(~mask).tolist()}
    scope = partition.scatter(torch.arange(partition.S)[:, None].expand(-1, partition.B))
    expected = {((k, m), (k, m + 1)) for m in range(16) for k in range(1, 32) if scope[m, k] != scope[m, k - 1]}
    expected |= {((k, m), (k + 1, m)) for m in range(1, 16) for k in range(32) if scope[m, k] != scope[m - 1, k]}
    expected |= {((k, m), (k, m + 1)) for m in range(16) for k in (0, 32)}
    expected |= {((k, m), (k + 1, m)) for k in range(32) for m in (0, 16)}
    assert segments(ax, 1) == expected


def test_cells_of_one_block_have_one_colour_and_pruned_ones_are_paler():
    partition = parse("2:4").bind((1, 4))
    (ax,) = diagram.draw_pattern(partition, torch.tensor([[True, False, True, False]])).axes
    shown = np.asarray(ax.images[0].get_array())
    assert shown[0, 0].tolist() == list(to_rgb(plot.COLOURS[0]))
    assert shown[0, 1].min() > 0.8 and shown[0, 3].min() > 0.8


def test_a_page_holds_every_pattern_under_its_title():
    items = [(text, parse(text).bind((4, 16)), None) for text in ("2:4", "1:4", "2:4@1x2")]
    fig = diagram.draw_patterns(items, columns=2)
    assert [ax.get_title() for ax in fig.axes if ax.axison] == ["2:4", "1:4", "2:4@1x2"]


def test_steps_number_the_cells_by_order_block_and_scope():
    spec = parse("coupled-2:4")
    axes = diagram.draw_steps(spec, (1, 16)).axes
    numbers = [[int(text.get_text()) for text in ax.texts] for ax in axes]
    assert numbers[0] == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    assert numbers[1] == [0, 1, 2, 3, 4, 5, 6, 7] * 2
    assert numbers[2] == [0, 0, 0, 0, 1, 1, 1, 1] * 2
