"""Patterns by name: a dictionary of texts, and the reading of names and texts alike."""

from __future__ import annotations

from difflib import get_close_matches

from s3lab.algebra.spec import Spec
from s3lab.errors import SpecError

PATTERNS: dict[str, str] = {
    # S3, Table 1: pairs of inputs; inputs 8 apart, paired by the view; 16 inputs of one of two rows 8 apart
    "pairs-4:8": "2:4@1x2",
    "coupled-2:4": "(M,K/16,8,2):(K,16,1,8) / (1,1,1,2) / (1,1,4,1) keep 2",
    "block16": "(M/16,8,2,K):(16*K,K,8*K,1) / (1,1,1,16) / (1,1,2,1) keep 1",
    # S3, Figure 1: a 32×16 left operand that packs into one dense 16×16 tensor-core fragment
    "mma-m16n8k16": "(M/32,2,2,8,K):(32*K,16*K,8*K,K,1) / (1,1,1,1,16) / (1,1,2,1,1) keep 1",
    "tiles16": "1:2@16x16",
    "unstructured": "50%",
    "rows": "50% rows",
    "columns": "50% columns",
}


def parse(text: str) -> Spec:
    """Return the Spec that a text or the name of a pattern stands for.

    Texts: ``"2:4"`` keeps 2 of 4 consecutive inputs, ``"2:4@1x2"`` 2 of 4 blocks of 1×2, ``"50%"`` half of the whole
    weight, ``"50%/row"``, ``"50% rows"``, ``"50% columns"``, and the full form ``view / block / scope keep budget``.
    N of N:M and a percentage count what is kept.  Raises SpecError with a caret under what cannot be read.

    >>> parse("coupled-2:4")
    Spec('(M,K/16,8,2):(K,16,1,8) / (1,1,1,2) / (1,1,4,1) keep 2')
    >>> parse("2:4@1x2") == parse("pairs-4:8"), str(parse("(M,K):(K,1) / (1,1) / (1,4) keep 2"))
    (True, '2:4')
    """
    if not isinstance(text, str):
        raise SpecError(f"a spec is read from text such as '2:4', not from {text!r}")
    name = text.strip()
    try:
        return Spec.parse(PATTERNS.get(name, name))
    except SpecError as error:
        if close := get_close_matches(name, PATTERNS):
            raise SpecError(f"{error}\n    a pattern of a similar name: {', '.join(close)}") from None
        raise
