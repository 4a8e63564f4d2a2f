"""How transformers loads and saves packed models: a quantisation method of its registry, called ``s3lab``.

Importing s3lab must not import transformers, and transformers must know the method whichever is imported first.  So the
method is registered at once where transformers' registry is loaded, and as soon as it is loaded where it is not: by a
finder in front of all others that waits for this one module, hands it to whom it belongs, and is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s3lab.errors import DataError
from s3lab.packing.file import VERSION, Header, check_tensors, read_header, read_tensors, seal
from s3lab.packing.linear import BUFFERS, PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "s3lab"
_REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Have transformers know the method, now or as soon as its registry is loaded."""
    if _REGISTRY in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the registry of transformers as the other finders do, with a loader that registers the method after it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._own  # from here on it is a module like any other
        self._own.exec_module(module)
        register()


def register() -> None:
    """Put the method into transformers' registry, once."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config(METHOD)
    class PackedConfig(QuantizationConfigMixin):
        """What config.json says of a packed model: the method, and the version of the layout."""

        def __init__(self, version: int = VERSION, **_: Any) -> None:
            self.quant_method: Any = METHOD
            self.version = version

    @auto.register_quantizer(METHOD)
    class PackedQuantizer(HfQuantizer):
        """Puts packed layers in place of the linear ones before the weights are loaded."""

        @property
        def is_trainable(self) -> bool:
            return False

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(
            self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
        ) -> None:
            if not checkpoint_files:
                raise DataError("a packed model is loaded from its files: give the folder that `s3lab pack` made")
            prepare(model, [Path(file) for file in checkpoint_files])

        def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
            for module in model.modules():
                if isinstance(module, PackedLinear) and not module.values.is_meta:
                    _ = module.rows  # laid out now: an index that names no mask is an error of loading

        def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
            return None, describe(model).write()


def prepare(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """Put a packed layer, still without its bytes, in place of each linear layer that files have packed.

    The files are checked first: DataError where one is not as it was written, or has a layer that the model has not.
    """
    tensors, metadata = read_tensors(files)
    header = read_header(metadata, files[0])
    check_tensors(header, tensors, files[0])
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for told in header.entries:
        leader = None
        for key, name in told["names"].items():
            place = _locate(name, modules, model.base_model_prefix, files[0])
            own = {part: tensors[f"{name}.{part}"] for part in BUFFERS if f"{name}.{part}" in tensors}
            empty = {part: torch.empty_like(t, dtype=_load_dtype(t, model), device="meta") for part, t in own.items()}
            old = modules[place]
            conv1d = not isinstance(old, nn.Linear)
            layer = PackedLinear(told, key, empty, getattr(old, "bias", None), conv1d=conv1d, leader=leader)
            leader = leader or layer
            parent, _, last = place.rpartition(".")
            setattr(modules[parent], last, layer)


def describe(model: PreTrainedModel) -> Header:
    """Return the header of the files that a packed model is saved to."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    entries: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            old = module.told["names"]
            told = entries.setdefault(next(iter(old.values())), {**module.told, "names": dict(old), "transposed": []})
            told["names"][module.key] = name
            told["dtype"] = str(module.dtype).removeprefix("torch.")
            told["transposed"] += [name] if module.transposed else []
    tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return seal(entries.values(), revert_weight_conversion(model, tensors))


def _load_dtype(tensor: Tensor, model: PreTrainedModel) -> torch.dtype:
    """Floating numbers are loaded in the dtype of the model, as those of any layer; integers as they are."""
    return model.dtype if tensor.is_floating_point() else tensor.dtype


def _locate(name: str, modules: dict[str, nn.Module], prefix: str, path: Path) -> str:
    """The name that a layer of a file has in a model, which may be the body of that in the file, or the other way."""
    for place in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if hasattr(modules.get(place), "weight"):
            return place
    raise DataError(f"{path} packs {name} and the model has no such layer: load it by the class that its config names")
