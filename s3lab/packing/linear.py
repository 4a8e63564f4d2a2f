"""A linear layer that holds its weight packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
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
_Product = Callable[[Tensor], Tensor | None]


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, or y = x W + b of a Conv1D layer, with W packed: ``told`` is what `file.Entry` says of it.

    The buffers are those of a file, so that the state of a model is what is stored: ``values``, ``scales`` if they are
    rounded, ``index``, and ``left`` and ``right`` around a core: then W = A S B, and S is what is packed.  In a
    coupling the first matrix has the index, and the others have its layer as ``leader``. The weight is laid out to run
    (`rows.Rows`) when it is first needed, and unpacked for each product by tiles of rows, just as it was.  ``values``
    that are not rounded are then in the order of rows, so that nothing is held twice; ``state_dict`` has them in that
    of a file again.  Buffers may come later, as on the meta device.

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
        self._few: tuple[_Product | None, int] = None, 0  # what multiplies few tokens, and how many at most
        self._reordered = False  # `values` are in the order of rows, not in that of a file
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
    def dtype(self) -> torch.dtype:
        """What the values stand for."""
        return (self.values if self.scales is None else self.scales).dtype

    @property
    def stored(self) -> Values:
        """The values as they are stored."""
        values = self.values
        if self._reordered:
            assert self._rows is not None
            values = self._pack().places[self.key].gather(self._rows.unpack(0, self._rows.shape[0]).cpu()).to(values)
        count, group = int(self.told["kept"][self.key]), int(self.told["group"])
        return Values(self.told["values"], self.dtype, count, values, self.scales, group)

    @property
    def rows(self) -> Rows:
        """The weight laid out to run; DataError where the bytes are of no such weight."""
        if self._rows is None:
            stored, packed = self.stored, self._pack()
            rows = Rows.of(packed.places[self.key], stored)
            if gpu.is_gpu(self.values.device):
                self._form = gpu.find_form(replace(packed, values={self.key: stored}))
            self._few, self._rows = self._find_product(rows), rows
            if rows.values is not stored and stored.kind == "same":
                self.values, self._reordered = rows.values.data, True
        return self._rows

    def _pack(self) -> Packed:
        """The index with its pattern, without values."""
        index = (self._leader[0] if self._leader else self).index
        assert index is not None
        shapes = {key: (shape[0], shape[1]) for key, shape in self.told["shapes"].items()}
        return Packed(parse(self.told["spec"]), shapes, {}, index.cpu())

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
        if self._rows is None:
            _ = self.rows
        product, most = self._few
        tokens = x.numel() // self.in_features
        alone = x.ndim < 3 or x.shape[-2] == 1
        if product is None or not (0 < tokens <= most and alone) or x.dtype != self.dtype:
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        if (y := product(x.reshape(tokens, -1))) is None:
            return None
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _find_product(self, rows: Rows) -> tuple[_Product | None, int]:
        """What multiplies a few tokens by the weight, None where it is unpacked, and how many tokens at most."""
        if self.conv1d or self.transposed:
            return None, 0
        on_gpu = gpu.is_gpu(self.values.device)
        product = partial(gpu.multiply, rows, self._form) if on_gpu else decode.find_product(rows)
        if product is not None and self.wraps is not None:
            product = partial(_multiply_between, self.wraps, product)
        return product, gpu.BATCH if on_gpu else decode.TOKENS

    def _forget(self) -> None:
        """Take the buffers as a file has them."""
        if self._reordered:
            self.values = self.stored.data
        self._rows = self._form = None
        self._few, self._reordered = (None, 0), False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}values"] = self.stored.data

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **options)

    def _apply(self, *args: Any, **options: Any) -> PackedLinear:
        self._forget()  # what is laid out is on the old device, in the old dtype
        return super()._apply(*args, **options)


def _multiply_between(wraps: Wraps, product: _Product, x: Tensor) -> Tensor | None:
    """Products with a core between its wraps."""
    y = product(wraps.before(x))
    return None if y is None else wraps.after(y.to(x.dtype))
