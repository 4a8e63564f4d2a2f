"""The explorers in the kernel: what is wrong is told, what changes is drawn, and nothing grows."""

import gc
import json
import time
from pathlib import Path

import pytest
import torch

from s3lab import PATTERNS, DataError, parse
from s3lab.lab.draw.portrait import measure_rows
from s3lab.lab.explore import explore_patterns, explore_pruning, explore_runs
from s3lab.lab.explore.bits import STORED, split_bits
from s3lab.models.measure.layers import generate_layer
from s3lab.packing.codec import pack


def test_a_wrong_text_is_told_with_its_caret_and_leaves_the_drawing():
    explorer = explore_patterns("2:4")
    drawn = explorer.grid.svg
    for wrong in ("", "2:", "2:4@", "x", "(M,K", "5:4", "2:5", "2:4 then", "<b>"):
        explorer.spec.value = wrong
        assert "<pre" in explorer.message.value and "Traceback" not in explorer.message.value
        assert explorer.grid.svg == drawn
    explorer.spec.value = "2:4@1x2"
    assert not explorer.message.value and explorer.grid.svg != drawn


@pytest.mark.parametrize("name", PATTERNS)
def test_every_named_pattern_can_be_chosen(name):
    explorer = explore_patterns("2:4")
    explorer.names.value = name
    assert not explorer.message.value and explorer.grid.svg
    assert len(explorer.grid.cells["offset"]) <= 64 * 64


@pytest.mark.parametrize("text", ["2:4", "50%", "2:4 each way", "block16"])
def test_the_slider_and_the_text_say_the_same(text):
    explorer = explore_patterns(text)
    explorer.keep.value = 1
    assert explorer.keep.value == 1 and not explorer.message.value
    keep = parse(explorer.spec.value).keep
    assert keep == 1 or 100 * keep == 1


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("text", ["2:4", "50%", "4:8@16x1 then 2:4", "8:16 plus 1:32", "2:4 each way"])
def test_the_bits_that_are_told_are_those_that_the_codec_takes(text, stored):
    """Of a large weight, so that whole bytes and the last group of a scale do not count."""
    shape, kind = (256, 512), stored if stored in ("int8", "int4") else "same"
    bound = parse(text).bind(shape)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs() + 1
    W = W.where(bound.project(W), 0).to(torch.float32 if stored == "float32" else torch.bfloat16)
    told = sum(bits for _, bits in split_bits(bound, stored))
    assert told == pytest.approx(pack(W, text, values=kind, group=128).bits_per_weight, rel=0.01)


def test_bits_follow_the_text_and_the_values():
    explorer = explore_patterns("2:4")
    assert "8.75 bits a weight, dense 16" in explorer.bits.value and "index of 2:4: 0.75" in explorer.bits.value
    explorer.stored.value = "int4"
    assert "2.812 bits a weight, dense 16" in explorer.bits.value
    coupled = explore_patterns("down: (M,1) & up: (1,K) follows keep 75%")
    assert coupled.bits.value.count("index of") == 2  # one index for both: a part of the bar, and its line


@pytest.mark.parametrize("view", ["matrix", "view", "storage"])
@pytest.mark.parametrize("text", ["coupled-2:4", "block16", "4:8@16x1 then 2:4", "50%"])
def test_every_order_has_each_cell_once_with_its_own_block_and_scope(text, view):
    explorer = explore_patterns(text, (16, 32), view=view)
    cells, part = explorer.grid.cells, parse(text).bind((16, 32)).first_part
    assert sorted(cells["offset"]) == list(range(512))
    for offset, scope, block in zip(cells["offset"], cells["scope"], cells["block"], strict=True):
        assert offset in [part.layout(scope, block, e) for e in range(part.E)]


def test_the_views_order_brings_the_partners_of_a_coupled_pattern_together():
    offsets = explore_patterns("coupled-2:4", (4, 16), view="view").grid.cells["offset"]
    assert all(right - left == 8 for left, right in zip(offsets[::2], offsets[1::2], strict=True))


def test_weights_that_are_coupled_are_shown_one_at_a_time():
    explorer = explore_patterns("down: (M,1) & up: (1,K) follows keep 75%")
    assert explorer.weight.options == ("down", "up") and not explorer.message.value
    drawn = explorer.grid.svg
    explorer.weight.value = "up"
    assert explorer.grid.svg != drawn


