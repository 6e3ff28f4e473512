"""`madkernels bench step`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from madkernels.benchmarks import step
from madkernels.cli.main import app


def test_parts_and_floor_of_a_step(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    result = CliRunner().invoke(
        app, ["bench", "step", "swiglu", "mamba", "--dtype", "float32,bfloat16", "--quick", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    steps = json.loads(out.read_text())["steps"]
    assert [(each["name"], each["dtype"]) for each in steps] == [
        (name, dtype) for name in ("swiglu", "mamba") for dtype in ("float32", "bfloat16")
    ]
    for each in steps:
        assert sum(each["shares"].values()) == pytest.approx(1, abs=0.2)  # operators in threads overlap
        assert each["floor_seconds"] > 0
        assert all(each["shares"][kind] > 0 for kind in ("ops", "products", "optimizer"))
    assert "geometric mean" in result.output


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "products"), ("aten::mul", "elementwise"), ("aten::cat", "copies"), ("madkernels::causal_conv", "ops"),
        ("Optimizer.step#AdamW.step", "optimizer"), ("autograd::engine::evaluate_function: MulBackward0", "rest"),
    ],
)  # fmt: skip
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert step.kind_of(operator) == kind


def test_every_architecture_of_the_table_is_one() -> None:
    assert len(step.steps_of(list(step.ARCHITECTURES), ["float32"], batch=1, seqlen=4)) == len(step.ARCHITECTURES)


@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--preset", "7b"], ["--dtype", "float16"]])
def test_what_a_step_does_not_take(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "step", *arguments])
    assert result.exit_code != 0
