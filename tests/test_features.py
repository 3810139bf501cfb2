"""Columns to tensors: scaling, vocabularies, what is missing, what is refused."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from recsys_ssm.errors import UserError
from recsys_ssm.features import (
    MISSING,
    CategoricalField,
    Features,
    FeatureSchema,
    NumericField,
    numeric_column,
    text_column,
)

FRAME = pl.DataFrame(
    {"age": ["20", None, "40"], "town": ["Rome", "", "Oslo"], "id": ["007", "7", None]}
)


def test_known_values_are_coded_from_1_in_sorted_order_and_missing_is_apart():
    schema = FeatureSchema.fit(FRAME, numeric=["age"], categorical=["town", "id"])
    assert schema.categorical == (
        CategoricalField("town", ("Oslo", "Rome")),
        CategoricalField("id", ("007", "7")),
    )
    assert [field.n_codes for field in schema.categorical] == [3, 3]
    features = schema.encode(FRAME)
    assert features.categorical.tolist() == [[2, 1], [MISSING, 2], [1, MISSING]]
    assert features.categorical.dtype == torch.int64
    assert MISSING == 0


def test_numbers_have_mean_0_and_deviation_1_and_a_missing_one_is_the_mean():
    schema = FeatureSchema.fit(FRAME, numeric=["age"])
    assert schema.numeric == (NumericField("age", mean=30.0, std=10.0),)
    features = schema.encode(FRAME)
    assert features.numeric.tolist() == [[-1.0], [0.0], [1.0]]
    assert features.numeric.dtype == torch.float32


def test_scaling_comes_from_the_fitted_rows_alone():
    schema = FeatureSchema.fit(FRAME, numeric=["age"], categorical=["town"])
    new = pl.DataFrame({"age": [50.0, 30.0], "town": ["Lima", "Oslo"]})
    features = schema.encode(new)
    assert features.numeric.tolist() == [[2.0], [0.0]]
    assert features.categorical.tolist() == [[MISSING], [1]]


def test_numbers_stay_as_they_are_without_scaling():
    schema = FeatureSchema.fit(FRAME, numeric=["age"], scale=False)
    assert schema.encode(FRAME).numeric.tolist() == [[20.0], [0.0], [40.0]]


@pytest.mark.parametrize("value", [0.1, 1e-20, 3e8])
def test_a_constant_column_becomes_0_not_noise_blown_up(value):
    frame = pl.DataFrame({"x": [value] * 7})
    encoded = FeatureSchema.fit(frame, numeric=["x"]).encode(frame).numeric
    assert encoded.abs().max() < 1e-6


def test_a_column_without_any_value():
    frame = pl.DataFrame({"x": [None, None], "c": [None, None]})
    schema = FeatureSchema.fit(frame, numeric=["x"], categorical=["c"])
    features = schema.encode(frame)
    assert features.numeric.tolist() == [[0.0], [0.0]]
    assert features.categorical.tolist() == [[MISSING], [MISSING]]


def test_a_schema_survives_json():
    schema = FeatureSchema.fit(FRAME, numeric=["age"], categorical=["town", "id"])
    assert FeatureSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert schema.names == ["age", "town", "id"]
    assert schema.n_features == 3


def test_quantiles_are_those_of_the_fitted_rows_in_the_encoded_unit():
    frame = pl.DataFrame({"x": [*(float(i) for i in range(97)), None]})
    (field,) = FeatureSchema.fit(frame, numeric=["x"]).numeric
    assert field.quantiles == pytest.approx([2.0 * i for i in range(49)])
    raw = field.edges(4) * field.std + field.mean
    assert raw.tolist() == pytest.approx([0, 24, 48, 72, 96], abs=1e-4)
    (plain,) = FeatureSchema.fit(frame, numeric=["x"], scale=False).numeric
    assert plain.edges(1).tolist() == [0, 96]


def test_equal_edges_count_once_and_a_constant_column_has_two():
    frame = pl.DataFrame({"x": [1.0] * 90 + [2.0] * 10, "c": [3.0] * 100, "n": [None] * 100})
    schema = FeatureSchema.fit(frame, numeric=["x", "c", "n"], scale=False)
    assert [field.edges(48).tolist() for field in schema.numeric[1:]] == [[3, 4], [0, 1]]
    edges = schema.numeric[0].edges(48)
    assert edges[0] == 1 and edges[-1] == 2 and (edges[1:] > edges[:-1]).all()


def test_a_schema_of_an_older_checkpoint_is_read_and_equals_a_new_one():
    """Quantiles are no part of the data's identity, and are stored for the tokenizers alone."""
    new = FeatureSchema.fit(FRAME, numeric=["age"], categorical=["town"])
    old = {
        "numeric": [{"name": "age", "mean": 30.0, "std": 10.0}],
        "categorical": [{"name": "town", "values": ["Oslo", "Rome"]}],
    }
    assert new.to_dict() == old and FeatureSchema.from_dict(old) == new
    with pytest.raises(UserError, match="'age': its range and quantiles are unknown"):
        FeatureSchema.from_dict(old).numeric[0].edges(1)
    full = json.loads(json.dumps(new.to_dict(quantiles=True)))
    assert FeatureSchema.from_dict(full).numeric[0].quantiles == new.numeric[0].quantiles
    with pytest.raises(UserError, match="n_bins=49"):
        new.numeric[0].edges(49)


