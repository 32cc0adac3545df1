"""Calibration: texts to token blocks, and a walk through a model block by block that collects each layer's Hessian.

Only one block's statistics are in memory at a time, beside the hidden states of the calibration sequences.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences, and where they came from.

    Attributes:
        batches: model inputs, each at least ``input_ids`` (1, length) int64.
        source: what the user passed, in a few words.
        tokens: tokens in all of them, padding not counted.
        sha256: digest of the token ids, in order.
    """

    batches: list[Batch]
    source: str
    tokens: int
    sha256: str


def load_calibration(
    dataset: Any, tokenizer: Any = None, *, max_tokens: int = 16384, context: int = 1024, seed: int = 0
) -> CalibrationData:
    """Turn what a user has into token sequences.

    Args:
        dataset: path of a local text file; list of strings (joined by blank lines, then cut); list of token dicts
            (``input_ids``, optionally ``attention_mask``, as lists or tensors; used as they are); or a
            ``datasets.Dataset`` with a column ``input_ids`` or ``text``.
        tokenizer: called on text; may be None for token dicts.
        max_tokens: take no more than about this many tokens.
        context: cut text into sequences of this length.
        seed: which sequences are taken when there are more than enough; the global random state stays untouched.

    Raises:
        ValueError: no such file, no text or tokens in it, a tokenizer is needed and missing, or an unsupported type.
    """
    rows, source = _rows(dataset)
    if isinstance(rows, str):
        sequences = _cut(_tokenize(rows, tokenizer, source), context, source)
        batches = [{"input_ids": s[None]} for s in sequences]
    else:
        batches = [_as_batch(row, index) for index, row in enumerate(rows)]
    if not batches:
        raise ValueError(f"The calibration data ({source}) holds no tokens: pass a longer text")
    batches = _choose(batches, max_tokens, seed)
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["input_ids"].to(torch.int64).contiguous().numpy().tobytes())
    return CalibrationData(batches, source, sum(_real_tokens(b) for b in batches), digest.hexdigest())


def _rows(dataset: Any) -> tuple[str | list[Any], str]:
    """Either one text, or a list of token rows; and a few words about where it came from."""
    if isinstance(dataset, (str, os.PathLike)):
        return _read_text(os.fspath(dataset)), os.path.basename(os.fspath(dataset))
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if "input_ids" in columns:
            keys = [key for key in ("input_ids", "attention_mask") if key in columns]
            return [{key: row[key] for key in keys} for row in dataset], "datasets.Dataset"
        if "text" in columns:
            return "\n\n".join(text for text in dataset["text"] if text), "datasets.Dataset"
        raise ValueError(
            f"The calibration dataset has the columns {columns}: expected 'text' or 'input_ids' among them"
        )
    if isinstance(dataset, (list, tuple)) and dataset:
        if all(isinstance(row, str) for row in dataset):
            return "\n\n".join(dataset), f"{len(dataset)} strings"
        if all(isinstance(row, Mapping) and "input_ids" in row for row in dataset):
            return list(dataset), f"{len(dataset)} token sequences"
    raise ValueError(
        f"Cannot calibrate on {type(dataset).__name__} {str(dataset)[:60]!r}: expected the path of a local text "
        f"file, a "
        "non-empty list of strings, a list of dicts that hold 'input_ids', or a datasets.Dataset"
    )


def _read_text(path: str) -> str:
    if not os.path.isfile(path):
        raise ValueError(f"There is no calibration file {path!r}: pass the path of a local text file")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"The calibration file {path!r} is not UTF-8 text ({error})") from error


def _tokenize(text: str, tokenizer: Any, source: str) -> Tensor:
    if tokenizer is None:
        raise ValueError(f"Calibrating on text ({source}) needs a tokenizer: pass tokenizer=..., or rows of input_ids")
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not callable(tokenizer):
        raise ValueError(f"Cannot tokenize with a {type(tokenizer).__name__}: expected a tokenizer, or the name of one")
    # A long text is one sequence to the tokenizer, which would warn that no model takes so many tokens.
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return torch.as_tensor(ids, dtype=torch.int64)


def _cut(ids: Tensor, context: int, source: str) -> list[Tensor]:
    if ids.numel() < 2:
        raise ValueError(f"The calibration text ({source}) holds {ids.numel()} tokens: pass a longer one")
    whole = [ids[i : i + context] for i in range(0, ids.numel() - context + 1, context)]
    return whole or [ids]


