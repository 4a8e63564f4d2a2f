"""What a terminal shows is the mask, the blocks and the scopes, letter by letter, with colour and without."""

import io
from itertools import product

import pytest
import torch
from rich.console import Console

from s3lab import PATTERNS, DataError, SpecError, parse
from s3lab.lab.draw import plot, terminal

SHAPES = {
    "2:4": (8, 16),
    "coupled-2:4": (4, 16),
    "block16": (16, 16),
    "50% rows": (8, 16),
    "4:8@16x1 then 2:4": (16, 16),
    "8:16 plus 2:32": (4, 32),
    "2:4 each way": (8, 16),
}


def cells(text: str, M: int, K: int) -> list[list[str]]:
    """The signs of the weights of a drawing, its rules left out."""
    rows = [line for line in text.splitlines() if not set(line) <= set("─┼│ ")]
    found = [[sign for sign in row if sign not in "│ "] for row in rows]
    assert len(found) == M and all(len(row) == K for row in found)
    return found


@pytest.mark.parametrize("text", SHAPES)
def test_a_drawing_is_the_mask_with_a_letter_for_each_block(text):
    M, K = SHAPES[text]
    bound = parse(text).bind((M, K))
    (picture,) = terminal.project(bound, seed=1)
    bound.check(picture.mask)
    signs = cells(terminal.draw(picture, 120).plain, M, K)
    part = bound.first_part
    for scope, block, element in product(range(part.S), range(part.B), range(part.E)):
        m, k = divmod(part.layout(scope, block, element), K)
        letter = "abcdefghijklmnopqrstuvwxyz"[block % 26]
        if scope == 0:
            assert signs[m][k] == (letter.upper() if picture.mask[m, k] else "○")
        else:
            assert signs[m][k] == (letter if picture.mask[m, k] else "·")


def test_rules_part_scopes_and_are_left_out_where_they_say_nothing():
    def drawn(text, shape):
        return terminal.draw(terminal.project(parse(text).bind(shape))[0], 80).plain.splitlines()

    assert [[i for i, sign in enumerate(line) if sign == "│"] for line in drawn("2:4", (2, 8))] == [[8], [8]]
    assert drawn("2:4 each way", (8, 8))[4] == "────────┼────────"
    assert not any("│" in line for line in drawn("1:1@4x1", (4, 4)))


def test_a_coupled_block_has_its_letter_in_every_weight():
    bound = parse("down: (M,1) & up: (1,K) follows keep 50%").bind({"down": (2, 6), "up": (6, 3)})
    down, up = terminal.project(bound)
    assert (down.title, up.title) == ("down leads", "up follows")
    by_column, by_row = cells(terminal.draw(down).plain, 2, 6), cells(terminal.draw(up).plain, 6, 3)
    assert by_column[0] == by_column[1] == [row[0] for row in by_row] and sum(s == "○" for s in by_column[0]) == 3
    assert all(len(set(row)) == 1 for row in by_row)


def test_blocks_of_unlike_groups_have_unlike_letters():
    bound = parse("q: (1,1) / (1,4) | k: (1,1) / (1,4) keep 4").bind({"q": (1, 4), "k": (1, 4)})
    q, k = (cells(terminal.draw(picture).plain, 1, 4)[0] for picture in terminal.project(bound))
    assert set(q) <= set("ABCD○") and set(k) <= set("EFGH○") and sum(sign != "○" for sign in q + k) == 4


def test_what_does_not_fit_is_said_and_cells_grow_narrow_first():
    (picture,) = terminal.project(parse("2:4").bind((80, 64)))
    narrow = terminal.draw(picture, 79).plain.splitlines()
    assert max(map(len, narrow[:-1])) == 79 and len(narrow) == 65
    assert narrow[-1].startswith("… 64×64 of 80×64")
    assert terminal.draw(picture, 30).plain.splitlines()[-1].startswith("… 64×24 of 80×64")


def test_without_colour_and_in_ascii_it_reads_the_same():
    (picture,) = terminal.project(parse("2:4").bind((4, 8)))
    said = {}
    for name, options in {"plain": {"no_color": True}, "colour": {"color_system": "truecolor"}}.items():
        console = Console(file=io.StringIO(), width=80, force_terminal=True, **options)
        console.print(terminal.draw(picture), soft_wrap=True)
        said[name] = console.file.getvalue()
    red, green, blue = (int(plot.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}" in said["colour"] and "48;2" not in said["plain"]
    assert terminal.draw(picture, ascii_only=True).plain.isascii()
    assert terminal.draw(picture, ascii_only=True).plain == terminal.draw(picture).plain.translate(
        str.maketrans("·○│", ".o|")
    )


def test_colours_have_ink_that_can_be_read():
    def luminance(colour):
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in plot.COLOURS[:7]:
        ink = {"white": 1.0, "black": 0.0}[terminal.ink_on(colour)]
        light, dark = sorted((ink, luminance(colour)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, level AA for text


def test_the_facts_are_those_of_the_pattern():
    told = terminal.describe(parse("2:4").bind((2, 8)))
    assert told.splitlines() == [
        "2:4 on 2×8: 50% kept",
        "4 scopes of 4 blocks of 1 weight",
        "index 0.75 bits a weight, bitmask 1; about 10^3 masks",  # 6⁴ = 1296
    ]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_named_pattern_finds_a_small_shape(name):
    bound = terminal.bind(parse(name))
    (picture,) = terminal.project(bound)
    assert float(picture.mask.double().mean()) == pytest.approx(bound.density)


def test_a_shape_that_cannot_be_is_refused_in_words():
    with pytest.raises(SpecError, match="give one with --shape MxK"):
        terminal.bind(parse("1:2@509x1"))
    with pytest.raises(SpecError, match="of one weight"):
        terminal.bind(parse("2:4"), {"a": (4, 8)})


def test_the_list_has_every_named_pattern_with_its_text_and_cost():
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal.list_patterns())
    lines = {line.split()[0]: line for line in console.file.getvalue().splitlines()}
    for name, text in PATTERNS.items():
        bound = parse(name).bind((256, 768))
        shown = lines[name].split(maxsplit=3)
        assert shown[3].strip() == text
        assert shown[1] == f"{100 * bound.density:.4g}%"
        assert float(shown[2]) == pytest.approx(bound.storage_bits, rel=0.01)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_drawing_goes_to_a_file_the_same_every_time(tmp_path, name, start):
    pictures = terminal.project(parse("8:16 plus 2:32").bind((4, 32)))
    terminal.save(pictures, "text", tmp_path / name)
    first = (tmp_path / name).read_bytes()
    terminal.save(pictures, "text", tmp_path / name)
    assert first.startswith(start) and (tmp_path / name).read_bytes() == first


def test_no_other_kind_of_file_is_written(tmp_path):
    pictures = terminal.project(parse("2:4").bind((4, 8)))
    with pytest.raises(DataError, match=r"drawn as \.png or \.svg"):
        terminal.save(pictures, "text", tmp_path / "a.pdf")
    assert torch.is_tensor(pictures[0].mask) and not list(tmp_path.iterdir())