def test_a_name_twice_is_refused():
    with pytest.raises(UserError, match="'town' is named twice"):
        FeatureSchema.fit(FRAME, categorical=["town", "id", "town"])


@pytest.mark.parametrize(
    ("cells", "row", "shown"),
    [
        (["1", "x", "y"], 2, "'x'"),
        (["1", " ", "1,5"], 3, "'1,5'"),
        ([1.0, math.nan], 2, "nan"),
        (["nan"], 1, "'nan'"),
        ([1.0, -math.inf], 2, "-inf"),
    ],
)
def test_what_is_no_number_is_named_with_file_row_and_column(cells, row, shown):
    with pytest.raises(UserError, match=f"u.csv, row {row}, column 'age': {shown} is not a finite"):
        numeric_column(pl.DataFrame({"age": cells}), "age", "u.csv")


def test_numbers_are_read_from_text_integers_and_booleans():
    frame = pl.DataFrame({"t": [" 12 ", "", None, "1e3"]})
    np.testing.assert_array_equal(numeric_column(frame, "t", "x"), [12, math.nan, math.nan, 1000])
    frame = pl.DataFrame({"b": [True, None], "i": [3, -4]})
    np.testing.assert_array_equal(numeric_column(frame, "b", "x"), [1, math.nan])
    np.testing.assert_array_equal(numeric_column(frame, "i", "x"), [3, -4])


def test_text_is_the_same_for_a_number_however_it_was_stored():
    floats = pl.DataFrame({"id": [7.0, None, 2.5, math.nan, 1e300]})
    assert text_column(floats, "id", "x").to_list() == ["7", None, "2.5", None, "1e+300"]
    assert text_column(pl.DataFrame({"id": [7, None]}), "id", "x").to_list() == ["7", None]
    assert text_column(pl.DataFrame({"id": ["007", ""]}), "id", "x").to_list() == ["007", None]


def test_columns_that_are_absent_or_hold_lists_are_refused():
    with pytest.raises(UserError, match=r"u.csv: no column 'ages'; its columns are age, town, id"):
        numeric_column(FRAME, "ages", "u.csv")
    with pytest.raises(UserError, match=r"u.csv: column 'x' holds List"):
        text_column(pl.DataFrame({"x": [[1]]}), "x", "u.csv")


def test_rows_of_features():
    features = Features(torch.arange(6.0).view(3, 2), torch.arange(3).view(3, 1))
    assert features.n_rows == 3
    picked = features.rows(torch.tensor([2, 0]))
    assert picked.numeric.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert picked.categorical.tolist() == [[2], [0]]
    assert features.to("cpu").rows(slice(1, 2)).categorical.tolist() == [[1]]
