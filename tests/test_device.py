"""The device vocabulary and the emulator: the programs of tests/device, on the emulator."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import backends
import pytest

SOURCES = sorted((Path(__file__).parent / "device").glob("*.cu"))
NAMES = [name for source in SOURCES for name in re.findall(r"^TEST\((\w+)\)", source.read_text(), re.MULTILINE)]


@cache
def program(name: str) -> Path:
    return backends.build(name) / name


def run(name: str, *arguments: str) -> None:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # threads of a kernel that failed are not unwound
    command = [program(name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_on_the_emulator(name: str) -> None:
    run("device_tests", name)


def test_list_is_complete() -> None:
    listed = subprocess.run([program("device_tests"), "--list"], capture_output=True, text=True, check=True)
    assert sorted(listed.stdout.split()) == sorted(NAMES)


def test_under_many_schedules() -> None:
    for seed in range(20):
        run("device_tests", "--seed", str(seed))


def test_under_the_address_sanitizer() -> None:
    run("device_tests_asan")
