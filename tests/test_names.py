"""Names that are not known: what is said of them, by the commands that take them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.models.layers import LAYERS
from madkernels.models.spec import parse
from madkernels.names import did_you_mean

STUDY = Path(__file__).parents[1] / "docs" / "studies" / "scaling-small" / "runs.csv"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("hyna", "; did you mean hyena?"),
        ("Attention", "; did you mean attention?"),
        ("mamba-2", "; did you mean mamba2?"),
        ("lstm", ""),
        ("", ""),
    ],
)
def test_nearest_layer(typed: str, told: str) -> None:
    assert did_you_mean(typed, LAYERS) == told


def test_the_name_is_told_as_it_is_written() -> None:
    assert did_you_mean("model size", ["Model Size", "Training FLOP"]) == "; did you mean Model Size?"


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("mad run --arch atention", "attention"),
        ("mad run --arch attention:head=4", "heads"),
        ("mad run --arch mlp --tasks fuzzy_recall", "fuzzy-recall"),
        ("mad tasks recal", "recall"),
        ("mad tasks --protocol stric", "strict"),
        ("train plan --preset stripedhyena-7b", "striped-hyena-7b"),
        ("bench causal_cnv", "causal_conv"),
        ("bench causal_conv --dtype bfloat", "bfloat16"),
        ("bench causal_conv --shapes mamba-130", "mamba-130m"),
        ("bench causal_conv --peers refrence", "reference"),
        (f"scale fit {STUDY} --group archs", "arch"),
        (f"scale fit {STUDY} --loss los", "loss"),
        (f"scale compare {STUDY} --budget budgets", "budget"),
    ],
)
def test_commands_say_what_was_meant(line: str, meant: str) -> None:
    result = CliRunner().invoke(app, line.split())
    assert isinstance(result.exception, ValueError), result.output
    assert f"; did you mean {meant}?" in str(result.exception)


def test_folders_of_the_package_load_when_asked_for() -> None:
    """In a process of its own: others have imported them."""
    lines = (
        "import madkernels, sys",
        "assert 'torch' not in sys.modules",
        "assert madkernels.models.HybridLM and madkernels.scaling and 'models' in dir(madkernels)",
        "assert 'Any' not in dir(madkernels)",
        "assert not hasattr(madkernels, 'modles')",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize(
    ("name", "told"),
    [("striped-hyena-70m", "is a preset: madkernels.models.presets.preset("), ("striped-hyena", "is a family")],
)
def test_presets_in_the_place_of_layers(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        parse(name)
