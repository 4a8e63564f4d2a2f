"""The structure of a causal language model, read off the model itself: its decoder layers, the matrices in them, and
the order in which the inputs of those matrices become available."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only

from s3lab.errors import DataError

# Where the input and the weight stand among the arguments of a product.
_PRODUCTS: dict[Callable, tuple[int, int]] = {
    functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a model, (outputs, inputs) whatever way round, and on its own or stacked, its module keeps it.

    >>> list(find_matrices(nn.Sequential(nn.Linear(2, 3)), "body").values())[0].weight.shape
    torch.Size([3, 2])
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight (M, K), a view: what is copied into it changes the model."""
        W = getattr(self.module, self.parameter).detach()
        W = W if self.expert is None else W[self.expert]
        return W.T if self.transposed else W


@dataclass(frozen=True, eq=False)
class Decoder:
    """The repeated layers of a model, the dotted name of their list, and the matrices of each layer by full name."""

    name: str
    layers: tuple[nn.Module, ...]
    matrices: tuple[dict[str, Matrix], ...]


@dataclass(frozen=True, eq=False)
class Stage:
    """Matrices whose inputs hang on no other of them, in groups that share one input tensor.

    ``once`` says that a forward pass takes all tokens through each of them, in one product.
    """

    groups: tuple[tuple[Matrix, ...], ...]
    once: bool


@dataclass(frozen=True, eq=False)
class Course:
    """The way through a layer: its stages, and which products lead straight to which.

    ``sources`` has for each matrix the names of those whose outputs its input is computed from with no other product
    between, and under `OUTPUT` those of the layer's output.
    """

    stages: tuple[Stage, ...]
    sources: Mapping[str, frozenset[str]]


OUTPUT = ""


def find_matrices(root: nn.Module, name: str = "") -> dict[str, Matrix]:
    """Return the matrices inside a module by dotted name: linear layers, Conv1D layers, and experts one by one.

    Experts kept in one parameter (experts, ·, ·) are called ``<parameter>.<number>``.
    """
    return {matrix.name: matrix for matrix in _walk(root, name)}


def _walk(root: nn.Module, prefix: str) -> Iterator[Matrix]:
    from transformers.pytorch_utils import Conv1D

    for path, module in root.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear | Conv1D):
            yield Matrix(path, module, transposed=isinstance(module, Conv1D))
        elif isinstance(transposed := getattr(module, "is_transposed", None), bool):
            for name, stack in module.named_parameters(recurse=False):
                for expert in range(len(stack)) if stack.ndim == 3 else ():
                    yield Matrix(f"{path}.{name}.{expert}", module, name, expert, transposed)


def find_decoder(model: nn.Module) -> Decoder:
    """Return the decoder layers of a model: the module list that holds most of its matrices' weights.

    Raises DataError if there is no list of layers with matrices.

    >>> body = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "head": nn.Linear(4, 9)})
    >>> find_decoder(body).name, [list(matrices) for matrices in find_decoder(body).matrices]
    ('layers', [['layers.0'], ['layers.1']])
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    sizes = {name: sum(m.weight.numel() for m in _walk(part, name)) for name, part in lists.items()}
    if not any(sizes.values()):
        raise DataError(
            f"{type(model).__name__} has no list of repeated layers with linear layers in them: give a causal language "
            "model"
        )
    name = max(sizes, key=lambda name: (sizes[name], name.count(".")))
    layers = tuple(lists[name])
    return Decoder(name, layers, tuple(find_matrices(layer, f"{name}.{i}") for i, layer in enumerate(layers)))


class Products(TorchFunctionMode):
    """While active, asks ``take(matrix, input, multiply)`` for the result of every product with one of the matrices.

    ``multiply`` takes that product with any input of the same shape.
    """

    def __init__(
        self, matrices: Mapping[str, Matrix], take: Callable[[Matrix, Tensor, Callable[[Tensor], Tensor]], Tensor]
    ) -> None:
        super().__init__()
        self._at = {matrix.weight.data_ptr(): matrix for matrix in matrices.values()}
        self._take = take

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        places = _PRODUCTS.get(func)
        if places and len(args) > places[1] and (matrix := self._at.get(args[places[1]].data_ptr())):
            at = places[0]
            return self._take(matrix, args[at], lambda x: self.call(func, (*args[:at], x, *args[at + 1 :]), kwargs))
        return self.call(func, args, kwargs)

    def call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return what a function of torch gives."""
        return func(*args, **kwargs)


