"""What is said of the values of a tensor, and of the difference between two."""

import math

import pytest

np = pytest.importorskip("numpy")

from stepguard.cli.logdir import tensor_statistics  # noqa: E402
from stepguard.cli.logdir.tensor_statistics import compare, describe  # noqa: E402


def described(values, dtype):
    found = describe(np.array(values, dtype=dtype))
    return found.minimum, found.maximum, found.mean, found.nan, found.inf


def test_not_a_number_is_counted_and_left_out_and_infinity_is_not_left_out():
    assert described([1.0, math.nan, 3.0, math.nan], "float32") == (1.0, 3.0, 2.0, 2, 0)
    assert described([1.0, math.inf], "float64") == (1.0, math.inf, math.inf, 0, 1)
    assert described([math.nan], "float16") == (None, None, None, 1, 0)
    assert math.isnan(described([math.inf, -math.inf], "float32")[2])


def test_integers_are_exact_and_booleans_are_counted_as_0_and_1():
    largest = 2**64 - 1
    assert described([0, largest], "uint64")[:2] == (0, largest)
    assert described([-(2**63), 5], "int64")[:2] == (-(2**63), 5)
    low, high, mean, _, _ = described([True, False, True, True], "bool")
    assert (low, high, mean) == (0, 1, 0.75)
    assert type(low) is int


def test_complex_numbers_are_described_by_their_magnitudes():
    assert described([3 + 4j, 0], "complex64") == (0.0, 5.0, 2.5, 0, 0)


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.array(["a"], dtype=object), np.array([b"a"])], ids=str)
def test_nothing_is_said_of_empty_tensors_and_of_strings(array):
    found = describe(array)
    assert (found.minimum, found.maximum, found.mean, found.nan, found.inf) == (None, None, None, 0, 0)


def test_a_mean_of_many_half_floats_does_not_overflow():
    assert described([60000.0] * 100, "float16")[2] == 60000.0


def test_a_tensor_of_several_blocks_is_described_and_compared_as_one(monkeypatch):
    monkeypatch.setattr(tensor_statistics, "_BLOCK", 7)
    one = np.arange(100.0).reshape(10, 10)
    other = one.copy()
    other[9, 9] += 5
    other[0, 3] -= 2
    found = describe(one)
    assert (found.minimum, found.maximum, found.mean) == (0.0, 99.0, 49.5)
    difference = compare(one, other)
    assert (difference.changed, difference.count, difference.absolute) == (2, 100, 5.0)
    assert difference.relative == pytest.approx(2 / 3)


def test_equal_tensors_have_no_difference_and_a_nan_equals_a_nan():
    same = np.array([1.0, math.nan, math.inf, -0.0])
    difference = compare(same, np.array([1.0, math.nan, math.inf, 0.0]))
    assert (difference.changed, difference.absolute, difference.relative) == (0, 0, 0.0)
    assert compare(np.zeros((0, 2)), np.zeros((0, 2))).changed == 0


def test_a_nan_against_a_number_is_a_change_of_nan():
    difference = compare(np.array([1.0, 2.0, 3.0]), np.array([1.5, math.nan, 3.0]))
    assert difference.changed == 2
    assert math.isnan(difference.absolute)


def test_infinities_that_differ_are_infinitely_far_apart():
    difference = compare(np.array([math.inf, 0.0]), np.array([-math.inf, 0.0]))
    assert (difference.changed, difference.absolute) == (1, math.inf)


@pytest.mark.parametrize(
    ("dtype", "one", "other", "distance"),
    [
        ("uint8", 3, 250, 247),
        ("int8", -128, 127, 255),
        ("int64", -(2**63), 2**63 - 1, 2**64 - 1),
        ("uint64", 0, 2**64 - 1, 2**64 - 1),
        ("bool", False, True, 1),
        ("float16", -60000.0, 60000.0, 120000.0),
        ("complex64", 0, 3 + 4j, 5.0),
    ],
)
def test_the_difference_of_any_two_values_is_exact(dtype, one, other, distance):
    difference = compare(np.array([one, one], dtype=dtype), np.array([other, one], dtype=dtype))
    assert (difference.changed, difference.absolute) == (1, distance)


def test_strings_differ_or_do_not():
    difference = compare(np.array([b"a", b"b"], dtype=object), np.array([b"a", b"c"], dtype=object))
    assert (difference.changed, difference.absolute, difference.relative) == (1, None, None)
