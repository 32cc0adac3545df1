"""Text that a model writes itself: openings, sampling, ends, repetitions; and its cache."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CAUSAL, OTHERS, tiny_chat_tokenizer, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from hf_onebit import OneBitConfig, OneBitQuantizer, cli
from hf_onebit.texts import self_cache, self_text
from hf_onebit.texts.model_states import reserve
from hf_onebit.texts.openings import Openings
from hf_onebit.texts.self_cache import self_calibration
from hf_onebit.texts.self_text import draw, repeats, write_texts, written_by_model

BOS, EOS = 1, 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


def likes(model: Any, token: int, logit: float = 30.0) -> Any:
    """Make a model that gives one token this logit above all others, whatever came before."""
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[..., token] += logit
        return output

    changed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = changed
    return model


# ------------------------------------------------------------------------------------------------------ sampling


def test_draw_is_the_first_token_whose_cumulated_probability_exceeds_u() -> None:
    generator = torch.Generator().manual_seed(3)
    for vocabulary in (5, 256, 700):
        p = torch.rand(64, vocabulary, generator=generator) ** 8
        p[:, ::3] = 0
        u = torch.rand(64, generator=generator)
        expected = (p.double().cumsum(-1) <= u[:, None].double() * p.double().sum(-1, keepdim=True)).sum(-1)
        assert torch.equal(draw(p, u), expected)


def test_draw_never_gives_what_has_no_probability() -> None:
    p = torch.zeros(3, 600)
    p[:, 300], p[:, 310] = 1e-30, 2.0
    below_one = torch.tensor(1 - 2**-24)
    u = torch.stack([torch.tensor(0.0), torch.tensor(0.5), below_one])
    assert draw(p, u).tolist() == [300, 310, 310]


def test_draw_follows_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3]).repeat(20000, 1)
    counts = draw(p, torch.rand(20000)).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, p[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_model_writes(name: str) -> None:
    texts = write_texts(CAUSAL[name](), tiny_tokenizer(), 200, longest=40, side_by_side=4)
    assert sum(map(len, texts)) >= 200
    assert all(0 <= token < len(tiny_tokenizer()) for text in texts for token in text)  # the embedding has more rows
    assert all(17 <= len(text) <= 41 for text in texts)  # an end token comes on top


@pytest.mark.parametrize("name", CAUSAL)
def test_reserved_memory_changes_no_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the cache as Transformers grows it."""
    reserved: list[bool] = []

    def watched(state: Any, tokens: int) -> bool:
        reserved.append(reserve(state, tokens))
        return reserved[-1]

    monkeypatch.setattr(self_text, "reserve", watched)
    texts = write_texts(CAUSAL[name](), tiny_tokenizer(), 200, longest=24, seed=2)
    monkeypatch.setattr(self_text, "reserve", lambda state, tokens: False)
    assert texts == write_texts(CAUSAL[name](), tiny_tokenizer(), 200, longest=24, seed=2)
    assert reserved
    assert all(reserved) or name != "llama"


def test_no_more_is_kept_than_was_reserved_for() -> None:
    model = tiny_llama()
    with torch.no_grad():
        state = model(input_ids=torch.ones(2, 3, dtype=torch.int64), use_cache=True).past_key_values
        assert reserve(state, 4)
        model(input_ids=torch.ones(2, 1, dtype=torch.int64), past_key_values=state, use_cache=True)
        assert state.get_seq_length() == 4
        with pytest.raises(ValueError, match="room for 4 tokens was reserved, and 5 are needed"):
            model(input_ids=torch.ones(2, 1, dtype=torch.int64), past_key_values=state, use_cache=True)
    assert not reserve(None, 4)


