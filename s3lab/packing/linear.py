"""A linear layer that holds its weight packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from s3lab.algebra.patterns import parse
from s3lab.packing import decode, gpu
from s3lab.packing.codec import Packed
from s3lab.packing.file import Entry
from s3lab.packing.rows import Rows
from s3lab.packing.values import Values
from s3lab.tensors.wraps import Wraps

BUFFERS = "values", "scales", "index", *Wraps._fields
_TILE = 1 << 25  # weights that are unpacked at a time


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, or y = x W + b of a Conv1D layer, with W packed: ``told`` is what `file.Entry` says of it.

    The buffers are those of a file, so that the state of a model is what is stored: ``values``, ``scales`` if they are
    rounded, ``index``, and ``left`` and ``right`` around a core: then W = A S B, and S is what is packed.  In a
    coupling the first matrix has the index, and the others have its layer as ``leader``. The weight is laid out to run
    (`rows.Rows`) when it is first needed, and unpacked for each product by tiles of rows, just as it was.  Buffers may
    come later, as on the meta device.

    >>> from s3lab.packing.codec import pack
    >>> W = torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 4]])
    >>> layer = PackedLinear.of(Entry(pack(W, "2:4"), {"": "up_proj"}), "")
    >>> layer(torch.ones(1, 4)), torch.equal(layer.weight, W)
    (tensor([[3., 7.]]), True)
    >>> layer
    PackedLinear(in_features=4, out_features=2, bias=False, 2:4, 17 bits a weight,
        unpacked for each product (K = 4 is no multiple of 32))
    """

    values: Tensor
    scales: Tensor | None
    index: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        told: Mapping[str, Any],
        key: str,
        buffers: Mapping[str, Tensor],
        bias: nn.Parameter | None = None,
        *,
        conv1d: bool = False,
        leader: PackedLinear | None = None,
    ) -> None:
        super().__init__()
        self.told, self.key, self.conv1d = dict(told), key, conv1d
        self.out_features, self.in_features = told["shapes"][key]
        self.transposed = told["names"][key] in told["transposed"]
        if conv1d != self.transposed:
            self.out_features, self.in_features = self.in_features, self.out_features
        self.bias = bias
        self._leader = [leader] if leader else []  # in a list: it is no part of this layer
        self._rows: Rows | None = None
        self._form: gpu.Form | None = None
        for name in BUFFERS:
            self.register_buffer(name, buffers.get(name))

    @classmethod
    def of(
        cls, entry: Entry, key: str, bias: nn.Parameter | None = None, leader: PackedLinear | None = None
    ) -> PackedLinear:
        """Return the layer of one matrix of an entry."""
        values = entry.packed.values[key]
        own = {"values": values.data, "scales": values.scales, "index": None if leader else entry.packed.index}
        own |= {} if entry.wraps is None else entry.wraps._asdict()
        found = {name: tensor for name, tensor in own.items() if tensor is not None}
        return cls(entry.describe(), key, found, bias, leader=leader)

    @property
    def stored(self) -> Values:
        """The values as they are stored."""
        kind, scales = self.told["values"], self.scales
        dtype = self.values.dtype if scales is None else scales.dtype
        return Values(kind, dtype, int(self.told["kept"][self.key]), self.values, scales, int(self.told["group"]))

    @property
    def rows(self) -> Rows:
        """The weight laid out to run; DataError where the bytes are of no such weight."""
        if self._rows is None:
            index = (self._leader[0] if self._leader else self).index
            assert index is not None
            shapes = {key: (shape[0], shape[1]) for key, shape in self.told["shapes"].items()}
            packed = Packed(parse(self.told["spec"]), shapes, {self.key: self.stored}, index.cpu())
            self._rows = Rows.of(packed.places[self.key], self.stored)
            self._form = gpu.find_form(packed) if gpu.is_gpu(self.values.device) else None
        return self._rows

    @property
    def wraps(self) -> Wraps | None:
        """What surrounds the core, None where the weight is the core."""
        return None if self.left is None or self.right is None else Wraps(self.left, self.right)

    @property
    def laid_out(self) -> tuple[Rows, gpu.Form | None]:
        """The weight as it is held to run, beside the buffers: by rows, and as a GPU's tensor cores take it."""
        return self.rows, self._form

    @property
    def weight(self) -> Tensor:
        """The dense weight as the layer had it, unpacked: what is written into it changes nothing."""
        W = self.rows.unpack(0, self.rows.shape[0])
        W = W if self.wraps is None else self.wraps.around(W)
        return W.T if self.transposed else W

    @property
    def bits_per_weight(self) -> float:
        """Bits of the buffers by weight; what a coupling shares is counted where it is."""
        return 8 * sum(buffer.nbytes for buffer in self.buffers()) / (self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, M) of x (…, K).

        Of a sequence of several tokens, and where gradients are asked for, y has the very bits of the dense layer.
        """
        if (y := self._decode(x)) is not None:
            return y
        if self.conv1d:  # as Conv1D multiplies, so that not a bit differs; it always has a bias
            assert self.bias is not None
            flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
            return flat.view(*x.shape[:-1], self.out_features)
        rows, step = self.rows.shape[0], max(1, _TILE // self.in_features)
        if self.transposed or rows <= step or self.wraps is not None:
            return linear(x, self.weight, self.bias)
        parts = [linear(x, self.rows.unpack(first, min(rows, first + step))) for first in range(0, rows, step)]
        y = torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.told['spec']}, {self.bits_per_weight:.4g} bits a weight, {self.path}"
        )

    @property
    def path(self) -> str:
        """How a product is computed."""
        if self.values.is_meta:
            return "without its bytes"
        if self.conv1d or self.transposed:
            return "unpacked for each product"
        rows = self.rows
        told = gpu.tell(rows, self._form) if gpu.is_gpu(self.values.device) else decode.tell(rows)
        return told if self.wraps is None else f"{told}, between blocks of {self.wraps.block}"

    def _decode(self, x: Tensor) -> Tensor | None:
        """y for a few tokens that follow no other in x, where that is faster than to unpack."""
        tokens = x.shape[:-1].numel()
        alone = x.ndim < 3 or x.shape[-2] == 1
        few = gpu.BATCH if gpu.is_gpu(x.device) else decode.TOKENS
        if not (0 < tokens <= few and alone) or self.conv1d or self.transposed or x.dtype != self.stored.dtype:
            return None
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        rows, flat, wraps = self.rows, x.reshape(tokens, -1), self.wraps
        flat = flat if wraps is None else wraps.before(flat)
        y = gpu.multiply(rows, self._form, flat) if gpu.is_gpu(x.device) else decode.multiply(rows, flat)
        if y is None:
            return None
        y = y if wraps is None else wraps.after(y.to(x.dtype))
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, *args: Any, **options: Any) -> PackedLinear:
        self._rows = self._form = None  # they are on the old device, in the old dtype
        return super()._apply(*args, **options)
