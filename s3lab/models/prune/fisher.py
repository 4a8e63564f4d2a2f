"""How much the loss of a language model hangs on each output of a matrix, and on what it makes of each token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s3lab.errors import DataError
from s3lab.models.prune.chunks import Chunk
from s3lab.models.structure.decoder import Decoder, Matrix, Watch
from s3lab.models.text.reference import next_token_loss
from s3lab.tensors.processes import SOLO, ProcessGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fisher:
    """Squares of the gradients g_t = ∂L/∂y_t of the loss by the outputs y_t = W x_t of matrices, by their names.

    ``outputs`` (M,), float64, are the means of g_t² over the calibration tokens, the diagonal of G; ``tokens`` has for
    each chunk, by its number, ‖g_t‖² of each of its tokens, with a mean of 1 over the calibration.
    """

    outputs: Mapping[str, Tensor]
    tokens: Mapping[str, Mapping[int, Tensor]]

    def weigh(self, matrix: Matrix, x: Tensor, chunk: Chunk) -> Tensor:
        """Return the inputs (tokens, K) that a matrix has of a chunk times the roots of their tokens' weights.

        Raises DataError for a matrix that was not given all tokens at once, or on which the loss does not hang.
        """
        if matrix.name not in self.tokens:
            raise DataError("the loss does not hang on every token of this matrix: leave it dense, or hessian='inputs'")
        roots = self.tokens[matrix.name][chunk.number].to(x.device).sqrt().unsqueeze(1)
        return x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32)) * roots


def measure_fisher(
    model: PreTrainedModel, decoder: Decoder, chunks: Sequence[Chunk], processes: ProcessGroup = SOLO
) -> Fisher:
    """Return the `Fisher` of a model's matrices over chunks, those that are held out apart from ``outputs``.

    L is the sum of the losses of the next tokens in a sequence.  To second order, with the empirical Fisher matrix for
    the Hessian, errors Δ of W cost ½ Σ_t (g_tᵀ Δ x_t)².  With G and H apart for each row m,

        Σ_t g_tm² x_t x_tᵀ ≈ G_mm H,   G_mm = mean of g_tm²,   H = Σ_t ‖g_t‖² x_t x_tᵀ / Σ_t ‖g_t‖²,

    which is exact in the sum over rows, and where the rows' squares rise and fall together.

    The chunks are those of this process, of which ``processes`` hold all.  One sequence at a time goes forward and back
    through the whole model, where it lies; of the gradients only these sums stay: M + T numbers a matrix.  Raises
    DataError for gradients that are not finite.

    Source: Martens and Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, 2015,
    section 3, with the gradients of the text's own tokens for those of drawn ones, as in Kurtic et al., *The Optimal
    BERT Surgeon*, 2022; inputs weighted by gradients, by groups of outputs, Kim et al., *GuidedQuant*, 2025.
    """
    matrices = {name: matrix for found in decoder.matrices for name, matrix in found.items()}
    device = next(model.parameters()).device
    outputs = {n: torch.zeros(len(m.weight), dtype=torch.float64, device=device) for n, m in matrices.items()}
    tokens: dict[str, dict[int, Tensor]] = {name: {} for name in matrices}
    for chunk in chunks:
        norms: dict[str, list[Tensor]] = {name: [] for name in matrices}
        sums = _backward(model, matrices, chunk.ids.to(device), norms)
        for name, found in norms.items():
            if len(found) == len(chunk.ids) and sum(map(len, found)) == chunk.ids.numel():
                tokens[name][chunk.number] = torch.cat(found)
            if not chunk.held_out:
                outputs[name] += sums[name]
    total = processes.total(sum(chunk.ids.numel() for chunk in chunks if not chunk.held_out))
    for name in matrices:
        missing = processes.max(float(len(tokens[name]) < len(chunks)))
        outputs[name] = processes.sum(outputs[name]) / total
        energy = float(outputs[name].sum())  # the mean of ‖g_t‖²
        if not energy < torch.inf:
            raise DataError(
                f"{name}: the gradients of the loss leave the range of {matrices[name].weight.dtype}: load the model "
                "in float32"
            )
        if missing or not energy:
            del outputs[name], tokens[name]
        else:
            tokens[name] = {number: norms / energy for number, norms in tokens[name].items()}
    return Fisher(outputs, tokens)


def _backward(
    model: PreTrainedModel, matrices: Mapping[str, Matrix], ids: Tensor, norms: Mapping[str, list[Tensor]]
) -> dict[str, Tensor]:
    """Return Σ_t g_t² of each matrix over sequences, and append ‖g_t‖² to its ``norms``, a tensor for each product."""
    sums = {}

    def see(matrix: Matrix, x: Tensor, out: Tensor) -> None:
        def hear(gradient: Tensor) -> None:
            squares = gradient.flatten(0, -2).double().square()
            norms[matrix.name].append(squares.sum(1).float())
            sums[matrix.name] = sums.get(matrix.name, 0) + squares.sum(0)

        out.register_hook(hear)

    embed = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        with torch.enable_grad(), requiring(model, ()):
            for row in ids.split(1):
                with Watch(matrices, see):
                    loss = next_token_loss(model, row, "sum")
                loss.backward()
    finally:
        embed.remove()
    return sums


@contextmanager
def requiring(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Have autograd ask for the gradients of these parameters of a model, and of no others."""
    wanted, asked = {p: p.requires_grad for p in model.parameters()}, set(parameters)
    try:
        for p in wanted:
            p.requires_grad_(p in asked)
        yield
    finally:
        for p, before in wanted.items():
            p.requires_grad_(before)