def test_too_large_a_weight_is_told():
    explorer = explore_patterns("2:4")
    explorer.rows.value = explorer.columns.value = 4096
    assert "make M or K less" in explorer.message.value


def test_two_hundred_redraws_leave_no_memory_behind_and_take_little_time():
    explorer = explore_patterns("2:4", (64, 64))
    spent, held = [], []
    for _ in range(200):
        began = time.process_time()
        explorer.seed.value += 1
        spent.append(time.process_time() - began)
        if len(spent) in (50, 200):
            gc.collect()
            held.append(len(gc.get_objects()))
    assert held[1] - held[0] < 500
    assert sorted(spent)[100] < 0.15  # of the processor, whatever else the machine does


def test_a_still_stands_beside_each_widget():
    bundle = explore_patterns("2:4")._repr_mimebundle_()
    assert bundle["image/svg+xml"].startswith("<svg") and "50% kept" in bundle["text/plain"]


@pytest.fixture
def pruning():
    return explore_pruning({"one": generate_layer(16, 32, 256)}, spec="2:4")


def test_pruning_in_the_background_finds_what_the_solvers_find(pruning):
    pruning.start("magnitude", "sparsegpt")
    pruning.wait()
    table, layer = pruning.table.set_index("solver"), pruning.layers["one"]
    assert (
        pruning.status.value == "done"
        and table.loc["sparsegpt", "error_percent"] < table.loc["magnitude", "error_percent"]
    )
    assert bytes(pruning.portrait.value).startswith(b"\x89PNG") and "image/png" in pruning._repr_mimebundle_()
    for result in pruning.found.values():
        parse("2:4").check(result["mask"])
        lost = measure_rows(layer.W, result["weight"], layer.H) ** 2 @ ((layer.W @ layer.H) * layer.W).sum(1)
        assert float((lost / ((layer.W @ layer.H) * layer.W).sum()).sqrt()) == pytest.approx(result["error"], rel=1e-4)


def test_a_prune_can_be_stopped_and_begun_again(pruning):
    pruning.start("sobs")
    pruning.stop()
    pruning.wait()
    assert pruning.status.value == "stopped" and pruning.table.empty and not pruning.prune.disabled
    pruning.start("magnitude")
    pruning.wait()
    assert len(pruning.table) == 1 and not pruning.message.value


def test_a_spec_that_does_not_fit_is_told_and_begins_nothing(pruning):
    for wrong in ("2:", "2:5"):
        pruning.spec.value = wrong
        pruning.start("magnitude")
        assert "<pre" in pruning.message.value and pruning.job is None


def test_an_error_of_the_solver_is_told():
    pruning = explore_pruning({"one": generate_layer(16, 32, 256)}, spec="q: (1,1) | k: (1,1) keep 50%")
    pruning.start("magnitude")
    pruning.wait()
    assert "<pre" in pruning.message.value
    with pytest.raises(DataError, match="no layer is called"):
        explore_pruning(pruning.layers, layer="two")


def write_run(folder: Path, layers: int) -> None:
    folder.mkdir(exist_ok=True)
    kinds = ("up", "down")
    records = []
    for i in range(layers):
        rows = [{"layer": i, "name": f"mlp.{kind}_proj", "error": 0.1 + 0.01 * i, "time_s": 0.5} for kind in kinds]
        records.append({"matrices": rows, "layer": {"layer": i, "output_error": 0.05, "time_s": 2.0 * i}})
    (folder / "manifest.json").write_text(json.dumps({"layers": records}))


def test_runs_are_read_again_as_they_go_on(tmp_path):
    write_run(tmp_path / "a", 0)
    write_run(tmp_path / "b", 2)
    explorer = explore_runs(tmp_path / "a", tmp_path / "b", every_s=60.0)
    for figure in explorer.figure.options:
        explorer.figure.value = figure
        assert bytes(explorer.image.value).startswith(b"\x89PNG") and not explorer.message.value
    write_run(tmp_path / "a", 3)
    explorer.again.click()
    assert explorer.matrices.groupby("run").size().to_dict() == {"a": 6, "b": 4}
    (tmp_path / "a" / "manifest.json").write_text("{")
    explorer.again.click()
    assert "holds no run" in explorer.message.value
    explorer.close()


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        explore_runs(tmp_path)
    with pytest.raises(DataError, match="one or more"):
        explore_runs()


def test_a_row_that_gives_nothing_has_no_error():
    assert measure_rows(torch.zeros(1, 2), torch.zeros(1, 2), torch.eye(2)).tolist() == [0.0]
