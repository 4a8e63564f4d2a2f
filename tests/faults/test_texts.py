"""Whatever the text and the shape: a pattern, or the package's own error, after a bounded number of steps."""

import sys
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import s3lab as s3

VALID = [
    *s3.PATTERNS,
    *s3.PATTERNS.values(),
    "down: (M,1) & up: (1,K) follows keep 75%",
    "q: (64,K) & o: (M,64) keep 8",
    '"k v": (1,1) / (1,4) | q: (M,4,K/4):(K,K/4,1) / (1,4,1) by (2,0,1) / (1,1,4) keep 100/3%',
    "4:8@64x1 then 2:4 then 1:2 plus 16:256",
]
# digits of other scripts, signs that count as digits or letters somewhere, blanks, and what cannot be encoded
ODD = "²½٣๔Ⅷ①🄂ª\u212a\u216f−\uff1a\u00a0\u2028\x00\ud800\n"
PIECES = st.sampled_from([*"()MK,:/*@x%|&. 0123456789", *ODD, " then ", " plus ", "keep", "each way", "9" * 40])
SHAPES = st.sampled_from([(1, 1), (8, 16), (64, 64), (128, 256), (96, 97), (10**8, 10**8), (3, 10**40)])
STEPS = 3_000_000  # of the interpreter: far below a second of its own, untraced


class TooLong(BaseException):
    pass


@contextmanager
def bounded(steps):
    """Count the interpreter's own steps, and stop what takes too many: time as no clock can tell it."""
    taken, before = 0, sys.gettrace()

    def count(frame, event, _):
        nonlocal taken
        frame.f_trace_opcodes = True
        taken += 1
        if taken > steps:
            raise TooLong(f"more than {steps} steps")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


@st.composite
def mutated(draw):
    """A valid text with some of it cut out, put in or repeated."""
    text = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(0, 4))):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        put = draw(st.one_of(PIECES, st.just(text[start:stop]), st.just("")))
        text = text[:start] + put * draw(st.sampled_from([1, 1, 1, 2, 40])) + text[stop:]
    return text


def read(text, shape):
    """Parse and bind, and say what came of it."""
    try:
        pattern = s3.parse(text)
    except s3.SpecError:
        return None
    assert s3.parse(str(pattern)) == pattern
    with suppress(s3.SpecError, s3.ShapeError):
        pattern.bind(dict.fromkeys(pattern.names, shape) if pattern.names else shape)
    return pattern


@given(st.one_of(mutated(), st.text(max_size=40)), SHAPES)
@settings(max_examples=150)
def test_any_text_and_shape(text, shape):
    with bounded(STEPS):
        read(text, shape)


@pytest.mark.slow
@given(st.one_of(mutated(), st.text(max_size=40)), SHAPES)
@settings(max_examples=20_000)
def test_any_text_and_shape_at_length(text, shape):
    read(text, shape)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000 + ":4",
        "2:" + "9" * 5000,
        "0." + "0" * 5000 + "1%",
        "50/" + "9" * 5000 + "%",
        "²:8@64x1",
        "2:٤",
        "1٢:16",
        "q: (1,1) by (²) & k: (1,1) keep 2",
        "(" * 3000,
        "(" * 3000 + "M" + ")" * 3000,
        "2:4" + " then 2:4" * 500,
        "2:4" + " plus 2:4" * 500,
        "(" + "*".join(["9" * 99] * 50) + ",K):(K,1) / (1,1) / (1,4) keep 2",
        "2:4 then" + " " * 100_000 + "2:4",
        "\ud800:4",
    ],
)
def test_what_is_too_long_too_deep_or_in_other_digits_is_refused(text):
    with bounded(STEPS), pytest.raises(s3.SpecError):
        s3.parse(text)


@pytest.mark.parametrize("text", ["(" * 3000, "9" * 5000, "(" + "1," * 20 + "²)", "4:٤"])
def test_so_it_is_with_layouts(text):
    with bounded(STEPS), pytest.raises(s3.SpecError):
        s3.Layout.parse(text)


@pytest.mark.parametrize("shape", [(10**8, 10**8), (1, 10**40)])
@pytest.mark.parametrize("text", ["2:7", "1:3@7x1", "(M*K):(1) / (7) / (4) keep 3"])
def test_the_size_of_a_layer_is_no_matter_where_a_spec_does_not_fit(text, shape):
    with bounded(STEPS // 10), pytest.raises(s3.SpecError, match=r"remainder: use a divisor of 10*, such as \d"):
        s3.parse(text).bind(shape)


@pytest.mark.parametrize(
    "shape", [None, 3, "ab", (4,), (4, 8, 2), (4.0, 8), (0, 4), (None, 4), {}, {"q": None, "k": (4, 8)}, {1: 2}]
)
@pytest.mark.parametrize("text", ["2:4", "2:4 then 2:4", "2:4 plus 4:8", "q: (1,1) & k: (1,1) keep 50%"])
def test_what_is_no_shape_is_told(text, shape):
    with pytest.raises((s3.SpecError, s3.ShapeError)):
        s3.parse(text).bind(shape)