def test_the_seed_decides_and_no_global_state_is_touched() -> None:
    model, tokenizer = tiny_llama(), tiny_chat_tokenizer()
    model.train()
    before = torch.get_rng_state()
    first = write_texts(model, tokenizer, 300, longest=64, seed=1, side_by_side=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.rand(7)
    assert write_texts(model, tokenizer, 300, longest=64, seed=1, side_by_side=4) == first
    assert write_texts(model, tokenizer, 300, longest=64, seed=2, side_by_side=4) != first


def test_a_text_that_took_anothers_place_sees_nothing_of_it() -> None:
    """What was written in a row that was used twice is what plain forward passes over that text alone make likely."""
    model, tokenizer = likes(tiny_llama(), EOS, 3.5), tiny_tokenizer()
    seen: list[tuple[list[int], torch.Tensor]] = []
    keep = self_text.Writer._keep

    class Spy(self_text.Writer):
        def _sample(self, logits: Any, texts: Any) -> list[int]:
            if logits is not None:
                seen.extend((list(text.tokens), row) for text, row in zip(texts, logits, strict=True) if text.tokens)
            return super()._sample(logits, texts)

    openings = Openings(tokenizer, 0)
    writer = Spy(model, tokenizer, openings, 32, 0)
    assert Spy._keep is keep
    done = writer.wave(4, 32)
    assert len(done) + writer.short > 4  # some rows were used again
    for tokens, logits in seen:
        with torch.no_grad():
            alone = model(torch.tensor([tokens])).logits[0, -1, : len(tokenizer)]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_an_end_token_ends_a_text_and_starts_another() -> None:
    model, tokenizer = likes(tiny_llama(), EOS, 2.0), tiny_tokenizer()
    texts = write_texts(model, tokenizer, 400, longest=64, seed=0, side_by_side=4)
    ended = [text for text in texts if text[-1] == EOS]
    assert len(ended) > 3
    assert all(EOS not in text[1:-1] for text in texts)


def test_dialogues_are_written_into_the_template() -> None:
    model, tokenizer = likes(tiny_llama(), EOS, 3.0), tiny_chat_tokenizer()
    texts = write_texts(model, tokenizer, 3000, longest=100, seed=0, side_by_side=16)
    written = [tokenizer.decode(text) for text in texts]
    dialogues = [text for text in written if text.startswith("<s>user:")]
    assert len(texts) / 5 < len(dialogues) < len(texts) / 2
    answered = [text for text in dialogues if "</s><s>assistant:" in text]
    assert len(answered) > len(dialogues) / 2
    assert all(text.count("<s>user:") == 1 and text.count("<s>") <= 2 for text in dialogues)
    assert not any(text.startswith("<s>user:") for text in write_decoded(model, tokenizer, chat=False))


def write_decoded(model: Any, tokenizer: Any, **options: Any) -> list[str]:
    texts = write_texts(model, tokenizer, 300, longest=64, side_by_side=4, **options)
    return [tokenizer.decode(text) for text in texts]


# ------------------------------------------------------------------------------------------------------ openings


def test_openings_are_varied_and_ordinary() -> None:
    tokenizer = tiny_tokenizer()
    openings = Openings(tokenizer, 0)
    drawn = [openings.next() for _ in range(300)]
    assert openings.document == (BOS,)
    bare = sum(opening.tokens == (BOS,) for opening in drawn)
    assert 50 < bare < 130
    firsts = [opening.tokens[1] for opening in drawn if len(opening.tokens) > 1]
    assert len(set(firsts)) > 100
    assert not set(firsts) & openings.special


def test_the_mark_of_a_turn_is_no_start_of_a_document() -> None:
    assert Openings(tiny_chat_tokenizer(), 0).document == ()  # <s> opens each turn of its template
    with_bos = tiny_tokenizer(bos=True)
    with_bos.chat_template = tiny_chat_tokenizer().chat_template
    assert Openings(with_bos, 0).document == (BOS,)  # what the tokenizer itself puts first


def test_words_begin_in_words() -> None:
    class Words:
        all_special_ids = (0,)
        bos_token_id = eos_token_id = 0
        chat_template = None
        pieces = ("<s>", "Ġriver", "ing", "Ġ12", "Boat", "Ġ(")

        def __len__(self) -> int:
            return len(self.pieces)

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Ids", (), {"input_ids": [0, 2]})

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.pieces[token]

        def decode(self, ids: list[int]) -> str:
            return self.pieces[ids[0]].replace("Ġ", " ")

    openings = Openings(Words(), 0)
    assert {openings._token(word=True) for _ in range(20)} == {1, 4}
    assert {openings._token(word=False) for _ in range(40)} == {1, 2, 3, 4, 5}


def test_a_template_that_refuses_gives_no_dialogues() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('two messages, please') }}"
    assert all(not opening.reply for opening in (Openings(tokenizer, 0).next() for _ in range(30)))


