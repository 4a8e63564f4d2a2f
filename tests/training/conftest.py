"""A small network, its text, and one step of training it."""

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def make():
    """Return a network of two linear layers, in float64, where no rounding turns a decision."""

    def make(inputs=16, hidden=32, outputs=16, seed=0, dtype=torch.float64):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs)).to(dtype)

    return make


@pytest.fixture(scope="session")
def learn():
    """Return a function that takes one whole step on drawn data."""

    def learn(model, optimizer, number=0, batch=8):
        generator = torch.Generator().manual_seed(100 + number)
        first = next(p for p in model.parameters())
        X = torch.randn(batch, 16, generator=generator, dtype=torch.float64).to(first.dtype)
        Y = torch.randn(batch, 16, generator=generator, dtype=torch.float64).to(first.dtype)
        optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return learn
