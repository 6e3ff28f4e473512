"""Experts over several processes are those of one: outputs, gradients and theirs, whatever goes where."""

from __future__ import annotations

import pytest
import shared_experts
from processes import call, starter


@pytest.mark.parametrize("processes", [2, 4])
def test_experts_over_processes_are_those_of_one(processes: int) -> None:
    call([*starter(processes), shared_experts.__file__])
