"""The same threads and seed for every test, so that a failure repeats; GPU tests are skipped without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # `pytest -n`: threads that wait leave the cores to other processes

import numpy as np
import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def no_sync() -> Callable[[], AbstractContextManager[None]]:
    """A context in which waiting for the GPU is an error."""

    @contextmanager
    def forbidden() -> Iterator[None]:
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return forbidden


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
