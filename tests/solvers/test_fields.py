"""Which rows and columns share their blocks, against a comparison of all pairs."""

import pytest
import torch

import s3lab as s3
from s3lab.algebra.stage import Stage
from s3lab.solvers.fields import Choices, find_fields, find_groups, find_pieces, make_batches

SPECS = [
    "2:4",
    "2:4@1x2",
    "1:2@4x1",
    "1:2@2x4",
    "coupled-2:4",
    "50% columns",
    "50% rows",
    "(K,M):(1,K) / (2,1) / (1,2) keep 1",
]


def numbered(lines):
    """The number of the first line that is equal, counted without gaps."""
    firsts = [lines.index(line) for line in lines]
    return [sorted(set(firsts)).index(first) for first in firsts]


@pytest.mark.parametrize("text", SPECS)
def test_rows_and_columns_are_numbered_by_the_first_that_is_equal(text):
    part = s3.parse(text).bind((8, 32))
    stage = part.stage(torch.ones(1))
    blocks, group = find_groups(stage)
    expected = part.scatter(torch.arange(part.S * part.B).view(part.S, part.B))
    assert torch.equal(blocks.long(), expected)
    assert group.tolist() == numbered(expected.tolist())
    assert find_pieces(stage).tolist() == numbered(expected.T.tolist())


def test_choices_are_all_subsets_of_the_sizes_in_a_fixed_order_or_none():
    choices = Choices.of(4, [1, 2], 10, torch.device("cpu"))
    assert choices is not None and choices.B == 4 and not choices.alike
    assert choices.slots.tolist() == [
        [3, 4], [2, 4], [1, 4], [0, 4], [2, 3], [1, 3], [1, 2], [0, 3], [0, 2], [0, 1],
    ]  # fmt: skip
    assert [row.nonzero()[:, 0].tolist() for row in choices.taken] == [
        [b for b in slots if b < 4] for slots in choices.slots.tolist()
    ]
    assert Choices.of(4, [2], 6, torch.device("cpu")).alike
    assert Choices.of(4, [1, 2], 9, torch.device("cpu")) is None and Choices.of(4, [4], 3, torch.device("cpu")) is None
    assert Choices.of(4, [4], 4, torch.device("cpu")).slots.tolist() == [[0, 1, 2, 3]]
    nothing = Choices.of(4, [0], 4, torch.device("cpu"))
    assert nothing.slots.tolist() == [[4]] and not nothing.taken.any()


