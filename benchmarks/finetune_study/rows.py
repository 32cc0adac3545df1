"""Every row: what it starts from, what of it learns, by which objective, at which learning rates."""

from dataclasses import dataclass, field

Rates = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: of its JSON.
        family: the table that it is in: "text", "two_bits", "one_bit" or "memory".
        title: what the table says.
        start: "float", "bf16" (the same, whatever learns), "mpq4", "mpq2", "onebit" or "nf4".
        learns: some of "everything" and "linear" (of a float model), "lora", "codes", "signs", "scales", "norms",
            "embeddings".
        rates: candidates, each with a learning rate for all that learns; `tune` chooses one. That of scales is
            relative. "vote" is the ε of signs.
        options: of DiodeMix.
        peer: whose library it needs: "bnb", or "" for none.
        master: keep in float32 what learns in floating point, with products in bf16 by autocast.
    """

    name: str
    family: str
    title: str
    start: str
    learns: tuple[str, ...]
    rates: tuple[Rates, ...] = ({},)
    options: dict[str, object] = field(default_factory=dict)
    peer: str = ""
    master: bool = False

    @property
    def objective(self) -> str:
        """ "text": the next token; "teacher": the float model's distribution."""
        return "text" if self.family == "text" else "teacher"


_LORA = tuple({"lora": rate} for rate in (3e-4, 1e-3, 3e-3))
_ALL = ("codes", "scales", "embeddings", "norms")
_STATISTICS = ("scales", "norms")


def _both(scales: tuple[float, ...], **more: tuple[float, ...]) -> tuple[Rates, ...]:
    """Candidates one by one: scales and norms at one rate, and others beside them."""
    named = [dict(zip(more, rates, strict=True)) for rates in zip(*more.values(), strict=True)] or [{}] * len(scales)
    return tuple({"scales": rate, "norms": rate, **other} for rate, other in zip(scales, named, strict=True))


_ROWS = (
    Row("text-adamw", "text", "AdamW, all weights in float32, products in bf16", "float", ("everything",),
        tuple({"everything": rate} for rate in (3e-5, 1e-4, 3e-4)), master=True),
    Row("text-adamw-bf16", "text", "AdamW, all in bf16", "bf16", ("everything",),
        tuple({"everything": rate} for rate in (1e-4, 3e-4, 1e-3))),
    Row("text-packed-4", "text", "**DiodeMix, 4-bit codes**, scales, embedding and norms, fused, 8-bit moments", "mpq4",
        _ALL, tuple({"codes": rate, "scales": 1e-3, "embeddings": 3e-4, "norms": 3e-4} for rate in (3e-5, 1e-4, 3e-4)),
        {"fused": True}, master=True),
    Row("text-packed-4-codes", "text", "the same without the scales", "mpq4", ("codes", "embeddings", "norms"),
        ({"codes": 3e-5, "embeddings": 3e-4, "norms": 3e-4},), {"fused": True}, master=True),
    Row("text-lora", "text", "LoRA r16 on bf16", "float", ("lora",), _LORA),
    Row("text-lora-4", "text", "**LoRA r16 on packed 4 bits**", "mpq4", ("lora",), _LORA),
    Row("text-lora-nf4", "text", "LoRA r16 on bitsandbytes nf4 (QLoRA)", "nf4", ("lora",), _LORA, peer="bnb"),
    Row("onebit-scales", "one_bit", "scales and norms", "onebit", _STATISTICS, _both((3e-4, 1e-3, 3e-3))),
    Row("onebit-packed", "one_bit", "**packed signs**, scales and norms", "onebit", ("signs", *_STATISTICS),
        _both((1e-3,) * 3, signs=(3e-4, 1e-3, 3e-3), vote=(3.0,) * 3)),
    Row("onebit-lora", "one_bit", "LoRA r16", "onebit", ("lora",), _LORA),
    Row("twobits-packed", "two_bits", "**DiodeMix, 2-bit codes**, scales and norms, fused, 8-bit moments", "mpq2",
        ("codes", *_STATISTICS), _both((1e-3,) * 3, codes=(1e-4, 3e-4, 1e-3)), {"fused": True}),
    Row("twobits-scales", "two_bits", "scales and norms", "mpq2", _STATISTICS, _both((3e-4, 1e-3, 3e-3))),
    Row("twobits-lora", "two_bits", "LoRA r16", "mpq2", ("lora",), _LORA),
    Row("memory-adamw", "memory", "AdamW, all weights in float32", "float", ("linear",), ({"linear": 0.0},),
        master=True),
    Row("memory-adamw-bf16", "memory", "AdamW, all in bf16", "bf16", ("linear",), ({"linear": 0.0},)),
    Row("memory-lora", "memory", "LoRA r16 on bf16", "float", ("lora",), ({"lora": 0.0},)),
    Row("memory-lora-nf4", "memory", "LoRA r16 on bitsandbytes nf4 (QLoRA)", "nf4", ("lora",), ({"lora": 0.0},),
        peer="bnb"),
    Row("memory-lora-4", "memory", "LoRA r16 on packed 4 bits", "mpq4", ("lora",), ({"lora": 0.0},)),
    Row("memory-packed-4", "memory", "**DiodeMix, 4-bit codes**, fused, 8-bit moments", "mpq4", ("codes",),
        ({"codes": 0.0},), {"fused": True}),
    Row("memory-packed-4-scales", "memory", "**DiodeMix, 4-bit codes** and scales, fused, 8-bit moments", "mpq4",
        ("codes", "scales"), ({"codes": 0.0, "scales": 1e-3},), {"fused": True}),
    Row("memory-packed-4-factored", "memory", "**DiodeMix, 4-bit codes**, fused, factored moments", "mpq4", ("codes",),
        ({"codes": 0.0},), {"fused": True, "states": "factored"}),
    Row("memory-packed-4-rank", "memory", "**DiodeMix, 4-bit codes**, fused, rank 16", "mpq4", ("codes",),
        ({"codes": 0.0},), {"fused": True, "rank": 16}),
    Row("memory-packed-4-plain", "memory", "DiodeMix, 4-bit codes, not fused, 8-bit moments", "mpq4", ("codes",),
        ({"codes": 0.0},)),
)  # fmt: skip
ROWS = {row.name: row for row in _ROWS}
