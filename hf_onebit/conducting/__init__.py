"""The steps of a quantization, and what tells its methods apart."""