def draw_stage(seed, tall, wide, B=3, M=6, K=18):
    """Scopes of B blocks of ``tall`` × ``wide`` weights, some without all of them, and weights gone before."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(M * K).view(M // tall, tall, K // (B * wide), B, wide)
    offsets = numbers.permute(0, 2, 3, 1, 4).reshape(-1, B, tall * wide)
    fate = torch.rand(offsets.shape, generator=generator)
    gone = torch.zeros(M * K, dtype=torch.bool)
    gone[offsets[fate < 0.15]] = True
    offsets = offsets.masked_fill(fate < 0.3, -1)
    goes = torch.full((len(offsets),), 1)
    return Stage("drawn", (M, K), offsets, goes, pruned=gone.view(M, K))


def stages():
    for text in ("2:4", "1:2@2x2", "1:3@1x2", "coupled-2:4", "50% columns", "1:2@4x1"):
        yield text, s3.parse(text).bind((8, 48 if text != "coupled-2:4" else 32)).stage(torch.ones(1))
    for seed, (tall, wide) in enumerate([(1, 1), (2, 1), (1, 2), (3, 1), (2, 3)]):
        yield f"drawn {tall}x{wide}", draw_stage(seed, tall, wide)
    numbers = torch.arange(10 * 20).view(10, 20)
    apart = torch.cat([numbers[:4, :12].reshape(-1, 4, 1), numbers[4:, 12:].reshape(-1, 4, 1)])
    yield "along a diagonal", Stage("apart", (10, 20), apart, torch.full((len(apart),), 2))


STAGES = dict(stages())


def fields_of(stage, width):
    """The fields by a backward visit of the columns in windows of ``width``."""
    blocks, group = find_groups(stage)
    order = torch.arange(stage.shape[1] - 1, -1, -1)
    windows = [(start, min(start + width, len(order))) for start in range(0, len(order), width)]
    return blocks, group, order, find_fields(blocks, group, order, windows)


@pytest.mark.parametrize("name", STAGES)
def test_fields_hold_each_group_with_a_block_once_and_the_columns_it_needs(name):
    stage = STAGES[name]
    blocks, group, order, fields = fields_of(stage, 6)
    busy = sorted({int(group[row]) for row in range(len(group)) if (blocks[row] >= 0).any()})
    assert sorted(g for field in fields for g in field.groups.tolist()) == busy
    for field in fields:
        own = blocks[field.rows[:, 0]]
        seen = (own >= 0).any(0)
        visited = [j for j in order.tolist() if seen[j]]
        taken = (own == -2).any(0) & ~seen
        assert field.columns.tolist() == visited + taken.nonzero()[:, 0].tolist()
        assert field.blocks.tolist() == own[:, visited].clamp(min=-1).tolist()
        if (own == -2).any():
            assert torch.equal(field.taken, own[:, field.columns] == -2)
        else:
            assert field.taken is None
        for g, rows in zip(field.groups.tolist(), field.rows.tolist(), strict=True):
            assert rows == (group == g).nonzero()[:, 0].tolist()
        counts = [sum(bool(seen[j]) for j in order[start : start + 6].tolist()) for start in range(0, len(order), 6)]
        assert [stop - start for start, stop in field.windows] == counts
        assert field.single == all(len({b for b in row if b >= 0}) == 1 for row in field.blocks.tolist())


def join(sets):
    """The sets joined that share a member, however far apart, by the place of each set."""
    home = list(range(len(sets)))
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            if one & other:
                home = [home[i] if h == home[j] else h for h in home]
    return home


@pytest.mark.parametrize("name", STAGES)
def test_a_field_holds_the_groups_of_one_size_that_columns_in_play_tie_together(name):
    blocks, group, _, fields = fields_of(STAGES[name], 6)
    numbers = [g for field in fields for g in field.groups.tolist()]
    members = [(group == g).nonzero()[:, 0].tolist() for g in range(int(group.max()) + 1)]
    tied = join([set((blocks[rows[0]] != -1).nonzero()[:, 0].tolist()) for rows in members])
    kinds = {}
    for g in numbers:
        kinds.setdefault((tied[g], len(members[g])), []).append(g)
    assert sorted(map(sorted, kinds.values())) == sorted(sorted(field.groups.tolist()) for field in fields)


@pytest.mark.parametrize("name", STAGES)
def test_a_cut_keeps_what_is_chosen_of_every_part(name):
    _, group, _, fields = fields_of(STAGES[name], 6)
    chosen = torch.arange(int(group.max()) + 1) % 2 == 0
    for field in make_batches(fields, STAGES[name].B, None, 0):
        own, part = chosen[field.groups], field.cut(chosen)
        assert part.groups.tolist() == [g for g in field.groups.tolist() if g % 2 == 0]
        assert torch.equal(part.rows, field.rows[own]) and torch.equal(part.blocks, field.blocks[own])
        assert part.taken is None if field.taken is None else torch.equal(part.taken, field.taken[own])
        for batch, whole in zip(part.batches, field.batches, strict=True):
            for some, all_of_it in ((batch.sets, whole.sets), (batch.units, whole.units)):
                assert torch.equal(some, all_of_it if len(all_of_it) == 1 else all_of_it[own])


def padded(sets):
    """Lists of columns without their padding, which is -1 throughout."""
    assert int(sets.min()) >= -1 if sets.numel() else True
    return [sorted(j for j in columns if j >= 0) for columns in sets.flatten(0, -2).tolist()]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_batches_list_the_columns_of_every_block_or_choice(name, joint):
    stage = STAGES[name]
    *_, fields = fields_of(stage, 6)
    # a window of six columns holds whole scopes or, of those with more columns, parts
    choices = Choices.of(stage.B, [1, 2] if stage.B < 6 else [1], 99, torch.device("cpu")) if joint else None
    for field, made in zip(fields, make_batches(fields, stage.B, choices, 10**9), strict=True):
        for batch, (start, stop) in zip(made.batches, field.windows, strict=True):
            assert batch.joint is joint
            sets, units = (x.expand(len(field.groups), *x.shape[1:]) for x in (batch.sets, batch.units))
            for g, blocks in enumerate(field.blocks[:, start:stop].tolist()):
                there = {b: [j for j, own in enumerate(blocks) if own == b] for b in blocks if b >= 0}
                real = [u for u, unit in enumerate(units[g].tolist()) if unit >= 0]
                homes = [blocks[int(units[g, u])] for u in real]
                if choices is None:
                    assert sorted(homes) == sorted(there)
                    assert padded(sets[g, real]) == [there[b] for b in homes]
                else:
                    homes = [b // stage.B for b in homes]
                    assert sorted(homes) == sorted({b // stage.B for b in there})
                    for u, home in zip(real, homes, strict=True):
                        expected = [
                            sorted(j for slot in slots if slot < stage.B for j in there.get(home * stage.B + slot, []))
                            for slots in choices.slots.tolist()
                        ]
                        assert padded(sets[g, u]) == expected
                rest = [u for u in range(units.shape[1]) if u not in real]
                assert (units[g, rest] == -1).all() and (sets[g, rest] == -1).all()


@pytest.mark.parametrize("sizes", [[1], [1, 2]], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_scopes_choose_alone_where_they_are_whole_and_nobody_shares_them(name, sizes):
    stage = STAGES[name]
    *_, fields = fields_of(stage, 12)
    choices = Choices.of(stage.B, sizes, 99, torch.device("cpu"))
    made = make_batches(fields, stage.B, choices, 10**9)
    for t in range(len(fields[0].windows)):
        counts = []  # of the columns of each block, by scope and group
        for field in made:
            for blocks in field.blocks[:, slice(*field.windows[t])].tolist():
                scopes = sorted({b // stage.B for b in blocks if b >= 0})
                counts += [[s, *(blocks.count(b) for b in range(s * stage.B, (s + 1) * stage.B))] for s in scopes]
        widest = max((max(count[1:]) for count in counts), default=0)
        whole = all(min(count[1:]) == widest for count in counts)
        expected = len(sizes) == 1 and whole and len({scope for scope, *_ in counts}) == len(counts)
        assert {field.batches[t].alone for field in made if field.batches[t].sets.shape[1]} <= {expected}
