"""The kernel that prunes tokens against its twin in plain torch: on a GPU, and always in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

import s3lab as s3
from s3lab.solvers.kernels import prune_tokens, refuse_prune_tokens
from s3lab.tensors import activation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU: see test_in_the_interpreter")
CASES = [
    ("2:4", 32, None, False),
    ("1:4", 40, "median", False),
    ("8:16", 48, "mean", True),
    ("3:6", 42, "median", True),
    ("16:32", 96, "vector", True),
    ("40:64", 64, "vector", False),
]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """The tests of this file that run the kernel, on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "twin or refused", __file__]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0 and "skipped" not in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_it_compiles_for_a_gpu_that_is_not_there(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from s3lab.solvers.kernels.activation_triton import _prune
for kind, centre in (("*fp32", 2), ("*bf16", 3)):
    constants = dict(B=16, KEEP=8, WEIGHED=True, CENTRE=centre, VARIANCE=True, SCOPES=256, WIDE=16)
    types = dict(x=kind, factor="*fp32", shift="*fp32", out=kind, K="i32")
    signature = {name: types.get(name, "constexpr") for name in _prune.arg_names}
    built = triton.compile(ASTSource(_prune, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert built.asm["cubin"]
"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_kernel
@pytest.mark.parametrize(("text", "K", "shift", "variance"), CASES)
@pytest.mark.parametrize("weighed", [False, True])
def test_the_kernel_is_its_twin(text, K, shift, variance, weighed):
    part = activation.bind_token(s3.parse(text), K)
    shift = draw(K, seed=1) if shift == "vector" else shift
    factor = draw(K, seed=2).abs() if weighed else None
    X = draw(2, 2, K)
    X[0, 0], X[0, 1], X[1, 0] = 0.0, 0.3, X[1, 0].round()  # nothing, a constant, and ties
    expected = activation.prune_tokens(X, part, factor, shift, variance)
    found = prune_tokens(X, part, factor, shift, variance, impl="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_is_its_twin_in_half_precision(dtype):
    part = activation.bind_token(s3.parse("8:16"), 64)
    X = draw(6, 64).to(dtype)
    expected = activation.prune_tokens(X, part, None, "median", True)
    found = prune_tokens(X, part, None, "median", True, impl="triton")
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@needs_kernel
def test_it_is_refused_where_its_twin_must_work():
    part = activation.bind_token(s3.parse("2:4"), 8)
    X = draw(3, 8)
    for pattern in ("2:4@1x2", "(M,K/8,4,2):(K,8,1,4) / (1,1,1,1) / (1,1,1,2) keep 1"):
        with pytest.raises(s3.SolveError, match="consecutive features"):
            prune_tokens(X, activation.bind_token(s3.parse(pattern), 8), impl="triton")
    with pytest.raises(s3.SolveError, match="more than 16384"):
        prune_tokens(draw(1, 20000), activation.bind_token(s3.parse("2:4"), 20000), impl="triton")
    with pytest.raises(s3.SolveError, match="float64"):
        prune_tokens(X.double(), part, impl="triton")
    shift = torch.zeros(8, device=DEVICE, requires_grad=True)
    with pytest.raises(s3.SolveError, match="gradient"):
        prune_tokens(X, part, shift=shift, impl="triton")
    prune_tokens(X, part, shift=shift).sum().backward()  # "auto" takes the twin
    assert shift.grad is not None and shift.grad.sum() == 12
    assert prune_tokens(X[:0], part, impl="triton").shape == (0, 8)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="here they can be had")
def test_without_a_gpu_auto_takes_torch_and_triton_says_why():
    part, X = activation.bind_token(s3.parse("2:4"), 8), draw(3, 8)
    assert "cpu" in (refuse_prune_tokens(part, X) or "")
    assert torch.equal(prune_tokens(X, part), activation.prune_tokens(X, part))
    with pytest.raises(s3.SolveError, match="cpu"):
        prune_tokens(X, part, impl="triton")
