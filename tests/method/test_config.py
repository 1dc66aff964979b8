"""SparseDConfig: what it accepts, and the schedule against exact fractions."""

import dataclasses
from fractions import Fraction
from math import ceil, inf, nan

import pytest

from sparsed.config import SparseDConfig, ceil_share, check_numbers
from tests.helpers.reference import exact_share, n_full


def test_defaults_are_the_papers():
    config = SparseDConfig()
    assert (config.skip, config.select, config.block_size) == (0.2, 0.3, 128)


@pytest.mark.parametrize(
    "bad",
    [
        {"skip": -0.01},
        {"skip": 1.01},
        {"skip": nan},
        {"skip": inf},
        {"skip": "0.2"},
        {"skip": None},
        {"select": 0},
        {"select": -0.3},
        {"select": 1.5},
        {"select": nan},
        {"select": "all"},
        {"block_size": 0},
        {"block_size": -16},
        {"block_size": 8},
        {"block_size": 100},
        {"block_size": 2**31},
        {"block_size": 2**31 + 16},
        {"block_size": 32.0},
        {"block_size": "32"},
        {"block_size": None},
    ],
    ids=str,
)
def test_bad_values_are_named_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        SparseDConfig(**bad)
    (name,) = bad
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "good",
    [
        {"skip": 0},
        {"skip": 1},
        {"select": 1},
        {"select": 1e-6},
        {"block_size": 16},
        {"block_size": 48},
        {"block_size": 2**31 - 16},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_allowed(good):
    SparseDConfig(**good)


@pytest.mark.parametrize("bad", [0, -1, True, 1.0, "1", None])
def test_numbers_are_positive_and_whole(bad):
    check_numbers(steps=1, gen_length=2)
    with pytest.raises(ValueError, match="^gen_length must be a positive whole number, got"):
        check_numbers(steps=1, gen_length=bad)


def test_unknown_options_and_later_changes_are_errors():
    with pytest.raises(TypeError):
        SparseDConfig(selected=0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseDConfig().skip = 0.5


@pytest.mark.parametrize(
    ("skip", "steps", "expected"),
    [
        (0.2, 10, 2),
        (0.07, 100, 7),
        (0.1 + 0.2, 10, 3),
        (0.2, 128, 26),
        (0.2, 1, 1),
        (0.2, 3, 1),
        (0.2, 6, 2),
        (0.0, 128, 1),
        (1.0, 128, 128),
        (0.999, 2, 2),
        (1 / 3, 300, 100),
        (2 / 3, 3, 2),
        (0.201, 10, 3),
        (0.20001, 10, 3),
    ],
)
def test_full_steps(skip, steps, expected):
    assert SparseDConfig(skip=skip).n_full(steps) == expected


def test_full_steps_over_a_grid_of_exact_fractions():
    for hundredths in range(101):
        config = SparseDConfig(skip=hundredths / 100)
        for steps in [*range(1, 66), 100, 128, 250, 256, 512, 1000, 1024]:
            exact = min(steps, max(1, ceil(Fraction(hundredths, 100) * steps)))
            assert config.n_full(steps) == exact == n_full(hundredths / 100, steps), (hundredths, steps)


def test_share_over_a_grid_of_exact_fractions():
    for thousandths in [1, 7, 29, 70, 125, 290, 300, 333, 550, 570, 580, 999, 1000]:
        for total in range(1, 600):
            exact = max(1, ceil(Fraction(thousandths, 1000) * total))
            assert ceil_share(thousandths / 1000, total) == exact == exact_share(thousandths / 1000, total)
