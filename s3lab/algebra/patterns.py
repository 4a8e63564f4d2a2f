"""Patterns by name: a dictionary of texts, and the reading of names and texts alike."""

from __future__ import annotations

from difflib import get_close_matches

from s3lab.algebra import text
from s3lab.algebra.compose import Plus, Then
from s3lab.algebra.couple import Coupled, Group, Member
from s3lab.algebra.spec import Block, Pattern, Scope, Spec, View
from s3lab.errors import SpecError

PATTERNS: dict[str, str] = {
    # S3, Table 1: pairs of inputs; inputs 8 apart, paired by the view; 16 inputs of one of two rows 8 apart
    "pairs-4:8": "2:4@1x2",
    "coupled-2:4": "(M,K/16,8,2):(K,16,1,8) / (1,1,1,2) / (1,1,4,1) keep 2",
    "block16": "(M/16,8,2,K):(16*K,K,8*K,1) / (1,1,1,16) / (1,1,2,1) keep 1",
    # S3, Figure 1: a 32×16 left operand that packs into one dense 16×16 tensor-core fragment
    "mma-m16n8k16": "(M/32,2,2,8,K):(32*K,16*K,8*K,K,1) / (1,1,1,1,16) / (1,1,2,1,1) keep 1",
    "unstructured": "50%",
    "tiles16": "1:2@16x16",
    "blocks4": "50%@4x4",
    "blocks16": "50%@16x16",
    "vectors32": "50%@32x1",
    "rows": "50% rows",
    "columns": "50% columns",
    "heads64": "(M,K):(K,1) / (M,64) / (1,K/64) keep 50%",
    # V:N:M: in each tile of V rows, 4 of M columns, and 2 of those 4 in each row
    "vnm-64:2:8": "4:8@64x1 then 2:4",
    "vnm-128:2:16": "4:16@128x1 then 2:4",
    "transposable-2:4": "2:4 each way",
    "transposable-8:16": "8:16 each way",
    "patch-2:4": "2:4 plus 25%@128x128",
    "salient-8:16": "8:16 plus 16:256",
}


def parse(spec: str) -> Pattern:
    """Return the pattern that a text, or the name of one, stands for.

    Texts: ``"2:4"`` keeps 2 of 4 consecutive inputs, ``"2:4@1x2"`` 2 of 4 blocks of 1×2, ``"50%"`` half of the whole
    weight, ``"50%/row"``, ``"50% rows"``, ``"50% columns"``, ``"2:4 each way"`` 2 of 4 along rows and along columns,
    and the full form ``view / block / scope keep budget``.  N of N:M and a percentage count what is kept.  Specs are
    joined by ``then`` (`Then`) and ``plus`` (`Plus`); `Coupled` has the text of several tensors.  Raises SpecError
    with a caret under what cannot be read.

    >>> parse("coupled-2:4")
    Spec('(M,K/16,8,2):(K,16,1,8) / (1,1,1,2) / (1,1,4,1) keep 2')
    >>> parse("2:4@1x2") == parse("pairs-4:8"), str(parse("(M,K):(K,1) / (1,1) / (1,4) keep 2"))
    (True, '2:4')
    >>> parse("8:16 plus 16:256"), parse("up: (1,K) & down: (M,1) keep 50%").names
    (Plus('8:16 plus 16:256'), ('up', 'down'))
    """
    if not isinstance(spec, str):
        raise SpecError(f"a spec is read from text such as '2:4', not from {spec!r}")
    name = spec.strip()
    try:
        return _build(text.read(PATTERNS.get(name, name)))
    except SpecError as error:
        if close := get_close_matches(name, PATTERNS):
            raise SpecError(f"{error}\n    a pattern of a similar name: {', '.join(close)}") from None
        raise


def _build(tree: text.Tree) -> Pattern:
    """Give the parts of a text their meaning."""
    match tree:
        case text.Parts():
            return _build_spec(tree)
        case text.Chain():
            return _build_chain(tree)
        case text.Sum():
            return _build_sum(tree)
        case text.Coupling(groups, keep):
            return Coupled(tuple(Group(tuple(map(_build_member, members)), scope) for members, scope in groups), keep)


def _build_spec(parts: text.Parts) -> Spec:
    scope = Scope(parts.scope, keep=parts.keep, each_way=parts.each_way)
    return Spec(View(parts.shape, parts.stride), Block(parts.block), scope)


def _build_chain(tree: text.Parts | text.Chain) -> Spec | Then:
    if isinstance(tree, text.Parts):
        return _build_spec(tree)
    return Then(_build_spec(tree.first), _build_chain(tree.second))


def _build_sum(tree: text.Parts | text.Chain | text.Sum) -> Spec | Then | Plus:
    if isinstance(tree, text.Sum):
        return Plus(_build_sum(tree.main), _build_spec(tree.salient))
    return _build_chain(tree)


def _build_member(member: text.Member) -> Member:
    view = View(member.shape, member.stride)
    return Member(member.name, Block(member.block), view, member.order, follows=member.follows)
