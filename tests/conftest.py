"""Outputs are poisoned: with deterministic algorithms on, torch fills every fresh tensor with NaN, those of C++ included."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
