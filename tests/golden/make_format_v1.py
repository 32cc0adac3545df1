"""Write the golden files of format version 1: plain Python, nothing of hf_onebit, torch or safetensors.

    python tests/golden/make_format_v1.py FOLDER

The committed files pin the format for ever; a test checks that this script still makes them. It is also the
oracle of the packing tests, and shows how small a writer can be.
"""

import json
import random
import struct
import sys
from pathlib import Path

NAMES = (
    "packing_v1.json",
    "onebit_v1_1plane.safetensors",
    "onebit_v1_2planes.safetensors",
    "onebit_v1.json",
    "mpq_v1_1bit_symmetric.safetensors",
    "mpq_v1_3bits.safetensors",
    "mpq_v1_4bits_symmetric.safetensors",
    "mpq_v1_8bits.safetensors",
    "mpq_v1.json",
    "mpq_v1_4bits_g_idx.safetensors",
    "mpq_v1_3bits_double_quant.safetensors",
    "mbwq_v1_2bits_q_perm_symmetric.safetensors",
    "mbwq_v1_6and3bits_q_perm.safetensors",
    "orders_v1.json",
)
LAYER = "model.layers.0.mlp.up_proj"
IN, OUT = 40, 5
METADATA = {
    "format": "pt",
    "quant_library": "hf_onebit",
    "quant_method": "onebit",
    "quant_format_version": "1",
}


