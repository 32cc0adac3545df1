"""Calibration: texts to sequences, and the walk's statistics against those of plain forward passes."""

import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CAUSAL, OTHERS, tiny_chat_tokenizer, tiny_gemma3, tiny_ids, tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import DynamicCache

from hf_onebit import MPQConfig, OneBitConfig
from hf_onebit.calibration import load_calibration
from hf_onebit.nn import find_layers
from hf_onebit.rungs.blocks import find_blocks
from hf_onebit.rungs.hessian_sums import HessianSum
from hf_onebit.rungs.walk import walk

TEXT = "The little boat drifted down the river until the sun had set behind the hills. " * 20
MODELS = {**CAUSAL, **OTHERS}

# -------------------------------------------------------------------------------------------------- sequences


def dataset(**columns: Any) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def ids_of(text: str) -> Tensor:
    return tiny_tokenizer()(text, return_tensors="pt").input_ids[0]


def joined(data: Any) -> Tensor:
    return torch.cat([batch["input_ids"][0] for batch in data.batches])


def test_text_is_tokenized_once_and_cut(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    data = load_calibration(str(tmp_path / "text.txt"), tiny_tokenizer(), max_tokens=10**6, context=100)
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(1, 100)] * 15
    assert torch.equal(joined(data), ids_of(TEXT)[:1500])  # the rest of 80 tokens is no whole sequence
    assert all(batch["input_ids"].dtype == torch.int64 for batch in data.batches)
    assert (data.source, data.tokens) == ("text.txt", 1500)


def test_all_forms_of_a_text_give_the_same_sequences(tmp_path: Path) -> None:
    parts = ["one " * 30, "two " * 30]
    (tmp_path / "text.txt").write_text("\n\n".join(parts), encoding="utf-8")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    forms: list[tuple[Any, Any]] = [
        (tmp_path / "text.txt", tiny_tokenizer()),
        (parts, tiny_tokenizer()),
        (tuple(parts), str(tmp_path / "tokenizer")),
        (dataset(text=[parts[0], "", None, parts[1]], label=[0, 1, 2, 3]), tiny_tokenizer()),
    ]
    results = [load_calibration(form, tokenizer, context=32) for form, tokenizer in forms]
    assert len({result.sha256 for result in results}) == 1
    assert len({result.tokens for result in results}) == 1
    assert [result.source for result in results] == ["text.txt", "2 strings", "2 strings", "datasets.Dataset"]


def test_a_text_shorter_than_the_context_is_one_sequence() -> None:
    data = load_calibration(["hello"], tiny_tokenizer(), context=1024)
    assert torch.equal(joined(data), ids_of("hello"))
    assert data.tokens == 5


def test_token_rows_are_taken_as_they_are() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [1, 2, 3]},
        {"input_ids": torch.tensor([[8, 9, 0]]), "attention_mask": [1, 1, 0]},
        {"input_ids": np.array([3, 4]), "attention_mask": None},
    ]
    data = load_calibration(rows, context=2)
    assert [batch["input_ids"].tolist() for batch in data.batches] == [[[5, 6, 7]], [[8, 9, 0]], [[3, 4]]]
    assert [sorted(batch) for batch in data.batches] == [["input_ids"], ["attention_mask", "input_ids"], ["input_ids"]]
    assert data.batches[1]["attention_mask"].tolist() == [[1, 1, 0]]
    assert (data.tokens, data.source) == (7, "3 token sequences")  # padding is not counted


def test_a_dataset_of_token_rows() -> None:
    columns = {"input_ids": [[5, 6, 0], [7, 8, 9]], "attention_mask": [[1, 1, 0], [1, 1, 1]], "text": ["a", "b"]}
    data = load_calibration(dataset(**columns))
    assert torch.cat([batch["input_ids"] for batch in data.batches]).tolist() == columns["input_ids"]
    assert data.tokens == 5


