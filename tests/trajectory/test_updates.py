from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kxexplain.trajectory import StepRecord, split
from kxexplain.trajectory.signature import describe_optimizer


def step_of(optimizer, **factors):
    rates = tuple(group["lr"] for group in optimizer.param_groups)
    return StepRecord(0, 0, rates, np.array([0]), 1.0, 1.0, **factors)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.3}, {"dampening": 0.5}, {"maximize": True, "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("factors", [{}, {"sign": -1}, {"clip": 0.25}], ids=str)
def test_split_is_what_sgd_does(options, factors):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, **options)
    parts = split(describe_optimizer(optimizer, model), step_of(optimizer, **factors))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.rand(5, 4, dtype=torch.float64)).square().sum().backward()
    factor = factors.get("sign", 1) * factors.get("clip", 1.0)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad *= factor
    optimizer.step()
    for name, p in model.named_parameters():
        expected = parts.gradient[name] * gradients[name] + parts.decay[name] * before[name]
        torch.testing.assert_close(p.detach() - before[name], expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.RMSprop(p),
    ],
)
def test_other_optimizers_have_no_split(make):
    model = nn.Linear(2, 1)
    optimizer = make(model.parameters())
    assert split(describe_optimizer(optimizer, model), step_of(optimizer)) is None
