"""A layer is passed once, however many stages it is pruned in, and to the same end."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import s3lab
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.prune.flow import Flow, trace_calls
from s3lab.models.prune.passage import Passage
from s3lab.models.prune.sequential import prune_model
from s3lab.models.structure.decoder import find_course, find_decoder

transformers = pytest.importorskip("transformers")

QUIET = {"progress": False, "batch": 4, "held_out": 0.0}


class Count(TorchDispatchMode):
    """Counts, by name, the tokens that are multiplied with each matrix of a model while this is active."""

    def __init__(self, model):
        super().__init__()
        named = {name: m for matrices in find_decoder(model).matrices for name, m in matrices.items()}
        self.at = {matrix.weight.data_ptr(): name for name, matrix in named.items()}
        self.tokens = dict.fromkeys(named, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        product = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and not out.is_meta
        if product and (name := self.at.get(args[-1].data_ptr())):
            self.tokens[name] += len(out)
        return out


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma", "GPT2", "OPT", "GPTNeoX", "Phi"])
def test_each_product_is_taken_once_in_either_stream(make_tiny, ids, kind):
    model = make_tiny(kind)
    with Count(model) as count:
        prune_model(model, None, "2:4", "wanda", **QUIET, calibration=ids)
    # the course of a layer and the trial of its passage take the first sequence three times more
    assert set(count.tokens.values()) == {2 * ids.numel() + 3 * ids.shape[1]}


def test_a_coupling_that_prunes_earlier_stages_passes_from_the_beginning(make_tiny, ids):
    model = make_tiny("Llama")
    with Count(model) as count:
        prune_model(model, None, "mlp-channels keep 50%", "wanda", **QUIET, calibration=ids)
    assert count.tokens["model.layers.0.mlp.up_proj"] > 2 * ids.numel() + 3 * ids.shape[1]


class Switched(nn.Module):
    """A layer in which one product switches another, by a comparison that no gradient passes."""

    def __init__(self):
        super().__init__()
        self.switch, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return x + self.second(functional.relu(self.first(x))) * (self.switch(x) > 0)


class Stack(nn.Module):
    """A language model of such layers, as far as pruning looks."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(64, 8), nn.ModuleList([Switched(), Switched()])

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_where_the_graph_does_not_tell_all_a_layer_is_passed_from_its_beginning(ids):
    torch.manual_seed(0)
    model = Stack()
    decoder = find_decoder(model)
    with torch.no_grad():
        flow = Flow(model, decoder, cut_chunks(ids, 0.0, 4, 0), torch.device("cpu"))
        flow.embed()
        chunk, hidden = flow.sample(0)
        course = find_course(
            decoder.matrices[0], lambda: flow.run(0, chunk, hidden.requires_grad_()), chunk.ids.numel()
        )
        passage = Passage(flow, 0, course, course.stages, decoder.matrices[0])
        assert len(course.stages) == 2 and not passage.steps
        seen = []
        passage.watch(1, lambda matrix, x, held_out: seen.append(x))
        for chunk, x in zip(flow.own, seen, strict=True):
            hidden = flow.get(0, "pruned", chunk)
            torch.testing.assert_close(x, functional.relu(model.layers[0].first(hidden)))
            torch.testing.assert_close(passage.leave(chunk), model.layers[0](hidden))


def test_what_layers_are_given_is_found_without_their_products(make_tiny, ids, family):
    model = make_tiny(family)
    with torch.no_grad(), Count(model) as count:
        calls = trace_calls(model, find_decoder(model), ids)
    assert len(calls) == 2 and (family == "Qwen3Moe" or not any(count.tokens.values()))
    assert not any(value.is_meta for call in calls for value in call.kwargs.values() if isinstance(value, torch.Tensor))


def test_moments_in_a_folder_are_made_once_and_prune_as_those_of_a_pass(make_tiny, ids, tmp_path):
    options = {"hessians": "dense", **QUIET, "held_out": 0.25, "calibration": ids}
    models = [make_tiny("Qwen3") for _ in range(3)]
    runs = [prune_model(models[0], None, "2:4", "sobs", **options)]
    for model in models[1:]:
        with Count(model) as count:
            runs.append(prune_model(model, None, "2:4", "sobs", moments=tmp_path, **options))
    for other in models[1:]:
        for name, tensor in models[0].state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    kept = [[{k: v for k, v in row.items() if k not in ("time_s", "mem_mib")} for row in run.matrices] for run in runs]
    assert kept[0] == kept[1] == kept[2]
    assert not any(count.tokens.values())
    (tmp_path / "001.safetensors").unlink()  # what is lost is measured again
    (tmp_path / "moments.json").write_text("{")
    again = prune_model(make_tiny("Qwen3"), None, "2:4", "sobs", moments=tmp_path, **options)
    assert [row["error"] for row in again.matrices] == [row["error"] for row in runs[0].matrices]
    with pytest.raises(s3lab.DataError, match="other settings"):
        prune_model(make_tiny("Qwen3"), None, "2:4", moments=tmp_path, **{**options, "calibration": ids + 1})
    with pytest.raises(s3lab.DataError, match="moments in a folder"):
        prune_model(make_tiny("Qwen3"), None, "2:4", moments=tmp_path, **{**options, "hessians": "pruned"})
