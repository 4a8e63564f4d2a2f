"""Kernels against their twins in plain torch: on a GPU where there is one, and always in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

import s3lab as s3
from s3lab.solvers.kernels import is_tiled, project, ref, refuse_project, refuse_sweep, sweep_window

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU: see test_in_the_interpreter")
SWEEPS = [
    (16, 5, 4, 1, 2),
    (24, 40, 4, 2, 1),
    (12, 7, 3, 1, 2),
    (32, 17, 16, 1, 8),
    (20, 3, 2, 5, 1),
]
CONSECUTIVE = {
    "2:4": (6, 32),
    "1:4": (6, 32),
    "2:4@1x2": (6, 32),
    "8:16": (3, 32),
    "1:3@1x5": (4, 30),
    "50%/row": (6, 40),
    "(M*K):(1) / (6) / (4) keep 3": (6, 20),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layer(M, K):
    return draw(M, K), s3.hessian(draw(4 * K, K, seed=1) @ draw(K, K, seed=2))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """The tests of this file that run kernels, on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "twin or prunes_as or predicate",
        __file__,
    ]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0 and "skipped" not in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_both_compile_for_a_gpu_that_is_not_there(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from s3lab.solvers.kernels.project_triton import _project
from s3lab.solvers.kernels.sparsegpt_triton import _sweep
sizes = dict(B=4, C=2, KEEP=2, COLUMNS=128, ROWS=16), dict(B=4, E=2, KEEP=2, SCOPES=64, WIDE=4, DEEP=2)
types = dict(V="*fp32", U="*fp32", gone="*fp32", scores="*fp32", mask="*u8")
for kernel, constants in zip((_sweep, _project), sizes):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert built.asm["cubin"]
"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_kernel
@pytest.mark.parametrize(("n", "M", "B", "C", "keep"), SWEEPS)
def test_the_sweep_kernel_is_its_twin(n, M, B, C, keep):
    V, U = draw(n, M), (draw(n, n, seed=1) / n**0.5).triu(1) + torch.eye(n, device=DEVICE)
    expected, expected_gone = ref.sweep(V, U, B, C, keep)
    gone = torch.empty_like(V)
    for swept, factor in ((V.clone(), U), (V.clone(), U.T.contiguous().T)):
        sweep_window(swept, factor, gone, B, C, keep)
        assert torch.equal(gone, expected_gone) and not swept[gone == 1].any()
        torch.testing.assert_close(swept, expected, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("text", CONSECUTIVE)
def test_the_projection_kernel_is_its_twin(text):
    part = s3.parse(text).bind(CONSECUTIVE[text])
    for scores in (draw(*part.shape).square(), draw(*part.shape).round(), torch.zeros(part.shape, device=DEVICE)):
        assert torch.equal(project(part, scores, impl="triton"), part.project(scores))
    with pytest.raises(s3.ShapeError, match="NaN"):
        project(part, torch.full(part.shape, torch.nan, device=DEVICE), impl="triton")


@needs_kernel
@pytest.mark.parametrize(("text", "width"), [("2:4", 16), ("1:4", 128), ("1:2@1x2", 10)])
def test_the_kernel_prunes_as_torch_does(text, width):
    W, H = layer(20, 32)
    kernel, twin = (s3.prune(W, text, H, s3.SparseGPT(width=width, impl=impl)) for impl in ("triton", "torch"))
    assert torch.equal(kernel.mask, twin.mask)
    torch.testing.assert_close(kernel.weight, twin.weight, rtol=1e-4, atol=1e-5)


@needs_kernel
def test_a_kernel_is_refused_outside_its_predicate():
    W, H = layer(8, 160)
    for text, reason in {
        "50%/row": "consecutive weights of a row",
        "1:2@2x2": "consecutive weights of a row",
        "2:4 each way": "consecutive weights of a row",
        "40:80": "more than 64 blocks",
        "2:4 plus 1:16": "consecutive weights of a row",
    }.items():
        with pytest.raises(s3.SolveError, match=reason):
            s3.prune(W, text, H, s3.SparseGPT(impl="triton"))
    with pytest.raises(s3.SolveError, match="float64"):
        s3.prune(W.double(), "2:4", H, s3.SparseGPT(impl="triton"))
    for text in ("1:2@2x2", "2:4 each way", "50%/row"):
        with pytest.raises(s3.SolveError, match=r"consecutive|each way|64 blocks"):
            project(s3.parse(text).bind((8, 160)), W, impl="triton")


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="here they can be had")
def test_without_a_gpu_auto_takes_torch_and_triton_says_why():
    W, H = layer(8, 32)
    part = s3.parse("2:4").bind((8, 32))
    assert "cpu" in (refuse_sweep(part.stage(W), True, W) or "") and "cpu" in (refuse_project(part, W) or "")
    assert torch.equal(project(part, W), part.project(W))
    with pytest.raises(s3.SolveError, match="cpu"):
        project(part, W, impl="triton")
    with pytest.raises(s3.SolveError, match="cpu"):
        s3.prune(W, part.text, H, s3.SparseGPT(impl="triton"))


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:4@1x2", "8:16", "1:3"])
@pytest.mark.parametrize("width", [16, 48, 200])
def test_sparsegpt_is_the_column_loop(text, width):
    """The twin on the whole weight at once, through U and not R, is the method as it was published."""
    K = 192
    W, H = layer(10, K)
    problem = s3.Problem(W.double(), H)
    U = torch.linalg.cholesky(torch.linalg.inv(problem.hessian)).T
    part, units = s3.parse(text).bind((10, K)), U.diagonal()
    V, gone = ref.sweep(problem.weight.T / units[:, None], U / units, part.B, part.E, part.keep)
    found = s3.SparseGPT(width=width)(problem, s3.parse(text))
    assert torch.equal(found.mask, gone.T == 0)
    torch.testing.assert_close(found.weight, (V * units[:, None]).T, rtol=1e-9, atol=1e-9)


def test_tiles_are_what_they_say():
    W = torch.ones(8, 32)
    tiled = {text: is_tiled(s3.parse(text).bind((8, 32)).stage(W), 128) for text in ("2:4", "2:4@1x2", "16:32")}
    assert all(tiled.values())
    for text in ("1:2@2x2", "50%", "2:4 each way", "(K,M):(1,K) / (1,1) / (1,4) keep 1", "coupled-2:4"):
        assert not is_tiled(s3.parse(text).bind((8, 32)).stage(W), 128)