def test_the_digest_is_that_of_the_token_ids() -> None:
    import hashlib

    data = load_calibration([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    assert data.sha256 == hashlib.sha256(np.array([1, 2, 3], dtype="<i8").tobytes()).hexdigest()


@pytest.mark.parametrize(("max_tokens", "sequences"), [(64, 4), (79, 4), (80, 5), (10**6, 98)])
def test_no_more_tokens_than_asked_for(max_tokens: int, sequences: int) -> None:
    data = load_calibration([TEXT], tiny_tokenizer(), max_tokens=max_tokens, context=16)
    assert len(data.batches) == sequences
    assert data.tokens == 16 * sequences


@pytest.mark.parametrize(("max_tokens", "length"), [(1000, 1000), (300, 300), (2, 2), (1, 2)])
def test_a_context_above_what_is_asked_for_gives_no_more(max_tokens: int, length: int) -> None:
    """Of one token there is nothing to predict."""
    data = load_calibration([TEXT], tiny_tokenizer(), max_tokens=max_tokens, context=2048, seed=1)
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(1, length)]


def test_which_sequences_of_a_text_are_chosen_stays() -> None:
    """Results that were published name these digests' texts."""
    text = "".join(chr(97 + i % 26) + str(i * 7919 % 1013) for i in range(4000))
    digests = [
        load_calibration([text], tiny_tokenizer(), max_tokens=tokens, context=context, seed=2).sha256[:12]
        for tokens, context in [(1024, 64), (2048, 2048), (4096, 512), (79, 16)]
    ]
    assert digests == ["c1986c6b5f42", "0f46e68a8d13", "dd492a4e03d0", "d720954ff18e"]


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_are_too_long_are_passed_over(seed: int) -> None:
    rows = [{"input_ids": [length] * length} for length in (3000, 100, 150, 20)]
    data = load_calibration(rows, max_tokens=300, seed=seed)
    assert [int(batch["input_ids"][0, 0]) for batch in data.batches] == [100, 150, 20]
    assert (data.tokens, data.whole) == (270, True)
    some = load_calibration(rows, max_tokens=200, seed=seed)
    assert some.tokens in (120, 170)  # whatever is first, the shortest finds room
    assert not some.whole
    least = load_calibration(rows[:3], max_tokens=50, seed=seed)
    assert [batch["input_ids"].shape[1] for batch in least.batches] == [100]


def test_a_conversation_is_no_longer_than_what_is_asked_for() -> None:
    data = load_calibration(CHATS, tiny_chat_tokenizer(), max_tokens=7)
    assert data.tokens == 7


def test_a_batch_of_several_rows_is_as_good_as_its_rows() -> None:
    ids = tiny_ids(4, 12)
    pairs, single = ([{"input_ids": part} for part in ids.split(size)] for size in (2, 1))
    data = load_calibration(pairs)
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(2, 12), (2, 12)]
    assert (data.tokens, data.sha256) == (48, load_calibration(single).sha256)
    name, found = "model.layers.0.mlp.down_proj", []
    for rows in (pairs, single):
        walk(tiny_llama(layers=1), [name], load_calibration(rows).batches, lambda _, sums: found.append(sums[name]))
    torch.testing.assert_close(*found)


def test_one_context_is_the_default_of_all() -> None:
    default = inspect.signature(load_calibration).parameters["context"].default
    assert default == OneBitConfig().calibration_context == MPQConfig().calibration_context


def test_the_seed_alone_chooses_the_sequences() -> None:
    text = "".join(chr(97 + i % 26) + str(i) for i in range(600))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def chosen(seed: int) -> Any:
        return load_calibration([text], tiny_tokenizer(), max_tokens=128, context=16, seed=seed)

    first = chosen(3)
    random.seed(99)
    assert chosen(3).sha256 == first.sha256
    assert chosen(4).sha256 != first.sha256
    random.setstate(states[0])
    chosen(5)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    positions = [text.index(tiny_tokenizer().decode(b["input_ids"][0])) for b in first.batches]
    assert positions == sorted(positions)  # in the order of the text


# ------------------------------------------------------------------------------------------------ the Hessian