class Watch(Products):
    """While active, tells ``see(matrix, input, output)`` of every product with one of the matrices."""

    def __init__(self, matrices: Mapping[str, Matrix], see: Callable[[Matrix, Tensor, Tensor], None]) -> None:
        def take(matrix: Matrix, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
            out = multiply(x)
            see(matrix, x, out)
            return out

        super().__init__(matrices, take)


class Shapes(Products):
    """Products of which some are not taken: what is computed from those is a shape alone, on torch's meta device."""

    def call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return what a function of torch gives, or the shape of that where one of its arguments is no more."""
        if tree_any(is_shape, (args, kwargs)):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def is_shape(leaf: object) -> bool:
    """Return whether something is a tensor that has a shape and no values."""
    return isinstance(leaf, Tensor) and leaf.is_meta


def find_course(matrices: Mapping[str, Matrix], forward: Callable[[], object], tokens: int) -> Course:
    """Return the way through a layer, as one ``forward`` pass over ``tokens`` tokens shows it.

    Inputs are shared where they are the same tensor.  A matrix stands one stage after the last of its sources, by the
    graph that autograd lays, of which no activation is kept; the input of the layer must require a gradient.  Experts
    that saw no token stand beside the others of their parameter; what else was not met comes last.

    >>> first, second, head = (Matrix(name, nn.Linear(2, 2)) for name in ("first", "second", "head"))
    >>> x = torch.ones(3, 2, requires_grad=True)
    >>> course = find_course(
    ...     {m.name: m for m in (first, second, head)},
    ...     lambda: head.module(first.module(x) * second.module(x)),
    ...     tokens=3,
    ... )
    >>> [[[m.name for m in group] for group in stage.groups] for stage in course.stages]
    [[['first', 'second']], [['head']]]
    >>> sorted(course.sources["head"]), course.sources[OUTPUT]
    (['first', 'second'], frozenset({'head'}))
    """
    level_of: dict[str, int] = {}
    name_of: dict[Any, str] = {}  # of the node that autograd lays for a product
    sources: dict[str, frozenset[str]] = {}
    met: list[tuple[int, Matrix, Tensor, tuple]] = []

    def see(matrix: Matrix, x: Tensor, out: Tensor) -> None:
        if x.numel():
            found = _find_sources(x.grad_fn, name_of)
            level = 1 + max((level_of[name] for name in found), default=0)
            name_of[out.grad_fn] = matrix.name
            level_of[matrix.name] = max(level, level_of.get(matrix.name, 0))
            sources[matrix.name] = found | sources.get(matrix.name, frozenset())
            # the tensor is kept, so that its place in memory is nobody else's until all are compared
            met.append((level, matrix, x, (x.data_ptr(), x.shape, x.stride(), x._version)))

    dropped = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
    with torch.enable_grad(), dropped, Watch(matrices, see):
        out = forward()
    out = out[0] if isinstance(out, tuple) else out
    sources[OUTPUT] = _find_sources(getattr(out, "grad_fn", None), name_of)

    stages = []
    for _, entries in groupby(sorted(met, key=lambda entry: entry[0]), key=lambda entry: entry[0]):
        groups: dict[tuple, dict[str, Matrix]] = {}
        once = True
        for _, matrix, x, identity in entries:
            again = any(matrix.name in group for group in groups.values())
            once &= not again and x.numel() == tokens * x.shape[-1]
            if not again:
                groups.setdefault(identity, {})[matrix.name] = matrix
        shared = [tuple(group.values()) for group in groups.values()]
        stages.append(Stage((*shared, *_idle_siblings(matrices, shared)), once))
    placed = [matrix for stage in stages for group in stage.groups for matrix in group]
    if unmet := tuple((matrix,) for matrix in matrices.values() if matrix not in placed):
        stages.append(Stage(unmet, once=False))
    return Course(tuple(stages), sources)


def _idle_siblings(matrices: Mapping[str, Matrix], groups: list[tuple[Matrix, ...]]) -> list[tuple[Matrix]]:
    seen = [matrix for group in groups for matrix in group]
    stacks = {(id(m.module), m.parameter) for m in seen if m.expert is not None}
    return [(m,) for m in matrices.values() if m not in seen and (id(m.module), m.parameter) in stacks]


def _find_sources(node: Any, name_of: Mapping[Any, str]) -> frozenset[str]:
    """The products that a node of autograd's graph was computed from, with no other product between."""
    seen, stack, found = set(), [node], set()
    while stack:
        node = stack.pop()
        if node in name_of:
            found.add(name_of[node])
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return frozenset(found)