def naive_pack(codes: list[list[int]], bits: int, in_features: int) -> list[list[int]]:
    """Codes [out][in] to unsigned words [ceil(in / 32) * bits][out], by way of strings of '0' and '1'."""
    rows = -(-in_features // 32) * bits
    words = [[0] * len(codes) for _ in range(rows)]
    for n, column in enumerate(codes):
        padded = column + [0] * (-in_features % 32)
        for k in range(len(padded) // 32):
            # Least significant bit first, so the stream reads from left to right.
            stream = "".join(format(code, f"0{bits}b")[::-1] for code in padded[32 * k : 32 * k + 32])
            for w in range(bits):
                words[k * bits + w][n] = int(stream[32 * w : 32 * w + 32][::-1], 2)
    return words


def words_to_bytes(words: list[list[int]]) -> bytes:
    return b"".join(struct.pack("<I", word) for row in words for word in row)


def packing_cases() -> list[dict[str, object]]:
    rng = random.Random(1)
    cases: list[dict[str, object]] = []
    for bits in range(1, 9):
        for out_features, in_features in ((3, 37), (2, 64), (1, 1)):
            codes = [[rng.randrange(1 << bits) for _ in range(in_features)] for _ in range(out_features)]
            codes[0][0] = codes[-1][-1] = (1 << bits) - 1
            words = words_to_bytes(naive_pack(codes, bits, in_features))
            flat = bytes(code for row in codes for code in row)
            cases.append(
                {
                    "bits": bits,
                    "out": out_features,
                    "in": in_features,
                    "codes": flat.hex(),
                    "words": words.hex(),
                }
            )
    return cases


def layer(planes: int) -> tuple[dict[str, tuple[str, list[int], bytes]], list[list[float]]]:
    """One layer's tensors by name (dtype, shape, bytes), and the matrix they stand for."""
    rng = random.Random(2)
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    matrix = [[0.0] * IN for _ in range(OUT)]
    for suffix in ("", "_1")[:planes]:
        signs = [[rng.randrange(2) for _ in range(IN)] for _ in range(OUT)]
        # Eighths and sixty-fourths: exact in float16, and every product and sum below is exact in float32.
        a = [rng.randrange(1, 64) / 8 * rng.choice((1, -1)) for _ in range(OUT)]
        b = [rng.randrange(1, 64) / 64 for _ in range(IN)]
        for n in range(OUT):
            for i in range(IN):
                matrix[n][i] += a[n] * b[i] * (1 if signs[n][i] else -1)
        words = words_to_bytes(naive_pack(signs, 1, IN))
        tensors[f"{LAYER}.weight{suffix}"] = ("I32", [-(-IN // 32), OUT], words)
        tensors[f"{LAYER}.a{suffix}"] = ("F16", [OUT], struct.pack(f"<{OUT}e", *a))
        tensors[f"{LAYER}.b{suffix}"] = ("F16", [IN], struct.pack(f"<{IN}e", *b))
    return tensors, matrix


def group_layer(bits: int, group_size: int, symmetric: bool) -> tuple[dict[str, tuple[str, list[int], bytes]], list]:
    """One group-quantized layer, as :func:`layer`."""
    rng = random.Random(3)
    groups = 1 if group_size == -1 else -(-IN // group_size)
    codes = [[rng.randrange(1 << bits) for _ in range(IN)] for _ in range(OUT)]
    # Few bits, as above.
    scales = [[rng.randrange(1, 64) / 64 * rng.choice((1, -1)) for _ in range(OUT)] for _ in range(groups)]
    zeros = [[rng.randrange(-64, 64) / 16 for _ in range(OUT)] for _ in range(groups)]
    if symmetric:
        zero_point = 0.5 if bits == 1 else 2 ** (bits - 1)
        zeros = [[scale * zero_point for scale in row] for row in scales]
    group = [0 if group_size == -1 else i // group_size for i in range(IN)]
    matrix = [[scales[group[i]][n] * codes[n][i] - zeros[group[i]][n] for i in range(IN)] for n in range(OUT)]
    halves = {"scales": scales} if symmetric else {"scales": scales, "zeros": zeros}
    words = words_to_bytes(naive_pack(codes, bits, IN))
    tensors = {f"{LAYER}.weight": ("I32", [-(-IN // 32) * bits, OUT], words)}
    for name, rows in halves.items():
        data = b"".join(struct.pack(f"<{OUT}e", *row) for row in rows)
        tensors[f"{LAYER}.{name}"] = ("F16", [groups, OUT], data)
    return tensors, matrix


def half(value: float) -> float:
    """The nearest float16."""
    return struct.unpack("<e", struct.pack("<e", value))[0]


def order_layer(
    blocks: list[tuple[int, int, int]], symmetric: bool, order: str
) -> tuple[dict[str, tuple[str, list[int], bytes]], list]:
    """One layer whose inputs have an order of their own, named by ``order``, as :func:`layer`.

    blocks: (bits, rows, group_size); one of them for "g_idx".
    """
    rng = random.Random(4)
    widths = [bits for bits, rows, _ in blocks for _ in range(rows)]
    group, first = [], 0
    for _, rows, size in blocks:
        group += [first + i // size for i in range(rows)]
        first = group[-1] + 1
    perm = list(range(IN))
    if order == "q_perm":
        rng.shuffle(perm)
    else:
        group = [rng.randrange(first) for _ in range(IN)]
    codes = [[rng.randrange(1 << bits) for bits in widths] for _ in range(OUT)]
    scales = [[rng.randrange(1, 64) / 64 * rng.choice((1, -1)) for _ in range(OUT)] for _ in range(first)]
    zeros = [[rng.randrange(-64, 64) / 16 for _ in range(OUT)] for _ in range(first)]
    matrix = [[0.0] * IN for _ in range(OUT)]
    for n in range(OUT):
        for r, bits in enumerate(widths):
            scale = scales[group[r]][n]
            zero = scale * (0.5 if bits == 1 else 2 ** (bits - 1)) if symmetric else zeros[group[r]][n]
            matrix[n][perm[r]] = scale * codes[n][r] - zero
    words, start = [], 0
    for bits, rows, _ in blocks:
        words += naive_pack([column[start : start + rows] for column in codes], bits, rows)
        start += rows
    tensors = {f"{LAYER}.weight": ("I32", [len(words), OUT], words_to_bytes(words))}
    for name, rows_of in {"scales": scales, "zeros": zeros}.items():
        if name == "scales" or not symmetric:
            data = b"".join(struct.pack(f"<{OUT}e", *row) for row in rows_of)
            tensors[f"{LAYER}.{name}"] = ("F16", [first, OUT], data)
    index = perm if order == "q_perm" else group
    tensors[f"{LAYER}.{order}"] = ("I32", [IN], struct.pack(f"<{IN}i", *index))
    return tensors, matrix


def double_quant_layer(bits: int, group_size: int) -> tuple[dict[str, tuple[str, list[int], bytes]], list]:
    """One group-quantized layer whose statistics are quantized themselves, scales in 5 bits and zeros in 4."""
    rng = random.Random(5)
    tensors, _ = group_layer(bits, group_size, symmetric=False)
    del tensors[f"{LAYER}.scales"], tensors[f"{LAYER}.zeros"]
    groups = -(-IN // group_size)
    values = {}
    for name, width in (("scales", 5), ("zeros", 4)):
        codes = [[rng.randrange(1 << width) for _ in range(OUT)] for _ in range(groups)]
        offsets, steps = (
            [rng.randrange(-4, 12) for _ in range(groups)],
            [rng.randrange(16, 32) / 512 for _ in range(groups)],
        )
        words = naive_pack(codes, width, OUT)
        tensors[f"{LAYER}.q{name}"] = ("I32", [len(words), groups], words_to_bytes(words))
        tensors[f"{LAYER}.q{name}_zeros"] = ("F16", [groups, 1], struct.pack(f"<{groups}e", *offsets))
        # bfloat16: the upper half of a float32 that has no more bits.
        halves = b"".join(struct.pack("<f", step)[2:] for step in steps)
        tensors[f"{LAYER}.q{name}_scales"] = ("BF16", [groups, 1], halves)
        values[name] = [[(q - offsets[g]) * steps[g] for q in codes[g]] for g in range(groups)]
    scales = [[half(v) for v in row] for row in values["scales"]]
    middle = 2 ** (bits - 1)
    zeros = [
        [half(v + s * middle) for v, s in zip(*rows, strict=True)] for rows in zip(values["zeros"], scales, strict=True)
    ]
    rng = random.Random(3)  # the codes of group_layer
    codes = [[rng.randrange(1 << bits) for _ in range(IN)] for _ in range(OUT)]
    matrix = [
        [scales[i // group_size][n] * codes[n][i] - zeros[i // group_size][n] for i in range(IN)] for n in range(OUT)
    ]
    return tensors, matrix


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header: dict[str, object] = {"__metadata__": METADATA}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def main(folder: Path) -> None:
    (folder / "packing_v1.json").write_text(json.dumps(packing_cases(), indent=1) + "\n", encoding="utf-8")
    expected = {}
    for planes in (1, 2):
        tensors, matrix = layer(planes)
        name = f"onebit_v1_{planes}plane{'s' if planes > 1 else ''}.safetensors"
        (folder / name).write_bytes(safetensors_bytes(tensors))
        expected[name] = {"layer": LAYER, "in": IN, "out": OUT, "planes": planes, "matrix": matrix}
    (folder / "onebit_v1.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")
    expected = {}
    for bits, group_size, symmetric in ((1, 32, True), (3, 32, False), (4, -1, True), (8, 64, False)):
        tensors, matrix = group_layer(bits, group_size, symmetric)
        name = f"mpq_v1_{bits}bit{'s' if bits > 1 else ''}{'_symmetric' if symmetric else ''}.safetensors"
        (folder / name).write_bytes(safetensors_bytes(tensors))
        about = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        expected[name] = {"layer": LAYER, "in": IN, "out": OUT, **about, "matrix": matrix}
    (folder / "mpq_v1.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")
    expected = {}
    for name, blocks, symmetric, order in (
        ("mpq_v1_4bits_g_idx.safetensors", [(4, IN, 32)], False, "g_idx"),
        ("mpq_v1_3bits_double_quant.safetensors", [(3, IN, 32)], False, "double_quant"),
        ("mbwq_v1_2bits_q_perm_symmetric.safetensors", [(2, IN, 32)], True, "q_perm"),
        ("mbwq_v1_6and3bits_q_perm.safetensors", [(6, 32, 32), (3, IN - 32, 32)], False, "q_perm"),
    ):
        entry = {"method": "mpq", "bits": blocks[0][0], "group_size": 32, "symmetric": symmetric, "in_features": IN}
        if order == "double_quant":
            tensors, matrix = double_quant_layer(3, 32)
            entry["double_quant"] = {"scale_bits": 5, "zero_bits": 4, "block": 32}
        else:
            tensors, matrix = order_layer(blocks, symmetric, order)
            entry[order] = True
        if len(blocks) > 1:
            entry["blocks"] = blocks
        (folder / name).write_bytes(safetensors_bytes(tensors))
        expected[name] = {"layer": LAYER, "in": IN, "out": OUT, "entry": entry, "matrix": matrix}
    (folder / "orders_v1.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
