"""Modules that hold packed weights, and their exchange with float layers."""

from hf_onebit.nn.binding import ignore_in_ddp
from hf_onebit.nn.fsdp import full_state_dict, prepare_for_fsdp
from hf_onebit.nn.fusion import fuse_projections, unfuse_projections
from hf_onebit.nn.linear import OneBitLinear, cache_dequantized
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQEmbedding, MPQLinear
from hf_onebit.nn.parameter import MPQWeightParameter
from hf_onebit.nn.replace import dequantize_layers, find_layers, packed_layers, replace_layers

__all__ = [
    "MBWQLinear",
    "MPQEmbedding",
    "MPQLinear",
    "MPQWeightParameter",
    "OneBitLinear",
    "cache_dequantized",
    "dequantize_layers",
    "find_layers",
    "full_state_dict",
    "fuse_projections",
    "ignore_in_ddp",
    "packed_layers",
    "prepare_for_fsdp",
    "replace_layers",
    "unfuse_projections",
]