def _as_batch(row: Any, index: int) -> Batch:
    batch = {}
    for key in ("input_ids", "attention_mask"):
        if key == "input_ids" or row.get(key) is not None:
            value = _whole_numbers(row[key], key, index)
            batch[key] = value[None] if value.dim() == 1 else value
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"Calibration row {index} has input_ids of shape {tuple(ids.shape)}: expected (length,) or (1, length)"
        )
    if mask is not None and (mask.shape != ids.shape or not bool(mask.any())):
        raise ValueError(
            f"Calibration row {index} has an attention_mask of shape {tuple(mask.shape)} with {int(mask.sum())} ones: "
            f"expected the shape of its input_ids, {tuple(ids.shape)}, and a 1 for every token that is no padding"
        )
    return batch


def _whole_numbers(value: Any, key: str, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"Calibration row {index} has {key} {str(value)[:60]!r}: expected one list or tensor of whole numbers"
        ) from error
    if tensor.is_floating_point() and tensor.numel():
        raise ValueError(f"Calibration row {index} has {key} of {tensor.dtype}: expected whole numbers")
    return tensor.to(torch.int64)


def _choose(batches: list[Batch], max_tokens: int, seed: int) -> list[Batch]:
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    total = 0
    for index in order:
        tokens = _real_tokens(batches[index])
        if chosen and total + tokens > max_tokens:
            break
        chosen.append(index)
        total += tokens
    return [batches[index] for index in sorted(chosen)]


def _real_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


class HessianSum:
    """H = (2/N) Σ x xᵀ over the rows x that a linear layer was given, summed as they stream by.

    Args:
        in_features: length of a row.
    """

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features
        self.rows = 0
        self._sum: Tensor | None = None  # Σ x xᵀ, float32 (in_features, in_features)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count activations (..., in_features); rows whose ``mask`` (...) is 0 are padding and stay out."""
        rows = x.detach().reshape(-1, self.in_features).float()
        if mask is not None and mask.numel() == rows.shape[0]:
            rows = rows[mask.reshape(-1).bool().to(rows.device)]
        product = rows.t() @ rows
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.rows += rows.shape[0]

    @property
    def hessian(self) -> Tensor | None:
        """(in_features, in_features) float32, or None where no row came by (an expert no token chose)."""
        return None if self._sum is None or self.rows == 0 else self._sum * (2.0 / self.rows)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The stack of decoder or encoder blocks: the ``ModuleList`` of alike modules with the most parameters.

    Returns:
        (name, blocks), or None where a model has no such list, or more than one stack (encoder-decoder models).
    """
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(other + ".") for other, _ in stacks)
        alike = isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(block) for block in module}) == 1
        if alike and not inside_another:
            assert isinstance(module, nn.ModuleList)
            stacks.append((name, module))
    size = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks}
    large = [(name, stack) for name, stack in stacks if size[name] * 5 > max(size.values())]
    return large[0] if len(large) == 1 else None


Statistics = dict[str, Tensor | None]


@torch.no_grad()
def walk(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    visit: Callable[[str, Statistics], None],
) -> None:
    """Go through the model's blocks in order with the float activations of every sequence, one block at a time.

    Every sequence runs alone and without a key/value cache, so none can see another.

    Args:
        model: the float model. ``visit`` may replace a block's layers: the block was already run by then.
        layers: full names of the linear layers whose input statistics are wanted.
        batches: model inputs, see ``CalibrationData.batches``.
        visit: called as ``visit(block name, {layer name: Hessian or None})`` for each block that holds some of
            ``layers``, then once with ``("", ...)`` for the layers outside of the blocks, whose Hessians are None.
            Where no single stack of blocks is found, the whole model counts as one block.
    """
    found = find_blocks(model)
    if found is None:
        runs = ((functools.partial(_run, model, b), b.get("attention_mask")) for b in batches)
        statistics = _collect(model, layers, runs)
        visit("", statistics)
        return
    stack_name, blocks = found
    states, calls = _capture(model, blocks, batches)
    device = next(blocks.parameters()).device
    inside: set[str] = set()
    for index, block in enumerate(blocks):
        name = f"{stack_name}.{index}"
        names = [layer for layer in layers if layer.startswith(name + ".")]
        inside.update(names)
        block_runs = _block_runs(block, states, [call[index] for call in calls], device)
        masks = [b.get("attention_mask") for b in batches]
        statistics = _collect(model, names, zip(block_runs, masks, strict=True))
        if names:
            visit(name, statistics)
    outside = [layer for layer in layers if layer not in inside]
    if outside:
        visit("", dict.fromkeys(outside))


@dataclass(frozen=True)
class _Call:
    """How the model calls one block: the arguments after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None  # name of the hidden states where they are passed by keyword


