"""Training packed models: an optimizer for packed weights and everything beside them."""

from hf_onebit.training.diode_mix import DiodeMix, diode_mix

__all__ = ["DiodeMix", "diode_mix"]
