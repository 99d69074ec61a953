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


CORE = ("mlp-relu", "cnn-max", "residual-batch-norm", "encoder-", "custom-numpy", "tied", "embedding-tied")
"""Cases that every run takes; the whole table is taken by `make slow`."""

TABLES = (
    "test_every_case_at_every_stride", "test_from_the_smallest_rate_to_the_largest", "test_every_target",
    "test_queries_do_not_see_each_other", "test_stride_one_is_the_path_integral", "test_equal_the_reference",
    "test_hostile_data", "test_an_example_s_gradient_does_not_depend_on_its_company",
    "test_completeness_at_steps_of_any_size", "test_batches_of_any_size", "test_axes_of_equal_length_are_not_confused",
)  # fmt: skip
"""Tests that cross the table of cases with strides, rates, targets and precisions: minutes, not seconds."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark_whole(item)
        name, _, chosen = item.name.partition("[")
        core = any(chosen.startswith(case) or f"-{case}" in chosen for case in CORE)
        wide = name in TABLES and (not core or ("dtype1" in chosen and name != "test_every_case_at_every_stride"))
        if wide or (name == "test_from_the_smallest_rate_to_the_largest" and "mlp-relu-dtype0" not in chosen):
            item.add_marker(pytest.mark.slow)
        if item.path.name == "test_discrete.py" and chosen.removesuffix("]") in UNROLLED:
            item.add_marker(pytest.mark.slow)
        if name == "test_exact_on_ends_nearly_equal" and chosen.endswith(("-1e-12]", "-0.0001]")):
            item.add_marker(pytest.mark.slow)


UNROLLED = ("gru", "lstm-stacked", "cells")
"""Recurrent cases that take seconds between two states; smaller ones are taken by every run."""

WHOLE = ("test_complete.py", "test_rules_compare.py", "test_agreement.py")
"""Files that take minutes; every run takes the completeness of a few cases and what is quick."""

QUICK = (
    "mlp-relu-dtype0",
    "mlp-tanh-dtype0",
    "cnn-max-dtype0",
    "mlp-relu]",
    "mlp-relu-1]",
    "turned]",
    "sorted]",
    "derivative]",
    "view]",
    "look-up]",
    "counter]",
)


def mark_whole(item: pytest.Item) -> None:
    """Slow parts of the files that take minutes."""
    if item.path.name in WHOLE and not item.name.endswith(QUICK) and "[" in item.name:
        item.add_marker(pytest.mark.slow)
    if item.path.name in WHOLE[:2] and "[" not in item.name:
        item.add_marker(pytest.mark.slow)
