"""The gallery holds every named pattern, each with its facts, each drawable at its small size."""

import pytest
import torch

import s3lab as s3
from s3lab.lab.draw import diagram
from s3lab.lab.draw.gallery import GALLERY


def test_every_named_pattern_hangs_there():
    hung = {s3.parse(name) for name in GALLERY}
    assert {s3.parse(name) for name in s3.PATTERNS} - {s3.parse("1:2@16x16")} <= hung


@pytest.mark.parametrize("name", GALLERY)
def test_every_pattern_can_be_drawn_small_and_bound_large(name):
    entry = GALLERY[name]
    assert entry.source and entry.hardware
    W = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    bound = s3.parse(entry.small or name).bind((32, 32))
    assert diagram.draw_pattern(bound, bound.project(W)).axes
    assert 0 < s3.parse(name).bind((256, 768)).density < 1
