"""Groups of rows: quantiles with equal values, columns with few and many values, length differences."""

import numpy as np

from lowrank_rlhf.evaluation.buckets import MISSING, MOST_GROUPS, OTHER, by_length, by_quantile, by_value


def test_quartiles_hold_a_quarter_each():
    names = by_quantile(np.random.default_rng(0).permutation(100))
    assert {name: names.count(name) for name in sorted(names)} == {
        "1: 0 to 24": 25,
        "2: 25 to 49": 25,
        "3: 50 to 74": 25,
        "4: 75 to 99": 25,
    }


def test_equal_values_are_never_parted():
    assert by_quantile([0, 0, 0, 0, 0, 0, 0, 5]) == ["1: 0"] * 7 + ["2: 5"]
    assert by_quantile([2.0]) == ["1: 2"]


def test_values_that_print_alike_stay_apart():
    assert len(set(by_quantile([1.00001, 1.00002], buckets=2))) == 2


def test_a_column_of_few_values_keeps_them():
    assert by_value([1, "1", None, "", ["b"], {"a": 1}]) == ["1", "1", MISSING, MISSING, '["b"]', '{"a": 1}']


def test_a_column_of_many_numbers_becomes_quartiles():
    names = by_value([None, *range(100)])
    assert names[0] == MISSING
    assert len(set(names[1:])) == 4


def test_a_column_of_many_texts_keeps_the_commonest():
    values = [f"v{i}" for i in range(30)] + ["v7"]
    names = by_value(values)
    assert len(set(names)) == MOST_GROUPS
    assert names[7] == names[30] == "v7"
    assert names[29] == OTHER


def test_numbers_that_are_not_finite_are_names():
    assert OTHER in by_value([float("nan"), *range(40)])


def test_length_differences_are_relative_to_the_longer_answer():
    """−20/40 = −½ is much shorter, −4/40 shorter, 4/40 about as long, 5/40 longer, 21/40 much longer."""
    chosen, rejected = [20, 36, 40, 40, 40], [40, 40, 36, 35, 19]
    assert by_length(chosen, rejected) == ["much shorter", "shorter", "about as long", "longer", "much longer"]
