"""The reference implementation of S3 as a black box: where it supports a spec, and nothing ties, we agree with it."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s3lab as s3
from s3lab.tensors.proximal import block_norms, hard_threshold, kth_norm, soft_threshold

sparsekit = pytest.importorskip("sparsekit", reason="sparsekit is not installed: nothing to compare with")

VIEWS = [
    (("M", "K"), ("K", 1)),
    (("K", "M"), (1, "K")),
    (("M", "K/4", 4), ("K", 4, 1)),
    (("M", "K/4", 2, 2), ("K", 4, 1, 2)),
    (("M/4", 2, 2, "K"), ("4*K", "K", "2*K", 1)),
]


def divisors(number):
    return st.sampled_from([n for n in range(1, number + 1) if number % n == 0])


def normal(shapes, seed):
    """Weights whose norms never tie, and metrics from 0.1 to 10, by name."""
    draw = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return weights, {name: 10 ** (2 * torch.rand(shape, generator=draw) - 1) for name, shape in shapes.items()}


class Peer:
    """SparseKit's scope over parameters of its own, and its answers in the layout of the weights."""

    def __init__(self, weights, layouts, blocks, build):
        self.layouts = layouts
        self.parameters = {name: torch.nn.Parameter(W.clone()) for name, W in weights.items()}
        seen = {name: sparsekit.View(p, *layouts[name]) for name, p in self.parameters.items()}
        self.specs = {name: sparsekit.BlockSpec(view, blocks[name]) for name, view in seen.items()}
        self.scope = build(self.specs)

    def levels(self, values):
        return values.view(self.scope.grid_shape)

    def kth_largest(self, k):
        by_position = (k, None) if isinstance(self.scope, sparsekit.ScopeCoupling) else (None, k)
        return self.scope.kth_largest(*by_position).flatten()

    def hard(self, **budget):
        self.scope.hard_threshold(**budget)
        return self.weights

    def soft(self, levels, metrics=None):
        if metrics is not None:
            metrics = {self.specs[name]: h.as_strided(*self.layouts[name]) for name, h in metrics.items()}
        self.scope.soft_threshold(levels, conditioners=metrics, max_iter=100)
        return self.weights

    def masks(self, keep):
        found = self.scope.get_masks(nnz=keep)
        masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in self.parameters.items()}
        for name, mask in masks.items():
            mask.as_strided(*self.layouts[name]).copy_(found[self.specs[name]])
        return masks

    @property
    def weights(self):
        return {name: p.detach() for name, p in self.parameters.items()}


@st.composite
def one_tensor(draw):
    """A bound spec, how SparseKit builds it, and whether its `get_masks` supports it."""
    shape = draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 8, 12]))
    view = s3.View(*draw(st.sampled_from(VIEWS)))
    layout = view.on(*shape)
    block = tuple(draw(divisors(n)) for n in layout.shape)
    scope = tuple(draw(divisors(n // b)) for n, b in zip(layout.shape, block, strict=True))
    spec = s3.Spec(view, s3.Block(block), s3.Scope(scope, keep=draw(st.integers(1, prod(scope)))))

    def build(weights):
        layouts = {"": (layout.shape, layout.stride)}
        return Peer(weights, layouts, {"": block}, lambda specs: sparsekit.ScopeSpec(specs[""], scope))

    return spec.bind(shape), {"": shape}, build, prod(scope[:-1]) == 1


@st.composite
def coupled(draw):
    """One or two groups of one or two tensors, the second of a group maybe turned, on a shared budget."""
    scopes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shapes, blocks, groups, plan = {}, {}, [], []
    for _ in range(draw(st.integers(1, 2))):
        scope = draw(st.integers(1, 2)), draw(st.integers(2, 3))
        grid = scopes[0] * scope[0], scopes[1] * scope[1]
        orders = {}
        for turned in (False, *draw(st.sampled_from([(), (False,), (True,)]))):
            name = f"w{len(shapes)}"
            blocks[name] = draw(st.integers(1, 3)), draw(st.integers(1, 3))
            rows, columns = grid[::-1] if turned else grid
            shapes[name] = rows * blocks[name][0], columns * blocks[name][1]
            orders[name] = (1, 0) if turned else (0, 1)
        members = tuple(s3.Member(name, s3.Block(blocks[name]), order=order) for name, order in orders.items())
        groups.append(s3.Group(members, scope))
        plan.append((scope, orders))
    most = sum(prod(scope) for scope, _ in plan)
    bound = s3.Coupled(tuple(groups), draw(st.integers(1, most))).bind(shapes)

    def build(weights):
        def couple(specs):
            nodes = []
            for scope, orders in plan:
                node = sparsekit.BlockCoupling([specs[name] for name in orders], list(orders.values()))
                nodes.append(sparsekit.ScopeSpec(node, scope))
            return nodes[0] if len(nodes) == 1 else sparsekit.ScopeCoupling(nodes, [(0, 1)] * len(nodes))

        return Peer(weights, {name: (s, (s[1], 1)) for name, s in shapes.items()}, blocks, couple)

    return bound, shapes, build, len(plan) == 1 and plan[0][0][0] == 1


def check_agreement(bound, shapes, build, has_masks, seed, share):
    """Compare masks, thresholds by budget and by level, and proximal steps without and with a metric."""
    weights, metrics = normal(shapes, seed)
    squares = {name: W**2 for name, W in weights.items()}
    one = list(shapes) == [""]
    W, h, scores = (named[""] if one else named for named in (weights, metrics, squares))

    def same(ours, theirs, **tolerance):
        for name in shapes:
            torch.testing.assert_close(ours if one else ours[name], theirs[name], **tolerance)

    kept = build(weights).hard(nnz=bound.keep)
    same(bound.project(scores), {name: w != 0 for name, w in kept.items()})
    same(hard_threshold(W, bound, kth_norm(W, bound)[:, None]), kept)
    if has_masks:
        same(bound.project(scores), build(weights).masks(bound.keep))
    for k in range(1, bound.B + 1):
        torch.testing.assert_close(kth_norm(W, bound, k), build(weights).kth_largest(k))

    level = share * block_norms(W, bound).amax(1)
    same(hard_threshold(W, bound, level[:, None]), build(weights).hard(thresholds=build(weights).levels(level)))
    for metric in (None, metrics):
        theirs = build(weights).soft(build(weights).levels(level), metric)
        same(soft_threshold(W, bound, level[:, None], metric and h), theirs, rtol=1e-4, atol=1e-5)


seeds, shares = st.integers(0, 9999), st.sampled_from([0.1, 0.3, 0.6, 0.9, 1.2])


@settings(max_examples=200)
@given(one_tensor(), seeds, shares)
def test_one_tensor(case, seed, share):
    check_agreement(*case, seed, share)


@settings(max_examples=100)
@given(coupled(), seeds, shares)
def test_coupled_tensors(case, seed, share):
    check_agreement(*case, seed, share)
