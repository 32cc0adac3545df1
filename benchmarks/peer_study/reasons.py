"""Why a peer's perplexity is below one of our rows, for docs/mpq_results.md: by the names of ``rows.ROWS``."""

_TEXT = "it sees a text, which that row of ours does not; ours that see one are below it"
_NONE = "neither sees a text"
_OURS = "With any text, also one that the model writes itself, ours are below it"

REASONS = {
    "llama-q4_1": (
        "half a bit more per weight than groups of 64, for groups of 32, and the float model was dequantized from this "
        "very type: groups of 32 find its codes again. So do ours of 32 inputs, which are below it at the same bits"
    ),
    "llama-q4_k_m": (
        "most layers are Q5_0 here, since rows are no multiple of 256: a bit more per weight. `fast` and `closed` with "
        "a text are below it at 4.5"
    ),
    "llama-q4_0": (
        f"{_NONE}. Not for its groups of 32, as our symmetric ones of 32 show. It stores the largest weight of a group "
        f"exactly, where least squares may clip it; that was not tested by itself. {_OURS}"
    ),
    "bnb-4": f"{_NONE}. Its levels are no even grid but lie denser about 0, where most weights are. {_OURS}",
    "bnb-4-dq": f"as nf4 above, its scales in few bits, as `double_quant` stores ours. {_OURS}",
    "hqq-4": (
        f"{_NONE}. Its search counts large errors less, as our half-quadratic one; neither knows which weights the "
        f"model needs, and one or two per cent are what such differences are worth here. {_OURS}"
    ),
    "llama-q3_k_m": "over a bit more per weight: most layers are Q4_0 or Q5_0 here, since rows are no multiple of 256",
    "gptq-3": _TEXT,
    "torchao-intx-3": (
        f"{_NONE}, and both lose most of the language. Neither the whole range that it spans nor a code that is "
        f"exactly 0 accounts for it, as ours by min-max and symmetric ones show; the reason was not found. {_OURS}"
    ),
    "llama-q2_k": "nearly two bits more per weight: all layers but those with rows of a multiple of 256 are Q4_0 here",
    "gptq-2": _TEXT,
}
