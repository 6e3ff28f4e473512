"""Every instruction set that this CPU has passes the tests of the ops, and the environment variable chooses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from madkernels import _C, OPS

TESTS = Path(__file__).parent
WITH_KERNELS = [
    "matches_reference",
    "any_shape",
    "any_length",
    "chunks_equal",
    "layouts",
    "packed_documents",
    "step_by_step",
    "extreme",
    "special",
    "softplus",
    "keys_than_queries",
    "documents_and_windows",
    "step_of_unequal",
]
OTHERS = [(isa, "") for isa in _C.cpu_supported() if isa != _C.cpu_isa()]
if _C.cpu_bfloat16_dot():  # which nothing uses where an instruction set is asked for
    OTHERS.append((_C.cpu_isa(), " and attention and bfloat16"))


@pytest.mark.parametrize(("isa", "alone"), OTHERS)
def test_op_tests_pass(isa: str, alone: str) -> None:
    command = [sys.executable, "-m", "pytest", "--backend", "cpu", "-k", f"({' or '.join(WITH_KERNELS)}){alone}"]
    command += [*(str(TESTS / f"test_{name}.py") for name in ("op_contract", *OPS)), "-p", "no:cacheprovider"]
    environment = os.environ | {"MADKERNELS_CPU": isa}
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:]


def python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MADKERNELS_CPU": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_environment_variable_chooses() -> None:
    for isa in _C.cpu_supported():
        run = python("import torch; from madkernels import _C; print(_C.cpu_isa())", isa)
        assert run.stdout.strip() == isa, run.stderr


def test_refuses_an_unknown_instruction_set() -> None:
    run = python("import madkernels.ops", "mmx")
    assert run.returncode != 0
    assert "MADKERNELS_CPU=mmx: this build and CPU offer baseline" in run.stderr
