"""Outputs are poisoned: with deterministic algorithms on, torch fills every fresh tensor with NaN, those of C++ included."""

import os
from collections.abc import Iterator

import backends
import native
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # before anything imports Triton: its kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "same every time", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("same every time")


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cpu,ptx" + (",cuda" if torch.cuda.is_available() else "")
    parser.addoption("--backend", default=default, help=f"where ops run, of {', '.join(backends.NAMES)}")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): the only backends on which a test makes sense")
    config.addinivalue_line("markers", "slow: takes minutes; only with --slow")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("backends")
        chosen = metafunc.config.getoption("--backend").split(",")
        names = [name for name in chosen if marker is None or name in marker.args]
        metafunc.parametrize("backend", names, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a backend has not, float64 and ops without CUDA kernels, and what is slow unless it is asked for."""

    def possible(item: pytest.Item) -> bool:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            return False
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if parameters.get("backend", "cpu") == "cpu":
            return True
        op = parameters.get("op")
        return parameters.get("dtype") != torch.float64 and (op is None or op.name in native.ops_on_gpus())

    items[:] = [item for item in items if possible(item)]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of an op runs once a backend."""
    if request.param == "ptx" and native.find_nvcc() is None:
        pytest.skip("there is no nvcc, whose PTX the simulator runs; CONTRIBUTING.md says how to get it")
    with backends.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
