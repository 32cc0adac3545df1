"""Optimum: our quantizer counts as one of its own."""

import pytest

optimum = pytest.importorskip("optimum.quantization_base")

from tiny import tiny_llama  # noqa: E402  after the skip

from hf_onebit import OneBitConfig, OneBitQuantizer  # noqa: E402


def test_it_is_a_virtual_subclass_and_works_as_one(tmp_path):
    import hf_onebit.integrations.optimum

    assert hf_onebit.integrations.optimum.OneBitQuantizer is OneBitQuantizer
    quantizer: optimum.OptimumQuantizer = OneBitQuantizer.from_pretrained(tiny_llama(), config=OneBitConfig())
    assert isinstance(quantizer, optimum.OptimumQuantizer)
    quantizer.quantize(tmp_path / "packed")
    assert (tmp_path / "packed" / "hf_onebit.json").is_file()
    with pytest.raises(ValueError, match="file_prefix"):
        quantizer.quantize(tmp_path / "other", file_prefix="model")