def _capture(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """Run each sequence once to see what every block is called with (masks and positions may differ between blocks).

    Returns:
        the first block's hidden states per sequence, and the calls as [sequence][block].
    """
    states: list[Tensor] = []
    calls: list[list[_Call]] = []
    current: dict[int, _Call] = {}

    def hook(index: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = None if args else "hidden_states"
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                states.append(hidden.detach().clone())
            others = {k: _without_cache(k, v) for k, v in kwargs.items() if k != keyword}
            current[index] = _Call(tuple(_without_cache("", a) for a in args[1:]), others, keyword)

        return before

    body = getattr(model, "base_model", model)  # without the output head, whose logits nobody needs
    hooks = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for batch in batches:
            current.clear()
            _run(body, batch)
            if len(current) != len(blocks) or len(states) != len(calls) + 1:
                raise RuntimeError(
                    f"Expected every block of {type(model).__name__} to run once per sequence, but {len(current)} of "
                    f"{len(blocks)} ran. Quantize without calibration data instead (dataset=None)."
                )
            calls.append([current[i] for i in range(len(blocks))])
    finally:
        for handle in hooks:
            handle.remove()
    return states, calls


def _without_cache(key: str, value: Any) -> Any:
    """Key/value caches must not travel from one sequence to the next."""
    if key in ("past_key_value", "past_key_values", "layer_past", "cache_params") or hasattr(value, "get_seq_length"):
        return None
    return False if key == "use_cache" else value


def _block_runs(
    block: nn.Module, states: list[Tensor], calls: list[_Call], device: torch.device
) -> Iterator[Callable[[], None]]:
    """One closure a sequence, which runs the block and keeps its output as the next block's input."""

    def run(position: int) -> None:
        call = calls[position]
        hidden = states[position].to(device)
        if call.hidden_keyword is None:
            output = block(hidden, *call.args, **call.kwargs)
        else:
            output = block(**{call.hidden_keyword: hidden}, **call.kwargs)
        states[position] = output[0] if isinstance(output, tuple) else output

    return (functools.partial(run, position) for position in range(len(states)))


def _collect(
    model: nn.Module, names: Sequence[str], runs: Iterable[tuple[Callable[[], Any], Tensor | None]]
) -> Statistics:
    """Run everything with the named layers watched; their Hessians."""
    sums: dict[str, HessianSum] = {}
    mask: Tensor | None = None
    inputs: list[tuple[Tensor, HessianSum]] = []  # of the current run: layers that read one tensor share one sum
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            shared = next((total for tensor, total in inputs if tensor is x), None)
            if shared is None:
                sums[name].add(x, mask)
                inputs.append((x, sums[name]))
            else:
                sums[name] = shared

        return before

    for name in names:
        module = model.get_submodule(name)
        # GPT-2's Conv1D keeps (in, out) under other names.
        weight = module.weight
        assert isinstance(weight, Tensor)
        in_features = int(getattr(module, "in_features", weight.shape[0]))
        sums[name] = HessianSum(in_features)
        hooks.append(module.register_forward_pre_hook(watch(name)))
    try:
        for run, mask in runs:  # noqa: B007  the hooks above read `mask`
            inputs.clear()
            run()
    finally:
        for handle in hooks:
            handle.remove()
    return {name: total.hessian for name, total in sums.items()}


def _run(model: nn.Module, batch: Batch) -> None:
    device = next(p.device for p in model.parameters() if not p.is_meta)
    inputs = {key: value.to(device) for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    model(**inputs)


@torch.no_grad()
def written_by_model(model: Any, tokenizer: Any, tokens: int, seed: int = 0, batch_size: int = 16) -> str:
    """Text that a language model writes itself, sampled at temperature 1 from varied starts.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tokens: about how many tokens to write.
        seed: of the sampling; the global random state is restored.
        batch_size: texts written side by side.

    Returns:
        The texts, joined by blank lines.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    starts = random.Random(seed).sample(ordinary, min(batch_size, len(ordinary)))
    with torch.random.fork_rng():  # of every device, whichever samples
        torch.manual_seed(seed)
        written = model.generate(
            torch.tensor(starts, device=model.device)[:, None],
            attention_mask=torch.ones(len(starts), 1, dtype=torch.int64, device=model.device),
            max_new_tokens=max(2, tokens // len(starts)),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else starts[0],
        )
    return "\n\n".join(tokenizer.batch_decode(written, skip_special_tokens=True))
