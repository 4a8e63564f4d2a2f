"""The patterns people use, with who proposed each and what runs it."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Who proposed a pattern, which hardware gains by it, and a text of the same idea at a size that can be drawn."""

    source: str
    hardware: str
    small: str = ""


_NONE = "none at 50 %: smaller files only"
_SPARSE = "sparse tensor cores (NVIDIA, from Ampere on)"
_DENSE = "any: what is left is a smaller dense matrix"
_KERNEL = "tensor cores, by block-sparse kernels"

GALLERY: dict[str, Entry] = {
    "50%": Entry("LeCun et al., Optimal Brain Damage, 1989", _NONE),
    "50%/row": Entry("Sun et al., Wanda, 2023", _NONE),
    "1:4": Entry("Zhou et al., N:M from scratch, 2021", "sparse tensor cores, as 2:4 with a zero"),
    "2:4": Entry("Mishra et al., 2021", _SPARSE),
    "4:8": Entry("Zhou et al., N:M from scratch, 2021", "none yet"),
    "8:16": Entry("arXiv 2507.03052", "none yet"),
    "16:32": Entry("arXiv 2509.22166", "none yet"),
    "2:4@1x2": Entry("S³, arXiv 2604.11315", "sparse tensor cores with 4-bit types: 4:8 in pairs"),
    "coupled-2:4": Entry("S³, arXiv 2604.11315", "sparse tensor cores, by the fragment's layout"),
    "block16": Entry("S³, arXiv 2604.11315", "ordinary tensor cores, rows packed in pairs"),
    "mma-m16n8k16": Entry("S³, arXiv 2604.11315", "ordinary tensor cores: 32×16 packs into a 16×16 fragment"),
    "blocks4": Entry("Gray et al., block-sparse kernels, 2017", "CPU vector units, by block-sparse kernels"),
    "blocks16": Entry("Gray et al., block-sparse kernels, 2017", _KERNEL),
    "vectors32": Entry("Chen et al., column vectors, 2021", _KERNEL),
    "vnm-64:2:8": Entry("Castro et al., VENOM, 2023", _SPARSE, "4:8@16x1 then 2:4"),
    "vnm-128:2:16": Entry("Castro et al., VENOM, 2023", _SPARSE, "4:16@32x1 then 2:4"),
    "transposable-2:4": Entry("Hubara et al., 2021", "sparse tensor cores, forward and backward"),
    "transposable-8:16": Entry("TSENOR, 2025", "none yet; forward and backward alike"),
    "patch-2:4": Entry("PATCH, 2025", "dense and sparse tensor cores, tile by tile", "2:4 plus 25%@8x8"),
    "columns": Entry("Li et al., filters, 2017", _DENSE),
    "rows": Entry("Li et al., filters, 2017", _DENSE),
    "heads64": Entry("Michel et al., heads, 2019", _DENSE, "(M,K):(K,1) / (M,8) / (1,K/8) keep 50%"),
    "salient-8:16": Entry("arXiv 2507.03052", "none yet", "8:16 plus 2:32"),
}