# --------------------------------------------------------------------------------------------------- repetitions


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (list(range(300)), False),
        ([1, 2, 3] * 40, True),
        ([*range(200), *([5, 6, 7, 8] * 20), *range(200, 400)], True),
        ([*range(40)] * 8, False),  # a refrain of 40 tokens
        ([1] * 20, True),
        ([1] * 10, False),  # too short to tell
    ],
)
def test_repetitions(tokens: list[int], expected: bool) -> None:
    assert repeats(tokens) == expected


def test_a_model_that_only_repeats_is_refused() -> None:
    model = likes(tiny_llama(), 50, 100.0)
    with pytest.raises(ValueError, match=r"wrote 0 usable tokens of 300; .* Pass a text: dataset=FILE"):
        write_texts(model, tiny_tokenizer(), 300, longest=128, side_by_side=4)


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cannot_write_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot write its own calibration text: .* Pass a text: dataset=FILE"):
        self_calibration(OTHERS[name](), tiny_tokenizer())


def test_wrong_tokenizers_and_broken_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"without a tokenizer: pass tokenizer="):
        write_texts(tiny_llama(), None, 10)
    with pytest.raises(ValueError, match="The tokenizer has 259 tokens, and LlamaForCausalLM knows the ids 0 to 199"):
        write_texts(tiny_llama(vocabulary=200), tiny_tokenizer(), 10)
    broken = tiny_llama()
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="gives NaN or inf as logits"):
        write_texts(broken, tiny_tokenizer(), 10, longest=32)


def test_text_to_read() -> None:
    model, tokenizer = tiny_llama(), tiny_chat_tokenizer()
    first = written_by_model(model, tokenizer, 128, seed=1, batch_size=4)
    assert written_by_model(model, tokenizer, 128, seed=1, batch_size=4) == first
    assert written_by_model(model, tokenizer, 128, seed=2, batch_size=4) != first
    assert len(first.split("\n\n")) >= 4
    assert "<s>" not in first


# --------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were asked of the writer, call by call."""
    calls: list[int] = []

    def counted(model: Any, tokenizer: Any, tokens: int, **options: Any) -> list[list[int]]:
        calls.append(tokens)
        return write_texts(model, tokenizer, tokens, **options)

    monkeypatch.setattr(self_cache, "write_texts", counted)
    return calls


def wanted(model: Any = None, tokenizer: Any = None, **options: Any) -> Any:
    options = {"max_tokens": 256, "context": 64, "seed": 3} | options
    return self_calibration(model or tiny_llama(), tokenizer or tiny_tokenizer(), **options)


def test_rows_are_whole_and_come_from_the_cache(writes: list[int], cache: Path) -> None:
    first, again = wanted(), wanted()
    assert writes == [256]
    assert [tuple(batch["input_ids"].shape) for batch in first.batches] == [(1, 64)] * 4
    assert (first.source, first.tokens) == ("self (seed 3)", 256)
    assert first.sha256 == again.sha256
    for one, other in zip(first.batches, again.batches, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".safetensors"]


def changed_weight(model: Any) -> Any:
    model.model.layers[1].mlp.down_proj.weight.data[5, 77] += 1e-6
    return model


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"model": changed_weight(tiny_llama())},
        lambda: {"model": tiny_llama().bfloat16()},
        lambda: {"tokenizer": tiny_chat_tokenizer()},
        lambda: {"tokenizer": tiny_tokenizer(bos=True)},
        lambda: {"seed": 4},
        lambda: {"max_tokens": 320},
        lambda: {"context": 32},
    ],
    ids=["weights", "dtype", "template", "bos", "seed", "tokens", "context"],
)
def test_whatever_the_text_depends_on_is_in_the_key(options: Callable[[], Any], writes: list[int]) -> None:
    wanted()
    wanted(**options())
    assert len(writes) == 2


