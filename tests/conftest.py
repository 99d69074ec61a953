"""The test run's choices: dtype, and the surroundings that make runs repeatable."""

from __future__ import annotations

import pytest
import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dtype", choices=sorted(DTYPES), default="float64", help="precision that the tests compute in")
    parser.addoption("--device", default="cpu", help="device that the tests compute on")


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The precision chosen for this run."""
    return DTYPES[request.config.getoption("--dtype")]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen for this run."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests are small: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
