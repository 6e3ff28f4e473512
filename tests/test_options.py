"""Options with few values: the command line takes those of the library, lists them, and refuses others before any work."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from madkernels.cli import fits, mad, train
from madkernels.cli.main import app
from madkernels.scaling.fits.isoflop import NEEDED
from madkernels.scaling.training.estimate import GPUS, SHARDINGS
from madkernels.scaling.training.recipe import SCHEDULES
from madkernels.scaling.training.trainer import CHECKPOINTING
from madkernels.synthetics.protocol import MEASURES


def values(command: Any, option: str) -> tuple[str, ...]:
    return get_args(get_type_hints(command)[option])


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        (fits.fit, "shape", NEEDED),
        (fits.compare, "shape", NEEDED),
        (mad.compare, "measure", MEASURES),
        (train.plan, "gpu", GPUS),
        (train.plan, "sharding", SHARDINGS),
        (train.plan, "checkpointing", CHECKPOINTING),
        (train.run, "checkpointing", CHECKPOINTING),
        (train.run, "schedule", SCHEDULES),
    ],
)
def test_choices_are_those_of_the_library(command: Any, option: str, known: Any) -> None:
    assert values(command, option) == tuple(known)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bench causal_conv --pass up", "'up' is not one of 'fwd', 'bwd', 'both'"),
        ("scale fit runs.csv --shape line", "'line' is not one of 'parabola', 'cubic', 'akima'"),
        ("train plan --preset mamba-7b --gpu tpu", "'tpu' is not one of 'a100', 'h100', 'h200'"),
        ("train sample run --dtype float8", "'float8' is not one of 'float32', 'bfloat16'"),
    ],
)
def test_others_are_refused(line: str, told: str) -> None:
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "120"})
    assert result.exit_code == 2
    assert told in result.output