def swap_ids(file: Path) -> None:
    save_file({"input_ids": load_file(file)["input_ids"].flip(0)}, file)


def other_shape(file: Path) -> None:
    ids = load_file(file)["input_ids"].view(2, 128)
    save_file({"input_ids": ids.contiguous()}, file)


def foreign(file: Path) -> None:
    described = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**described, "model": "0" * 64}))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x01"),
    "other ids": swap_ids,
    "other shape": other_shape,
    "other tensor": lambda file: save_file({"ids": torch.zeros(4, 64, dtype=torch.int64)}, file),
    "no ids": Path.unlink,
    "no description": lambda file: file.with_suffix(".json").unlink(),
    "no json": lambda file: file.with_suffix(".json").write_text("{"),
    "a list": lambda file: file.with_suffix(".json").write_text("[]"),
    "foreign": foreign,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_written_again(damage: str, writes: list[int], cache: Path) -> None:
    first = wanted()
    file = next(cache.glob("*.safetensors"))
    DAMAGES[damage](file)
    assert wanted().sha256 == first.sha256
    assert len(writes) == 2
    assert wanted().sha256 == first.sha256
    assert len(writes) == 2  # mended
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_to_costs_only_time(writes: list[int], cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    first = wanted()
    assert wanted().sha256 == first.sha256
    assert len(writes) == 2


def test_permuted_weights_are_another_model() -> None:
    model = tiny_llama()
    digest = self_cache.model_digest(model)
    assert self_cache.model_digest(tiny_llama()) == digest
    embedding: nn.Embedding = model.model.embed_tokens
    embedding.weight.data = embedding.weight.data.flip(0).contiguous()
    assert self_cache.model_digest(model) != digest


# --------------------------------------------------------------------------------------------------- quantizing


@pytest.mark.parametrize("options", [{"preset": "fast"}, {"preset": "closed", "dataset": "self"}])
def test_quantizing_on_its_own_text(options: dict[str, Any], llama_dir: Path, tmp_path: Path) -> None:
    config = {"calibration_tokens": 256, "calibration_context": 64, "seed": 5, **options}
    quantizer = OneBitQuantizer(OneBitConfig(**config))
    quantizer.quantize_model(tiny_llama(), tiny_tokenizer())
    calibration = (quantizer.report or {})["calibration"]
    assert calibration == calibration | {"source": "self (seed 5)", "tokens": 256}
    # The tokenizer beside the model's files will do.
    loaded = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=OneBitConfig(**config))
    assert loaded.hf_quantizer.report["calibration"]["source"] == "self (seed 5)"
    bound = OneBitQuantizer.from_pretrained(llama_dir, config=OneBitConfig(**config))
    bound.quantize(tmp_path / "packed")
    assert (bound.report or {})["calibration"]["source"] == "self (seed 5)"


def test_the_command_line(llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(llama_dir), "-o", str(tmp_path / "packed"), "--calibration", "self", "--seed", "2"]
    arguments += ["--preset", "closed"]
    assert cli.main([*arguments, "--calibration-tokens", "128", "--calibration-context", "64", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["calibration"] == report["calibration"] | {"source": "self (seed 2)", "tokens": 128}
    assert report["preflight"]["disk_bytes"] <= report["file_bytes"]
    card = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    assert "self (seed 2)" in card


def test_which_configs_take_data() -> None:
    assert not OneBitConfig().calibrates
    assert OneBitConfig(dataset="text.txt").calibrates
    assert not OneBitConfig(dataset="./self").writes_itself
    assert OneBitConfig(dataset="self").writes_itself
    assert OneBitConfig(preset="fast").writes_itself
    assert not OneBitConfig(preset="fast", dataset=["self"]).writes_itself
