"""Kernels of packed weights for a GPU against the dense product: where there is one, and in Triton's interpreter."""

import os
import subprocess
import sys
from typing import cast

import pytest
import torch
from torch.nn.functional import linear

import s3lab as s3
from s3lab.packing import gpu
from s3lab.packing.codec import ALONE, pack
from s3lab.packing.file import Entry
from s3lab.packing.gpu.fragments import Fragments
from s3lab.packing.linear import PackedLinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU: see test_in_the_interpreter")
# the interpreter multiplies the bits of bfloat16 as integers
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
PAIRS = ["mma-m16n8k16", "block16", "(M/2,2,K):(2*K,K,1) / (1,1,32) / (1,2,1) keep 1"]


def prune(text, dtype, shape, seed=0):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return W.where(s3.parse(text).bind(shape).project(W.float().abs()), 0)


def draw(tokens, W):
    return torch.randn(tokens, W.shape[1], generator=torch.Generator().manual_seed(tokens)).to(W.dtype).to(DEVICE)


def assert_product(y, x, W):
    torch.testing.assert_close(y.double().cpu(), x.double().cpu() @ W.double().T, rtol=1e-5, atol=1e-4)


def make_fragments(W, text):
    packed = pack(W, text)
    return packed, cast(Fragments, Fragments.of(packed.places[ALONE], packed.values[ALONE]))


def make_layer(W, text, **options):
    return PackedLinear.of(Entry(pack(W, text, **options), {ALONE: "up_proj"}), ALONE).to(DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """The tests of this file that run kernels, on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "by_a_kernel", __file__]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0 and "skipped" not in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_they_compile_for_a_gpu_that_is_not_there(tmp_path):
    """Pairs of rows by the very instruction of Figure 1, once for each 16 columns of half the rows."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from s3lab.packing.gpu import fragments_triton, rows_triton
def build(tuned, types, constants, target=90):
    kernel = tuned.fn
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", target, 32),
                          options=dict(num_warps=1)).asm
for kind in ("*fp32", "*fp16", "*bf16"):
    for run in (1, 16):
        types = dict(bits="*u8", starts="*i64", values=kind, x=kind, y="*fp32")
        assert build(rows_triton._multiply, types, dict(RUN=run, TOKENS=2, ROWS=4, COLUMNS=256))["cubin"]
for kind in ("fp16", "bf16"):
    types = dict(operand="*" + kind, bits="*u8", pairs="*i64", x="*" + kind, y="*fp32")
    made = build(fragments_triton._multiply, types, dict(RUN=16, PAIRS=16, TOKENS=8), 80)
    assert made["cubin"] and made["ptx"].count("mma.sync.aligned.m16n8k16") == 1, made["ptx"]
"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_kernel
@pytest.mark.parametrize("text", ["2:4", "8:16", "block16", "25%", "50%@4x16", "2:4 plus 1:32", "50% columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_multiplied_by_a_kernel(text, dtype):
    from s3lab.packing.gpu.rows_triton import multiply_rows

    W = prune(text, dtype, (16, 288))  # no multiple of the columns at a time
    rows = make_layer(W, text).rows
    for tokens in (1, 3):
        x = draw(tokens, W)
        assert_product(multiply_rows(rows, x), x, W)


@needs_kernel
@pytest.mark.parametrize("text", PAIRS)
@pytest.mark.parametrize("dtype", HALF)
def test_pairs_of_rows_are_multiplied_by_a_kernel(text, dtype):
    from s3lab.packing.gpu.fragments_triton import multiply_fragments

    W = prune(text, dtype, (96, 160))
    layer = make_layer(W, text)
    assert layer.rows.shape == W.shape and isinstance(layer._form, Fragments)
    for tokens in (1, 19):
        x = draw(tokens, W)
        assert_product(multiply_fragments(layer._form, x), x, W)


@needs_kernel
def test_a_layer_takes_what_it_tells_by_a_kernel():
    W = prune("mma-m16n8k16", torch.float16, (64, 64))
    layer = make_layer(W, "mma-m16n8k16")
    few = "up to 8 tokens by a Triton kernel on runs of 16"
    assert f"{few}, up to 64 by tensor cores on half the rows, more unpacked" in repr(layer)
    dense = torch.nn.Linear(64, 64, bias=False, dtype=W.dtype, device=DEVICE)
    dense.weight.data.copy_(W)
    for tokens in (1, 8, 9, 64, 65):
        x = draw(tokens, W)
        torch.testing.assert_close(layer(x), dense(x), rtol=2e-3, atol=2e-2)
        sequence = x.unsqueeze(0)
        assert tokens == 1 or torch.equal(layer(sequence), dense(sequence))
    assert f"{few}, more unpacked" in repr(make_layer(W.float(), "mma-m16n8k16"))
    rounded = make_layer(prune("2:4", torch.float16, (64, 64)), "2:4", values="int8")
    assert "unpacked for each product (no kernel for int8)" in repr(rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_is_multiplied_by_sparse_tensor_cores(dtype):
    W = prune("2:4", dtype, (64, 128))
    layer = make_layer(W, "2:4")
    assert "up to 64 by tensor cores on 2:4, more unpacked" in repr(layer)
    for tokens in (1, 9, 64):
        x = draw(tokens, W)
        torch.testing.assert_close(layer(x), linear(x, W.to(DEVICE)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("text", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_operand_is_the_codec_s_own_bytes_and_its_product_the_weight_s(text, dtype):
    W = prune(text, dtype, (96, 160))
    packed, fragments = make_fragments(W, text)
    assert fragments.operand.data_ptr() == packed.values[ALONE].data.data_ptr()
    assert torch.equal(fragments.bits, packed.index) and fragments.shape == W.shape
    assert sorted(fragments.pairs.flatten().tolist()) == list(range(96))
    x = draw(5, W).cpu()
    assert_product(fragments.multiply(x), x, W)


def test_a_fragment_is_16_rows_of_32_that_are_8_apart():
    W = prune("mma-m16n8k16", torch.float32, (64, 32))
    _, fragments = make_fragments(W, "mma-m16n8k16")
    first, second = fragments.pairs
    assert (second - first == 8).all()
    for number in range(2):
        own = fragments.pairs[:, 16 * number : 16 * number + 16].flatten()
        assert sorted(own.tolist()) == list(range(32 * number, 32 * number + 32))


@pytest.mark.parametrize(
    "text", ["2:4", "1:2@8x16", "1:2@1x16", "coupled-2:4", "50%@1x16", f"{s3.PATTERNS['block16']} plus 1:32"]
)
def test_other_patterns_are_no_pairs_of_rows(text):
    assert make_fragments(prune(text, torch.float32, (32, 64)), text)[1] is None


def test_without_a_gpu_the_cpu_s_kernel_is_taken():
    if not gpu.is_gpu(torch.device("cpu")):
        layer = PackedLinear.of(Entry(pack(prune("2:4", torch.float32, (8, 64)), "2:4"), {ALONE: "up_proj"}), ALONE)
        assert "Triton" not in repr(layer)
