"""Names for tensors with their shapes, enforced where jaxtyping is installed and plain `torch.Tensor` elsewhere."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING or find_spec("jaxtyping"):
    from jaxtyping import Bool, Float, Integer
else:

    class _Plain:
        def __class_getitem__(cls, item):
            return item[0]

    Bool = Float = Integer = _Plain

__all__ = ["Bool", "Float", "Integer"]
