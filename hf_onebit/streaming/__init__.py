"""Quantizing models that are larger than memory: from files into files, one block in memory at a time."""
