"""A tokenizer's vocabulary in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_onebit.loading import load_tokenizer
from hf_onebit.storage.checkpoint import read_json

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before merging, and llama.cpp's name for it.
_SPLITS = {
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}": "qwen2",
}
_REMEDY = (
    "leave the vocabulary out (--no-vocabulary) and pass token ids, or convert a float copy with llama.cpp's tools"
)


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Write tokens, merges, special tokens and the chat template of the tokenizer beside a model.

    Args:
        writer: a ``gguf.GGUFWriter``.
        folder: where tokenizer.json is.
        size: rows of the model's embedding; ids without a token get one that is never used.

    Raises:
        ValueError: there is no tokenizer.json, or it is of a kind that is not written.
    """
    import gguf

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no tokenizer.json: expected the tokenizer beside the model; {_REMEDY}")
    tokenizer = read_json(path)
    cut = pre_tokenizer_name(tokenizer)
    if cut is None:
        kind = (tokenizer.get("model") or {}).get("type")
        raise ValueError(
            f"{path} is a {kind} tokenizer that cuts text in a way which has no name here: expected byte-level BPE cut "
            f"as by GPT-2, SmolLM, Llama 3 or Qwen 2; {_REMEDY}"
        )
    texts = {int(number): text for text, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in tokenizer.get("added_tokens") or ():
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
    if max(texts) >= size:
        raise ValueError(
            f"{path} has the token id {max(texts)}, and the model's embedding {size} rows: expected a row for each. "
            "The tokenizer is another model's: copy the right one"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_special_token |= _added(folder)
    special.add_to_gguf(writer, quiet=True)


def _added(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer puts a token before and after each text; said always, since llama.cpp has defaults."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("a")["input_ids"]
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer.json cuts text; None where it has none, or where tokens are not of bytes."""
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or "vocab" not in model:
        return None
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [part.get("type") for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    own_cuts = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own_cuts:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own_cuts and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own_cuts and not parts[0].get("invert"):
        return _SPLITS.get(str((parts[0].get("pattern") or {}).get("Regex")))
    return None
