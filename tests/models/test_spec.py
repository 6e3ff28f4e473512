"""Architecture strings."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, strategies as st

from madkernels.models import Architecture, HybridLM, LayerSpec, SpecError, parse
from madkernels.models.layers import LAYERS
from madkernels.models.spec import options_of


def names(text: str) -> list[str]:
    return [layer.name for layer in parse(text).layers]


def test_repetition_and_nesting() -> None:
    assert names("mamba swiglu") == ["mamba", "swiglu"]
    assert names("2*mamba mlp") == ["mamba", "mamba", "mlp"]
    assert names("2*(hyena 2*mlp) attention") == ["hyena", "mlp", "mlp"] * 2 + ["attention"]
    assert names(" 2 * ( hyena mlp ) ") == ["hyena", "mlp"] * 2
    assert names("2*2*mamba") == ["mamba"] * 4


def test_options() -> None:
    assert parse("moe:top_k=3,experts=5").layers == (LayerSpec("moe", (("experts", 5), ("top_k", 3))),)
    assert str(parse("2*(moe:top_k=3,experts=5)")) == "moe:experts=5,top_k=3 moe:experts=5,top_k=3"
    assert options_of("hyena-se") == {"groups": 16, "taps": 7, "width": 3}


def test_an_option_that_changes_nothing_is_left_out() -> None:
    """One architecture has one name, by which its results are kept."""
    assert str(parse("mamba:dstate=16,expand=3 mamba:width=4")) == "mamba:expand=3 mamba"


def another(name: str, option: str) -> int | float | bool:
    """A value that is not the default."""
    default = options_of(name)[option]
    return not default if isinstance(default, bool) else type(default)(11)


@given(
    st.lists(
        st.sampled_from(sorted(LAYERS)).flatmap(
            lambda name: st.builds(
                LayerSpec,
                st.just(name),
                st.lists(st.sampled_from(sorted(options_of(name))), unique=True).map(
                    lambda keys: tuple((key, another(name, key)) for key in sorted(keys))
                ),
            )
        ),
        min_size=1,
        max_size=6,
    )
)
def test_written_out_and_read_again(layers: list[LayerSpec]) -> None:
    arch = Architecture(tuple(layers))
    assert parse(str(arch)) == arch


@given(st.text("mlpabs()*:=,12. -\t", max_size=14) | st.text(max_size=14))
def test_any_text_is_an_architecture_or_a_spec_error(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert parse(text).layers


@pytest.mark.parametrize(
    ("text", "pointed_at", "message"),
    [
        ("mambo", "mambo", "unknown layer 'mambo'; there are attention, sliding-attention"),
        ("mamba foo mlp", "foo", "unknown layer 'foo'"),
        ("2*", "2*", "nothing follows"),
        ("0*mamba", "0*", "counts from 1"),
        ("(mamba", "(", "never closed"),
        ("mlp (mamba (mlp)", "(", "never closed"),
        ("mamba)", ")", "closes nothing"),
        ("mlp ()", "()", "nothing between"),
        ("attention:head=3", "head", "unknown option 'head'; attention takes heads"),
        ("attention:heads", "heads", "needs a value"),
        ("attention:heads=x", "x", "a whole number from 1, not 'x'"),
        ("attention:heads=0", "0", "a whole number from 1"),
        ("attention:heads=2,heads=4", "heads=4", "given twice"),
        ("", " ", "at least one layer"),
        ("  ", " ", "at least one layer"),
        ("attention:heads=٣", "٣", "a whole number from 1"),
        ("moe:experts=" + "9" * 5000, "9" * 5000, "a whole number from 1"),
        ("*", "*", "counts from 1"),
        ("mlp* mlp", "mlp*", "counts from 1"),
        ("mlp 9999*mamba", "9999*", "counts from 1 to 4096"),
        ("1" * 5000 + "*mlp", "1" * 5000 + "*", "counts from 1 to 4096"),
        ("80*(mamba 70*mlp)", "80*", "more than 4096 layers: 80 times 71"),
        ("4096*mlp mamba", "mamba", "more than 4096 layers"),
        ("(" * 5000, "(", "brackets go 32 deep"),
        ("1*" * 5000 + "mlp", "1*", "brackets go 32 deep"),
    ],
)
def test_errors_point_at_the_word(text: str, pointed_at: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse(text)
    _, line, carets = str(caught.value).split("\n")
    start = carets.index("^")
    assert carets[start:] == "^" * len(pointed_at)
    assert line[start : start + len(pointed_at)].ljust(1) == pointed_at


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention:heads=3", "attention:heads=3: dim 128 does not divide into 3 heads"),
        ("attention:heads=128", "does not divide into 128 heads of even width"),
        ("moe:experts=2,top_k=3", "top_k 3 is more than there are experts, 2"),
        ("hyena:groups=7", "512|channels do not divide into 7 groups"),
    ],
)
def test_options_that_do_not_go_with_the_width(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridLM(text, vocab_size=8, dim=128)
