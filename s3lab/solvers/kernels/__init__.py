"""Operations that a GPU does in one kernel: where the kernel is taken, and why not; `ref` is each in plain torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from s3lab.algebra.partition import Partition
from s3lab.algebra.stage import Stage
from s3lab.errors import SolveError
from s3lab.shapes import Float
from s3lab.tensors import activation

Impl = Literal["auto", "torch", "triton"]
WINDOW = 128  # columns that one program holds
_WIDEST = 64  # blocks in a scope: every one is compared with every other
_LONGEST = 16384  # features of a token, which one program holds in registers, nearly without spills (sm_90)


def check_impl(impl: str) -> None:
    """Raise SolveError unless ``impl`` is the name of a way to compute."""
    if impl not in get_args(Impl):
        raise SolveError(f"impl={impl!r}: use one of {', '.join(get_args(Impl))}")


def takes_triton(impl: Impl, refusal: str | None) -> bool:
    """Return whether the kernel is taken; SolveError where it is asked for and there is a reason not to.

    >>> takes_triton("auto", None), takes_triton("torch", None), takes_triton("auto", "no GPU")
    (True, False, False)
    """
    check_impl(impl)
    if impl == "triton" and refusal is not None:
        raise SolveError(f"impl='triton' cannot be had: {refusal}; use impl='auto' or 'torch'")
    return impl != "torch" and refusal is None


def is_tiled(stage: Stage, width: int) -> bool:
    """Return whether the scopes are runs of consecutive weights of one row that all keep equally many blocks.

    None is longer than ``width`` or `WINDOW`.

    >>> import torch
    >>> from s3lab import parse
    >>> [is_tiled(parse(text).bind((2, 8)).stage(torch.ones(2)), 4) for text in ("2:4", "1:2@2x2", "50%/row")]
    [True, False, False]
    """
    scope, (M, K) = stage.B * stage.E, stage.shape
    if stage.lines is not None or scope > min(width, WINDOW) or K % scope or stage.S * scope != M * K:
        return False
    flat = stage.offsets.reshape(-1)
    return int(flat[0]) == 0 and bool((flat.diff() == 1).all()) and bool((stage.goes == stage.goes[0]).all())


def refuse_sweep(stage: Stage, tiled: bool, W: Tensor) -> str | None:
    """Return why a window of a SparseGPT sweep cannot run in its kernel, None where it can.

    It can for a float32 weight on a GPU, where Triton is installed, and scopes that are `is_tiled`, of up to 64 blocks.
    """
    if not tiled:
        return f"the scopes of {stage.text} are not up to {WINDOW} consecutive weights of a row, within the width"
    if stage.B > _WIDEST:
        return f"the scopes of {stage.text} hold more than {_WIDEST} blocks"
    return _refuse_tensor(W)


def sweep_window(V: Tensor, U: Tensor, gone: Tensor, B: int, C: int, keep: int) -> None:
    """Sweep a window in the kernel, V changed in place and ``gone`` set, as `ref.sweep` does."""
    from s3lab.solvers.kernels.sparsegpt_triton import sweep

    sweep(V, U, gone, B, C, keep)


def refuse_project(part: Partition, scores: Tensor) -> str | None:
    """Return why a projection cannot run in its kernel, None where it can.

    It can for float32 scores on a GPU, where Triton is installed, and scopes of consecutive weights, at most 64
    blocks and 1024 weights each.
    """
    if reason := _refuse_tensor(scores):
        return reason
    if part.lines is not None:
        return f"{part.text} keeps equally many each way"
    if part.layout.coalesce().flat != ((part.shape[0] * part.shape[1], 1),):
        return f"the scopes of {part.text} are not consecutive weights"
    if part.B > _WIDEST or part.B * part.E > 1024:
        return f"the scopes of {part.text} hold more than {_WIDEST} blocks or 1024 weights"
    return None


def project(part: Partition, scores: Tensor, impl: Impl = "auto") -> Tensor:
    """Return the mask (M, K), True = kept, of the blocks with the highest sums of element scores (M, K).

    As `Partition.project`, which is its twin; the sums of blocks of more than one weight may differ in rounding.
    ``"triton"`` raises SolveError where `refuse_project` has a reason not to, ``"auto"`` then takes the twin.

    >>> import torch
    >>> from s3lab import parse
    >>> project(parse("1:2").bind((1, 4)), torch.tensor([[3.0, 1.0, 2.0, 4.0]])).tolist()
    [[True, False, False, True]]
    """
    if not takes_triton(impl, refuse_project(part, scores)):
        return part.project(scores)
    from s3lab.solvers.kernels.project_triton import project_consecutive

    part.blocks(scores)  # raises on any other shape
    return project_consecutive(scores, part.B, part.E, part.keep)


def refuse_prune_tokens(part: activation.TokenPattern, x: Tensor, *others: object) -> str | None:
    """Return why tokens cannot be pruned in the kernel, None where they can.

    They can in float32, bfloat16 and float16 on a GPU, where Triton is installed and no gradient is asked for, by N:M
    of up to 64 single features, and up to 16384 of them in all.
    """
    if part.E > 1 or part.order is not None or part.B > _WIDEST:
        return f"the scopes of {part.text} are not up to {_WIDEST} consecutive features"
    if part.K > _LONGEST:
        return f"a token has {part.K} features, more than {_LONGEST}"
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *others)):
        return "the kernel has no gradient"
    return _refuse_tensor(x, sizes=(2, 4))


def prune_tokens(
    x: Float[Tensor, "... K"],
    part: activation.TokenPattern,
    factor: Float[Tensor, " K"] | None = None,
    shift: Float[Tensor, " K"] | activation.Centre | None = None,
    variance: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "... K"]:
    """Return the tokens pruned as `s3lab.tensors.activation.prune_tokens` does, which is the twin.

    ``"triton"`` raises SolveError where `refuse_prune_tokens` has a reason not to, ``"auto"`` then takes the twin.

    >>> part = activation.bind_token(__import__("s3lab").parse("1:2"), 2)
    >>> prune_tokens(torch.tensor([[3.0, 1.0]]), part, shift="mean")
    tensor([[3., 2.]])
    """
    if not takes_triton(impl, refuse_prune_tokens(part, x, factor, shift)) or not x.numel():
        return activation.prune_tokens(x, part, factor, shift, variance)
    from s3lab.solvers.kernels.activation_triton import prune_rows

    return prune_rows(x, part.B, part.keep, factor, shift, variance)


def _refuse_tensor(tensor: Tensor, sizes: tuple[int, ...] = (4,)) -> str | None:
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device}, and Triton wants a GPU"
    if tensor.dtype.itemsize not in sizes:
        return f"the work is done in {tensor.dtype}, and the kernel's in float32"
    return None if find_spec("triton") else "Triton is not installed"