@pytest.mark.parametrize("split", [[30], [1] * 30, [7, 0, 23], [29, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hessian_is_that_of_all_rows_however_they_come(split: list[int], dtype: torch.dtype) -> None:
    X = torch.randn(30, 12).to(dtype)
    total = HessianSum(12)
    for piece in X.split(split):
        total.add(piece.reshape(1, -1, 12))
    assert total.rows == 30
    expected = 2 / 30 * X.double().T @ X.double()
    torch.testing.assert_close(total.hessian, expected.float(), rtol=1e-5, atol=1e-6)


def test_padding_stays_out_of_the_hessian() -> None:
    X = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    padded = X.masked_fill(mask[..., None] == 0, 1e6)
    total = HessianSum(8)
    total.add(padded, mask)
    rows = X[mask.bool()]
    assert total.rows == 7
    torch.testing.assert_close(total.hessian, 2 / 7 * rows.T @ rows, rtol=1e-5, atol=1e-6)


def test_no_rows_no_hessian() -> None:
    total = HessianSum(8)
    assert total.hessian is None
    total.add(torch.zeros(0, 8))
    assert total.hessian is None


# ----------------------------------------------------------------------------------------------------- blocks

BLOCKS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "mamba": "backbone.layers",
    "bert": "bert.encoder.layer",
    "t5": None,  # two stacks: the whole model counts as one block
}


@pytest.mark.parametrize("name", MODELS)
def test_the_stack_of_blocks_is_found(name: str) -> None:
    model = MODELS[name]()
    found = find_blocks(model)
    expected = BLOCKS.get(name, "model.layers")
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == expected
        assert found[1] is model.get_submodule(expected)
        assert len(found[1]) == 2


def test_a_model_without_a_stack() -> None:
    assert find_blocks(torch.nn.Linear(3, 3)) is None


# ------------------------------------------------------------------------------------------------------- walk


def sequences() -> list[dict[str, Tensor]]:
    """Of several lengths, longer than Gemma's window, and one with padding."""
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[:, 15:] = 0
    return [
        {"input_ids": tiny_ids(1, 24, seed=1)},
        {"input_ids": tiny_ids(1, 20, seed=2), "attention_mask": mask},
        {"input_ids": tiny_ids(1, 9, seed=3)},
    ]


def brute_force(model: Any, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """2/N Σ x xᵀ of each layer's inputs in plain forward passes, in float64."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    keep = torch.ones(0, dtype=torch.bool)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            inputs[name].append(args[0].detach().flatten(0, -2)[keep].double())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    for batch in batches:
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
        more = {"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            model(**batch, **more)
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(pieces) for name, pieces in inputs.items()}
    return {name: 2 / len(X) * X.T @ X for name, X in rows.items()}


def collected(model: Any, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor | None]:
    result: dict[str, Tensor | None] = {}
    walk(model, names, batches, lambda _, statistics: result.update(statistics))
    return result


def assert_same_statistics(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, hessian in expected.items():
        assert got[name] is not None, name
        error = (got[name].double() - hessian).norm() / hessian.norm()
        assert error < 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_the_walk_collects_what_plain_forward_passes_see(name: str) -> None:
    model = MODELS[name]()
    names = list(find_layers(model).selected)
    assert names
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    got = collected(model, names, sequences())
    found = find_blocks(model)
    outside = [name for name in names if found is not None and not name.startswith(found[0])]
    assert [got.pop(layer) for layer in outside] == [None] * len(outside)
    assert len(got) >= 2
    assert_same_statistics(got, brute_force(model, list(got), sequences()))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gemmas_blocks_get_each_their_own_mask() -> None:
    # With one mask for all blocks this would not tell sliding from full attention apart.
    model = tiny_gemma3()
    names = [name for name in find_layers(model).selected if name.endswith("o_proj")]
    assert [block.self_attn.is_sliding for block in model.model.layers] == [True, False]
    long = [{"input_ids": tiny_ids(1, 60)}]
    expected = brute_force(model, names, long)
    assert_same_statistics(collected(model, names, long), expected)
    for window, index in ((60, 0), (8, 1)):
        model.config.sliding_window = window
        model.model.config.sliding_window = window
        changed = brute_force(model, names, long)
        difference = (changed[names[index]] - expected[names[index]]).norm() / expected[names[index]].norm()
        assert difference > 1e-4


@pytest.mark.parametrize("depends", [False, True])
def test_hidden_states_are_exactly_those_of_the_whole_model(depends: bool) -> None:
    # Blocks are not computed just to see their calls, unless what they are called with depends on what they compute.
    model = tiny_llama(layers=3)
    if depends:
        third = model.model.layers[2]
        inner = third.forward

        def with_scale(hidden: Tensor, scale: Tensor | None = None, **kwargs: object) -> Tensor:
            output: Tensor = inner(hidden, **kwargs)
            return output + scale

        third.forward = with_scale
        third.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {"scale": args[0].mean(), **kwargs}), with_kwargs=True, prepend=True
        )
    seen: list[Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for batch in sequences():
        model.model(**batch, use_cache=False)
    whole = list(seen)
    seen.clear()
    collected(model, list(find_layers(model).selected), sequences())
    handle.remove()
    assert len(whole) == 3
    assert all(torch.equal(one, walked) for one, walked in zip(whole, seen[-3:], strict=True))
    assert sum(any(torch.equal(one, early) for one in whole) for early in seen[:-3]) == (3 if depends else 1)
    assert "forward" not in vars(model.model.layers[0])


def test_what_visit_does_to_a_block_does_not_reach_the_next() -> None:
    model = tiny_llama()
    names = [name for name in find_layers(model).selected if name != "lm_head"]
    expected = brute_force(model, names, sequences())
    got: dict[str, Tensor | None] = {}

    def ruin(block: str, statistics: dict[str, Tensor | None]) -> None:
        got.update(statistics)
        for name in statistics:
            model.get_submodule(name).weight.data.zero_()

    walk(model, names, sequences(), ruin)
    assert_same_statistics(got, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_no_sequence_sees_another(name: str) -> None:
    model = MODELS[name]()
    model.config.use_cache = True
    names = list(find_layers(model).selected)
    first, second = {"input_ids": tiny_ids(1, 24, seed=1)}, {"input_ids": tiny_ids(1, 24, seed=2)}
    forward, backward = collected(model, names, [first, second]), collected(model, names, [second, first])
    alone = [collected(model, names, [batch]) for batch in (first, second)]
    for layer in names:
        torch.testing.assert_close(forward[layer], backward[layer], rtol=1e-4, atol=1e-6)
        mean = (alone[0][layer] + alone[1][layer]) / 2  # type: ignore[operator]
        torch.testing.assert_close(forward[layer], mean, rtol=1e-4, atol=1e-6)
    assert model.config.use_cache is True


def test_a_cache_that_a_model_keeps_whatever_it_is_told_stays_out() -> None:
    """Blocks run again after they were watched, and must not find their own first run in it."""
    names = list(find_layers(tiny_llama()).selected)
    batches = [{"input_ids": tiny_ids(1, 24, seed=seed)} for seed in (1, 2)]
    wanted = collected(tiny_llama(), names, batches)
    model: Any = tiny_llama()
    forward, handed = model.model.forward, []

    def stubborn(*args: Any, **kwargs: Any) -> Any:
        handed.append(DynamicCache(config=model.config))
        return forward(*args, **{**kwargs, "use_cache": True, "past_key_values": handed[-1]})

    model.model.forward = stubborn
    found = collected(model, names, batches)
    assert handed[0].get_seq_length() == 24  # blocks do fill it
    for name in names:
        torch.testing.assert_close(found[name], wanted[name])


def test_blocks_are_visited_in_order_and_the_rest_last() -> None:
    model = tiny_llama(layers=3)
    visits: list[tuple[str, list[str]]] = []
    kinds: dict[str, set[bool]] = {}

    def visit(block: str, statistics: dict[str, Tensor | None]) -> None:
        visits.append((block, list(statistics)))
        kinds[block] = {hessian is None for hessian in statistics.values()}

    layers = ["lm_head", "model.layers.2.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    walk(model, layers, sequences(), visit)
    assert visits == [("model.layers.0", layers[2:]), ("model.layers.2", layers[1:2]), ("", ["lm_head"])]
    assert kinds == {"model.layers.0": {False}, "model.layers.2": {False}, "": {True}}


def test_without_a_single_stack_the_whole_model_is_one_block() -> None:
    model = MODELS["t5"]()
    names = list(find_layers(model).selected)
    visits: list[tuple[str, int]] = []
    walk(model, names, sequences(), lambda block, statistics: visits.append((block, len(statistics))))
    assert visits == [("", len(names))]


def test_a_layer_that_is_never_called_has_no_statistics() -> None:
    model = tiny_llama()
    model.model.layers[0].spare = torch.nn.Linear(64, 64)
    got = collected(model, ["model.layers.0.spare", "model.layers.0.mlp.up_proj"], sequences())
    assert got["model.layers.0.spare"] is None
    assert got["model.layers.0.mlp.up_proj"] is not None


def test_blocks_that_do_not_all_run_are_told() -> None:
    model = tiny_llama()
    model.model.layers[1].forward = model.model.layers[0].forward  # still called, so nothing is wrong yet
    collected(model, ["model.layers.0.mlp.up_proj"], sequences())
    model.model.config.num_hidden_layers = 1  # Llama runs that many of its blocks
    with pytest.raises(RuntimeError, match=r"to run once per sequence, but 1 of 2 ran\. Quantize without calibration"):
        collected(model, ["model.layers.0.mlp.up_proj"], sequences())
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------- conversations

CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello you"}],
    [{"role": "user", "content": "x" * 50}],
]


def chat_text(messages: list[dict[str, str]]) -> str:
    return "".join(f"<s>{m['role']}:{m['content']}</s>" for m in messages)


def shared(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


@pytest.mark.parametrize(
    ("form", "source"),
    [
        (lambda path: CHATS, "2 conversations"),
        (lambda path: [{"messages": chat, "id": 7} for chat in CHATS], "2 conversations"),
        (lambda path: [{"conversations": shared(chat)} for chat in CHATS], "2 conversations"),
        (lambda path: dataset(messages=CHATS, text=["a", "b"]), "datasets.Dataset"),
        (lambda path: dataset(conversations=[shared(chat) for chat in CHATS]), "datasets.Dataset"),
        (lambda path: lines(path, [{"messages": chat} for chat in CHATS]), "rows.jsonl"),
        (lambda path: lines(path, CHATS), "rows.jsonl"),
    ],
)
def test_each_conversation_is_a_sequence_in_the_chat_template(
    form: Callable[[Path], Any], source: str, tmp_path: Path
) -> None:
    data = load_calibration(form(tmp_path), tiny_chat_tokenizer(), context=40)
    expected = [tiny_tokenizer()(chat_text(chat), return_tensors="pt").input_ids[0, :40] for chat in CHATS]
    assert [len(ids) for ids in expected] == [30, 40]
    assert len(data.batches) == 2
    for batch, ids in zip(data.batches, expected, strict=True):
        assert torch.equal(batch["input_ids"], ids[None])
    assert (data.source, data.tokens) == (source, 70)


def lines(folder: Path, rows: list[Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return file


def test_one_conversation_alone_is_one_sequence() -> None:
    data = load_calibration(CHATS[0], tiny_chat_tokenizer())
    assert tiny_tokenizer().decode(data.batches[0]["input_ids"][0]) == chat_text(CHATS[0])
    assert (len(data.batches), data.source) == (1, "1 conversation")


def test_lines_of_text_are_one_text(tmp_path: Path) -> None:
    expected = load_calibration(["one " * 30, "two " * 30], tiny_tokenizer(), context=32)
    for rows in (["one " * 30, "two " * 30], [{"text": "one " * 30, "id": 1}, {"text": "two " * 30}]):
        data = load_calibration(str(lines(tmp_path, rows)), tiny_tokenizer(), context=32)
        assert (data.sha256, data.source) == (expected.sha256, "rows.jsonl")
    ids = load_calibration(lines(tmp_path, [{"input_ids": [5, 6, 7]}]))
    assert ids.batches[0]["input_ids"].tolist() == [[5, 6, 7]]


def test_conversations_that_come_to_nothing_are_left_out() -> None:
    tokenizer = tiny_chat_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = [[{"role": "user", "content": text}] for text in ("", "a", "ab")]
    data = load_calibration(rows, tokenizer)
    assert [batch["input_ids"].shape[1] for batch in data.batches] == [2]
    with pytest.raises(ValueError, match="holds no tokens"):
        load_calibration(rows[:2], tokenizer)


def test_conversations_and_lines_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are conversations, and the tokenizer has no chat template: pass a chat"):
        load_calibration(CHATS, tiny_tokenizer())
    with pytest.raises(ValueError, match="needs a tokenizer"):
        load_calibration(CHATS)
    strict = tiny_tokenizer()
    strict.chat_template = "{% if messages | length < 2 %}{{ raise_exception('no answer') }}{% endif %}"
    with pytest.raises(ValueError, match=r"does not take calibration row 1 .*: no answer\. Leave the row out"):
        load_calibration(CHATS, strict)
    for rows in ([CHATS[0], "text"], [{"rows": CHATS[0]}]):
        with pytest.raises(ValueError, match=r"Cannot calibrate on list .* as 'messages'"):
            load_calibration(rows, tiny_chat_tokenizer())
    pair = r": expected 'role' and 'content'$"
    for rows, message in (
        ([CHATS[0], [{"role": "user"}]], r"^Calibration row 1, message 1 has keys \['role'\]" + pair),
        ([CHATS[0], {"messages": [*CHATS[0], {"content": "a"}]}], r"^Calibration row 1, message \d has keys .*" + pair),
        ([{"conversations": [{"from": "gpt"}]}], r"message 1 has keys \['from'\]: expected 'from' and 'value'$"),
        ([{"messages": ["hi"]}], r"message 1 is 'hi': expected a dict with 'role' and 'content'$"),
        ([{"messages": "hi"}], r"^Calibration row 0 has 'messages' 'hi': expected a list of messages"),
        ([{"messages": []}], r"^Calibration row 0 has 'messages' '\[\]': expected a list of messages"),
    ):
        with pytest.raises(ValueError, match=message):
            load_calibration(rows, tiny_chat_tokenizer())
    file = lines(tmp_path, [{"messages": CHATS[0]}, {"messages": [{"role": "user"}]}])
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 3, message 1 has keys \['role'\]" + pair):
        load_calibration(file, tiny_chat_tokenizer())
    form = r": expected a string, or \{\"text\": \"\.\.\.\"\}, \{\"messages\": .* or \{\"input_ids\": \[\.\.\.\]\}$"
    for rows, message in (
        ([3], r"^rows\.jsonl, line 1 is '3'" + form),
        ([{"text": "a"}, {"foo": "a", "bar": 1}], r"^rows\.jsonl, line 3 has the keys \['foo', 'bar'\]" + form),
        ([{"text": "a"}, {"text": None}], r"^rows\.jsonl, line 3 has 'text' 'None'" + form),
        (
            [{"text": "a"}, {"text": "b"}, {"messages": CHATS[0]}, "c"],
            r"^rows\.jsonl, line 5 holds a conversation, and rows\.jsonl, line 1 'text': expected rows of one kind",
        ),
        ([{"text": "a"}, "b"], r"line 3 holds a string, and .* line 1 'text': expected rows of one kind"),
        ([{"input_ids": [5, 6]}, {"text": "b"}], r"line 3 holds 'text', and .* line 1 'input_ids'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_calibration(lines(tmp_path, rows), tiny_tokenizer())
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one\u2028two\x85"}\r\n{"text": "three"}\n', encoding="utf-8", newline=""
    )
    expected = load_calibration(["one\u2028two\x85", "three"], tiny_tokenizer())
    assert load_calibration(tmp_path / "rows.jsonl", tiny_tokenizer()).sha256 == expected.sha256
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"Line 3 of rows\.jsonl is no JSON .* expected one value a line"):
        load_calibration(tmp_path / "rows.jsonl", tiny_tokenizer())
