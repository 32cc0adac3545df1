"""The per-module table: entries as values, and the tensors that follow from them."""

import pytest
import torch

from hf_onebit.formats.table import TableEntry

ONEBIT = {"method": "onebit", "bits": 1, "planes": 2, "group_size": None}
MPQ = {"method": "mpq", "bits": 3, "group_size": 32, "symmetric": False, "in_features": 70}


@pytest.mark.parametrize(
    "entry",
    [
        ONEBIT,
        MPQ,
        MPQ | {"kind": "embedding"},
        MPQ | {"symmetric": True, "group_size": -1, "tied_to": "model.embed_tokens"},
        {key: value for key, value in MPQ.items() if key != "in_features"},
    ],
)
def test_entries_round_trip(entry):
    assert TableEntry.from_dict(entry).to_dict() == entry


def test_null_and_absent_mean_the_same():
    assert TableEntry.from_dict(MPQ | {"planes": None, "tied_to": None}) == TableEntry.from_dict(MPQ)


def test_tensors_of_both_methods():
    onebit, mpq = TableEntry.from_dict(ONEBIT), TableEntry.from_dict(MPQ)
    assert onebit.tensor_names == ("weight", "a", "b", "weight_1", "a_1", "b_1")
    assert mpq.tensor_names == ("weight", "scales", "zeros")
    assert mpq.tensor_specs(70, 10) == {
        "weight": ((9, 10), torch.int32),
        "scales": ((3, 10), torch.float16),
        "zeros": ((3, 10), torch.float16),
    }
    assert tuple(onebit.tensor_specs(70, 10)) == onebit.tensor_names
    assert mpq.bits_per_weight(70, 10) == (9 * 32 + 2 * 3 * 16) * 10 / 700
    assert onebit.bits_per_weight(70, 10, 16) == (2 * (3 * 32 * 10 + 16 * 80) + 160) / 700
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in mpq.tensor_specs(70, 10).items()}
    mpq.validate_tensors(tensors, 70, 10, "here")
    with pytest.raises(ValueError, match="here: 'zeros' is missing"):
        mpq.validate_tensors({k: v for k, v in tensors.items() if k != "zeros"}, 70, 10, "here")


@pytest.mark.parametrize("entry", [ONEBIT, MPQ])
def test_sizes_from_the_stored_shapes(entry):
    entry = TableEntry.from_dict(entry)
    shapes = {name: shape for name, (shape, _) in entry.tensor_specs(70, 10).items()}
    assert entry.sizes(shapes) == (70, 10)
    assert entry.sizes({}) is None
    assert entry.sizes(dict.fromkeys(shapes, (1, 2, 3))) is None


def test_sizes_without_the_number_of_inputs_are_whole_words():
    entry = TableEntry("mpq", 3, group_size=32)
    shapes = {name: shape for name, (shape, _) in entry.tensor_specs(64, 10).items()}
    assert entry.sizes(shapes) == (64, 10)
