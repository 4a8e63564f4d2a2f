"""Which blocks a pruned weight keeps, found from its zeros with the budget of the pattern in mind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.choose import keep_highest
from s3lab.algebra.compose import Nested, Salient
from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.lines import choose_lines
from s3lab.algebra.partition import Partition
from s3lab.algebra.stage import Stage
from s3lab.errors import SpecError

LIVE = 2  # a weight that is not zero; 1 is a zero with a sign, which stays before other zeros
_TURNS = 16


@dataclass(frozen=True, eq=False)
class Round:
    """What a round decides: which ``keep`` (S,) of B blocks stay, in each of S scopes, of those ``present`` (S, B).

    ``blocks`` makes (S, B, E), zero where there is nothing, of a weight (M, K), of a coupling of the weights by name.
    """

    text: str
    shape: tuple[int, int]
    keep: Tensor
    present: Tensor | None
    lines: int | None
    blocks: Callable[[Any], Tensor]

    @classmethod
    def of(cls, part: Partition | CoupledPartition) -> Round:
        """Return the one round of a pattern that is decided at once."""
        lines = part.lines if isinstance(part, Partition) else None
        keep = torch.full((part.S,), part.keep)
        return cls(part.text, (part.S, part.B), keep, None, lines, part.blocks)

    @classmethod
    def at(cls, stage: Stage) -> Round:
        """Return the round that a stage of a composed pattern is."""
        keep = stage.present.sum(1) - stage.goes
        present = None if bool(stage.present.all()) else stage.present
        return cls(stage.text, (stage.S, stage.B), keep, present, stage.lines, stage.blocks)


def grade(W: Tensor) -> Tensor:
    """Return how much each weight asks to be kept, uint8: `LIVE`, 1 for a zero with a sign, 0 for a plain zero."""
    return (W != 0).to(torch.uint8) * LIVE + ((W == 0) & W.signbit()).to(torch.uint8)


def find_kept(found: Round, grades: Any) -> Tensor:
    """Return the blocks that a round keeps, bool (S, B), by the grades of the weights (M, K), or of several by name.

    All blocks with a weight that is not zero, and where those are too few the first of the others.  With lines, whole
    squares, whatever is present.  Raises SpecError, naming the first scope, where there are too many.
    """
    worth = found.blocks(grades).amax(-1)
    live, most = worth == LIVE, found.keep
    count = live.sum(1)
    if found.lines is not None:
        return _find_squares(found, worth)
    if (over := count > most).any():
        scope = int(over.long().argmax())
        raise SpecError(
            f"the weight breaks {found.text} at scope {scope}: {int(count[scope])} of its {found.shape[1]} blocks are "
            f"not zero, and {int(most[scope])} are kept: prune it by this pattern first"
        )
    if bool((count == most).all()):
        return live
    scores = worth.float()
    if found.present is not None:
        scores = scores.masked_fill(~found.present, -1)
    return keep_highest(scores, int(most[0]) if bool((most == most[0]).all()) else most)


def _find_squares(found: Round, worth: Tensor) -> Tensor:
    lines, side = found.lines or 0, isqrt(found.shape[1])
    kept = worth == LIVE
    square = kept.view(-1, side, side)
    uneven = ((square.sum(1) != lines) | (square.sum(2) != lines)).any(1)
    if uneven.any():
        scores = kept[uneven].float() * (2 * side * side) + worth[uneven]
        chosen = choose_lines(scores, lines)
        if (lost := (kept[uneven] & ~chosen).any(1)).any():
            scope = int(uneven.nonzero()[int(lost.long().argmax())])
            raise SpecError(
                f"the weight breaks {found.text} at scope {scope}: no {lines} blocks of each row and column of its "
                f"{side}×{side} hold all that are not zero: prune it by this pattern first"
            )
        kept[uneven] = chosen
    return kept


def settle(bound: Salient, grades: Tensor) -> Salient:
    """Return a pattern with its salient blocks decided, so that what else is not zero fits the main part.

    Which blocks those are, a weight does not tell.  Blocks are drawn by what of them is too much for the main part, and
    again by what then still is, until nothing is.  Raises SpecError where that finds none.
    """
    live = grades == LIVE
    worth = live.double() / (2 * live.numel())
    for _ in range(_TURNS):
        fixed, rest = _draw(bound, worth, live)
        excess = _find_excess(fixed, rest)
        if not excess.any():
            return fixed
        worth = worth + excess
    raise SpecError(
        f"the weight breaks {bound.text} on {bound.shape}: no choice of salient blocks was found that leaves a weight "
        "of the main pattern: prune it by this pattern first"
    )


def _draw(bound: Salient, worth: Tensor, rest: Tensor) -> tuple[Salient, Tensor]:
    """The pattern with the salient blocks of the highest worth, and what lives beside them."""
    chosen = bound.salient.project(worth)
    rest = rest & ~chosen
    main = bound.main
    if isinstance(main, Salient):
        main, rest = _draw(main, worth.where(rest, 0), rest)
    return replace(bound, main=main, chosen=chosen), rest


def _find_excess(bound: Salient, rest: Tensor) -> Tensor:
    """Which of the live weights ``rest`` (M, K) are in blocks for which the main part has no room."""
    excess = torch.zeros_like(rest)

    def decide(stage: Stage) -> Tensor:
        number = stage.blocks(rest).sum(-1)
        kept = stage.choose(number.double())
        lost = stage.offsets[(number > 0) & ~kept]
        excess.view(-1)[lost[lost >= 0]] = True
        return kept

    bound.resolve(decide, rest.float())
    return excess & rest


def salient_parts(bound: Salient) -> list[Salient]:
    """Return the salient layers of a pattern, the outermost first."""
    return [bound, *(salient_parts(bound.main) if isinstance(bound.main, Salient) else [])]


def core(bound: Partition | Nested | Salient) -> Partition | Nested:
    """Return what a pattern is beside its salient blocks."""
    return core(bound.main) if isinstance(bound, Salient) else bound
