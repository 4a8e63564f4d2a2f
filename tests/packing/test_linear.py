"""Products with packed weights: the dense layer's bits where nothing is lost, its numbers where a kernel adds."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, pad

import s3lab as s3
from s3lab.lab.study.weigh import count_memory
from s3lab.packing import decode
from s3lab.packing.bits import pack_bits
from s3lab.packing.codec import ALONE, pack
from s3lab.packing.file import Entry
from s3lab.packing.linear import PackedLinear
from s3lab.packing.rows import Rows
from s3lab.packing.values import Values
from s3lab.tensors import compiled
from s3lab.tensors.wraps import Wraps

M, K = 48, 256
TEXTS = [
    "2:4",
    "8:16",
    "coupled-2:4",
    "block16",
    "25%",
    "50%@4x16",
    "2:4 plus 1:32",
    "50% columns",
    "50% rows",
    "23% columns",
    "1:256",
]


def prune(text, dtype, shape=(M, K), seed=0):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return W.where(s3.parse(text).bind(shape).project(W.float().abs()), 0)


def make(W, text, **options):
    return PackedLinear.of(Entry(pack(W, text, **options), {ALONE: "up_proj"}), ALONE)


def lay(W, text):
    packed = pack(W, text)
    return Rows.of(packed.places[ALONE], packed.values[ALONE])


@pytest.fixture(scope="module", params=[("-march=native",), ("-march=haswell",), ()], ids=["native", "AVX2", "plain"])
def kernel(request, tmp_path_factory):
    if isinstance(decode.find_kernel(), str):
        pytest.skip(f"no kernel: {decode.find_kernel()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            return decode.Kernel(request.param)
        except OSError as error:
            pytest.skip(f"not on this machine: {error}")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_hold_the_weight(text, dtype):
    W = prune(text, dtype)
    rows = lay(W, text)
    assert torch.equal(rows.unpack(0, M), W) and torch.equal(rows.unpack(5, 23), W[5:23])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", TEXTS)
def test_the_kernel_multiplies_as_the_dense_product_does(kernel, text, dtype):
    W = prune(text, dtype)
    rows = lay(W, text)
    for tokens in range(1, decode.TOKENS + 1):
        x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y, expected = kernel.multiply(rows, x), linear(x.double(), W.double())
        assert torch.allclose(y.double(), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (7, 96), (2, 1024)])
def test_the_kernel_takes_all_shapes_that_it_says(kernel, shape):
    W = prune("25%", torch.bfloat16, shape)
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.allclose(kernel.multiply(lay(W, "25%"), x).double(), x.double() @ W.double().T, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [1, 7, 16, 31, 32, 33, 63, 64, 65, 99])
def test_whole_rows_of_any_length_are_read_and_no_more(kernel, kept, dtype):
    """A row that follows is infinite: it must not reach the sums of the one before."""
    W = torch.zeros(3, 100, dtype=dtype)
    W[:, :kept] = torch.randn(3, kept, generator=torch.Generator().manual_seed(kept)).to(dtype)
    W[1, :kept] = torch.inf
    mask = (torch.arange(100) < kept).expand(3, 100)
    bits = pack_bits(pad(mask, (0, 4)).flatten()).view(3, 13)
    rows = Rows((3, 100), bits, torch.arange(4) * kept, Values("same", dtype, 3 * kept, W[mask]))
    x = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x[:, :kept].double() @ W[:, :kept].double().T
    assert torch.allclose(kernel.multiply(rows, x).double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "runs", "lines", "half"),
    [
        ("2:4", False, False, True),
        ("8:16", False, False, True),
        ("1:4", False, False, False),
        ("16:32", False, False, False),
        ("block16", True, False, False),
        ("50%@4x16", True, False, False),
        ("50% columns", False, True, False),
        ("50% rows", True, True, False),
    ],
)
def test_what_a_mask_is_made_of_is_seen(text, runs, lines, half):
    rows = lay(prune(text, torch.float32), text)
    assert ((rows.runs is not None), (rows.lines is not None), rows.half) == (runs, lines, half)


def test_a_row_with_8_of_only_its_first_16_is_no_half():
    W = torch.zeros(2, 32)
    W[:, :8] = W[0, 16:24] = 1
    assert not lay(W, "1:1").half and not lay(W[:, :24], "1:1").half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_gives_the_dense_layer_s_bits_for_a_sequence(text, dtype):
    W = prune(text, dtype)
    dense = nn.Linear(K, M, dtype=dtype)
    dense.weight.data.copy_(W)
    layer = PackedLinear.of(Entry(pack(W, text), {ALONE: "up_proj"}), ALONE, bias=dense.bias)
    x = torch.randn(2, 9, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(layer(x), dense(x)) and torch.equal(layer.weight, W)
    with torch.no_grad():
        y, expected = layer(x[:, :1]), dense(x[:, :1])
    assert y.shape == expected.shape and y.dtype == dtype
    assert torch.allclose(y, expected, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["2:4", "block16", "50% columns"])
def test_a_core_runs_between_its_wraps(text, dtype):
    generator = torch.Generator().manual_seed(3)
    W = prune(text, dtype)
    wraps = Wraps(*(torch.randn(n // 8, 8, 8, generator=generator).to(dtype) for n in (M, K)))
    layer = PackedLinear.of(Entry(pack(W, text), {ALONE: "up_proj"}, wraps=wraps), ALONE)
    dense = torch.block_diag(*wraps.left.float()) @ W.float() @ torch.block_diag(*wraps.right.float())
    size = float(dense.norm())
    for shape in ((1, K), (2, 1, K), (2, 9, K)):
        x = torch.randn(shape, generator=generator).to(dtype)
        with torch.no_grad():
            apart = (layer(x).float() - linear(x.float(), dense)).norm() / (size * x.float().norm() / K**0.5)
        assert float(apart) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(layer.weight, wraps.around(W)) and "between blocks of 8" in repr(layer)
    extra = 8 * dtype.itemsize * 8 * (M + K) / (M * K)
    assert layer.bits_per_weight == pytest.approx(make(W, text).bits_per_weight + extra)


def test_gradients_reach_the_input():
    W = prune("2:4", torch.float32)
    x = torch.randn(1, K, requires_grad=True)
    make(W, "2:4")(x).sum().backward()
    assert torch.allclose(x.grad, W.sum(0, keepdim=True), atol=1e-5)


def test_tiles_make_the_same_product(monkeypatch):
    W = prune("8:16", torch.float32)
    x = torch.randn(3, 4, K)
    whole = make(W, "8:16")(x)
    monkeypatch.setattr("s3lab.packing.linear._TILE", 5 * K)
    assert torch.allclose(make(W, "8:16")(x), whole, atol=1e-5)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("text", ["2:4", "coupled-2:4"])
def test_rounded_values_are_read_by_rows(values, text):
    layer = make(prune(text, torch.bfloat16), text, values=values, group=24)
    rows = layer.rows
    assert torch.equal(
        torch.cat([rows.unpack(0, 7), rows.unpack(7, M)]),
        pack(prune(text, torch.bfloat16), text, values=values, group=24).unpack(),
    )


def test_what_runs_is_told(monkeypatch):
    W = prune("2:4", torch.bfloat16)
    found = decode.find_kernel()
    if not isinstance(found, str):
        kernel = f"up to 8 tokens by a kernel with {found.level}"
        assert f"{kernel} on 8 of each 16 weights, more unpacked" in repr(make(W, "2:4"))
        assert "on single weights" in repr(make(prune("25%", torch.bfloat16), "25%"))
        assert "on runs of 16" in repr(make(prune("block16", torch.bfloat16), "block16"))
    columns = prune("50% columns", W.dtype)
    assert "on 48 whole rows of 128 columns" in repr(make(columns, "50% columns"))
    assert "unpacked for each product (no kernel for int8)" in repr(make(W, "2:4", values="int8"))
    monkeypatch.setattr(decode, "find_kernel", lambda: "no C++ compiler")
    layer = make(W, "2:4")
    assert "unpacked for each product (no C++ compiler)" in repr(layer)
    x = torch.randn(1, K).bfloat16()
    assert torch.equal(layer(x), linear(x, W))
    layer = make(columns, "50% columns")
    assert "by torch on 48 whole rows of 128 columns (no C++ compiler)" in repr(layer)
    assert torch.allclose(layer(x), linear(x, columns), atol=2e-2, rtol=1e-2)


def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("S3LAB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="failed"):
        decode.Kernel(("-march=no-such-cpu",))
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    with pytest.raises(OSError, match="no C"):
        decode.Kernel()


def test_a_copy_and_another_dtype_run_as_well():
    W = prune("2:4", torch.bfloat16)
    layer = make(W, "2:4")
    x = torch.randn(1, 9, K)
    few = x[:, :1]
    for tokens in (x, few):
        assert torch.equal(copy.deepcopy(layer)(tokens.bfloat16()), layer(tokens.bfloat16()))
    assert torch.equal(layer.float()(x), linear(x, W.float()))
    assert torch.allclose(layer(few), linear(few, W.float()), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", TEXTS)
def test_what_a_layer_has_run_is_saved_as_it_was_loaded(text, dtype):
    W = prune(text, dtype)
    layer = make(W, text)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(1, K).to(dtype))
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    wide = layer.double().state_dict()["values"]
    assert torch.equal(wide, before["values"].double()) and torch.equal(layer.weight, W.double())


@pytest.mark.parametrize("text", ["2:4", "block16"])
def test_a_layer_that_has_run_takes_other_weights(text):
    layer, W = make(prune(text, torch.float32), text), prune(text, torch.float32, seed=1)
    x = torch.randn(1, K)
    layer(x)
    layer.load_state_dict(make(W, text).state_dict(), assign=True)
    assert torch.allclose(layer(x), linear(x, W), atol=1e-4) and torch.equal(layer.weight, W)


@pytest.mark.parametrize("text", ["2:4", "block16", "50% columns", "coupled-2:4"])
def test_values_are_held_once(text):
    layer = make(prune(text, torch.float32), text)
    layer(torch.randn(1, K))
    rows = layer.rows
    product = rows.runs if rows.runs is not None else rows.bits
    apart = len(layer.index) + rows.bits.nbytes + product.nbytes * (product is not rows.bits)
    assert count_memory(layer) <= layer.values.nbytes + apart + 3 * 8 * (M + K + 1)


def test_a_copy_holds_its_own_weight():
    layer = make(prune("2:4", torch.float32), "2:4")
    x = torch.randn(1, K)
    before = layer(x)
    other = copy.deepcopy(layer)
    other.values.zero_()
    assert torch.equal(layer(x), before) and not other(x).any()
