"""Other programs' files: their packed checkpoints in, GGUF files out.

``import_checkpoint`` converts a GPTQ, bitorch or OneComp folder into a packed one of this package; ``hf_onebit.load``
does the same on the way. ``export_gguf`` writes what llama.cpp runs.
"""
