"""How good, how fast, how large: perplexity, distance from the float model, decode speed, memory.

The same code runs for float and for packed models: it sees input ids and logits, nothing else. Results are plain
dicts of numbers. The protocol is in docs/evaluation.md.
"""

from hf_onebit.evaluation.memory import peak_memory_mb, resident_bytes, tensor_bytes
from hf_onebit.evaluation.quality import OnProgress, compare, perplexity
from hf_onebit.evaluation.speed import decode_speed, timed_generation
from hf_onebit.evaluation.windows import token_windows

__all__ = [
    "OnProgress",
    "compare",
    "decode_speed",
    "peak_memory_mb",
    "perplexity",
    "resident_bytes",
    "tensor_bytes",
    "timed_generation",
    "token_windows",
]
