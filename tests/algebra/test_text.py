"""The grammar: text and spec are each other's inverse, and what cannot be read is pointed at."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import s3lab as s3
from s3lab.algebra.text import Size

SHORT = [
    "2:4",
    "1:4",
    "8:16",
    "2:4@1x2",
    "1:2@16x16",
    "50%",
    "12.5%",
    "100/3%",
    "50%/row",
    "25%/column",
    "50%/row@1x4",
    "50%@4x4",
    "50% rows",
    "25% columns",
]


@pytest.mark.parametrize("text", SHORT)
def test_short_text_is_its_own_print(text):
    assert str(s3.parse(text)) == text


@pytest.mark.parametrize("name", s3.PATTERNS)
def test_named_patterns_round_trip(name):
    spec = s3.parse(name)
    assert s3.parse(str(spec)) == spec and hash(s3.parse(str(spec))) == hash(spec)


def test_short_and_full_text_are_the_same_spec():
    assert s3.parse("2:4@1x2") == s3.parse("(M,K):(K,1) / (1,2) / (1,4) keep 2")
    assert s3.parse("50% rows") == s3.parse("( M , K ) : (K,1)/(1,K)/(M,1) keep 50%")
    assert s3.parse("1:2") != s3.parse("1:4") and s3.parse("1:4") != s3.parse("3:4")


def test_python_and_text_are_the_same_spec():
    built = s3.Spec(
        s3.View(("M", "K/16", 8, 2), ("K", 16, 1, 8)), s3.Block((1, 1, 1, 2)), s3.Scope((1, 1, 4, 1), keep=2)
    )
    assert built == s3.parse("coupled-2:4")


SIZES = st.one_of(st.integers(1, 64), st.sampled_from(["M", "K", "M/2", "K/16", "8*K", "M*K/4", "K/2/3", "2*M*K"]))


@given(st.data(), st.integers(1, 4))
def test_generated_specs_round_trip(data, modes):
    group = lambda: data.draw(st.tuples(*[SIZES] * modes))  # noqa: E731
    keep = data.draw(st.one_of(st.integers(1, 9), st.fractions(0, 1).filter(lambda f: 0 < f < 1)))
    spec = s3.Spec(s3.View(group(), group()), s3.Block(group()), s3.Scope(group(), keep=keep))
    assert s3.parse(str(spec)) == spec


@given(st.text(alphabet="()MK,:/*keprows%@x 0123456789.", max_size=30))
def test_any_text_is_a_spec_or_a_spec_error(text):
    try:
        spec = s3.parse(text)
    except s3.SpecError:
        return
    assert s3.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        ("", 1, "a spec such as"),
        ("2:", 3, "the number of blocks in a scope"),
        ("2:0", 3, "at least 1"),
        ("0:4", 1, "at least 1"),
        ("1.5:4", 1, "a whole number of blocks"),
        ("2;4", 2, "':' or '%'"),
        ("2:4@1", 6, "'x'"),
        ("0%", 1, "above 0 and below 100"),
        ("100%", 1, "above 0 and below 100"),
        ("50% cows", 5, "the end of the spec"),
        ("50%/cow", 5, "'row' or 'column'"),
        ("(M,K:(K,1) / (1,1) / (1,4) keep 2", 5, "',' or ')'"),
        ("(M,J):(K,1) / (1,1) / (1,4) keep 2", 4, "'M' (rows) or 'K' (inputs)"),
        ("(M,K):(K,1) / (1,1) / (1,4)", 28, "'keep'"),
        ("__import__('os')", 1, "a spec such as"),
    ],
)
def test_a_malformed_text_is_pointed_at(text, column, expected):
    with pytest.raises(s3.SpecError) as caught:
        s3.parse(text)
    message = str(caught.value)
    assert f"at column {column}:" in message and expected in message
    _, shown, caret = message.splitlines()[:3]
    assert shown == f"    {text}" and caret.index("^") == 4 + column - 1


def test_a_misspelt_name_finds_its_neighbour():
    with pytest.raises(s3.SpecError, match="similar name: block16"):
        s3.parse("blok16")


@pytest.mark.parametrize(("text", "value"), [("K/16", 4), ("M*K/4", 128), ("3", 3), ("2*K/M", 16), ("64/K", 1)])
def test_sizes_bind_late(text, value):
    assert Size.of(text).on(8, 64) == value


def test_a_size_that_is_not_whole_names_the_shape():
    with pytest.raises(s3.SpecError, match="K/16 is not whole on a weight of M = 8 rows and K = 40 inputs"):
        s3.parse("coupled-2:4").bind((8, 40))


@pytest.mark.parametrize("keep", [0, -1, 1.0, 0.0, Fraction(3, 2), True, "2", None])
def test_a_budget_is_a_count_or_a_share(keep):
    with pytest.raises(s3.SpecError, match="no budget"):
        s3.Scope((1, 4), keep=keep)
