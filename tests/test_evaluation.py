"""Perplexity, divergence, speed and sizes, against arithmetic done by hand."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CAUSAL, VOCABULARY, tiny_bert, tiny_gpt2, tiny_ids, tiny_llama, tiny_t5, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_onebit.evaluation import (
    compare,
    decode_speed,
    memory,
    peak_memory_mb,
    perplexity,
    quality,
    speed,
    tensor_bytes,
    token_windows,
)

ROOT = Path(__file__).resolve().parents[1]


class Scripted(nn.Module):
    """A model whose logits are chosen: row `id` of a table, for each token id."""

    def __init__(self, table: torch.Tensor, limit: int | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.modes: list[tuple[bool, bool]] = []
        text = SimpleNamespace() if limit is None else SimpleNamespace(max_position_embeddings=limit)
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: text)

    def can_generate(self) -> bool:
        return True

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.table)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return SimpleNamespace(logits=self.table[input_ids])


def uniform(vocabulary: int = 10) -> Scripted:
    return Scripted(torch.zeros(vocabulary, vocabulary))


# ------------------------------------------------------------------------------------------------------- text


def test_windows_do_not_overlap_and_keep_a_shorter_last_one() -> None:
    windows = token_windows(list(range(11)), None, context=4)
    assert [w.tolist() for w in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert all(w.dtype == torch.int64 for w in windows)


def test_a_last_window_of_one_token_is_dropped() -> None:
    assert [len(w) for w in token_windows(torch.arange(9), None, context=4)] == [4, 4]


def test_max_tokens_keeps_the_first_tokens() -> None:
    windows = token_windows(torch.arange(100), None, context=4, max_tokens=6)
    assert torch.cat(windows).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bos", [False, True])
def test_the_text_is_tokenised_once_so_that_only_its_start_has_a_bos(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    ids = torch.cat(token_windows("so much text, " * 100, tokenizer, context=50))
    assert (ids == tokenizer.bos_token_id).sum() == int(bos)
    assert (ids[0] == tokenizer.bos_token_id) == bos


def test_strings_are_joined_with_a_blank_line() -> None:
    tokenizer = tiny_tokenizer()
    (joined,) = token_windows(["one", "two"], tokenizer, context=64)
    assert tokenizer.decode(joined) == "one\n\ntwo"


def test_a_row_of_ids_may_have_a_batch_dimension() -> None:
    (window,) = token_windows(torch.arange(5, dtype=torch.int32)[None], None, context=8)
    assert window.tolist() == [0, 1, 2, 3, 4]
    assert window.dtype == torch.int64


def test_a_text_beyond_the_tokenizers_length_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    token_windows("x" * 1000, tiny_tokenizer(), context=64)  # its model_max_length is 128
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "context", "more", "message"),
    [
        ([1, 2, 3], 1, {}, "context is 1, expected at least 2"),
        ([1, 2, 3], 4, {"max_tokens": 1}, "max_tokens is 1, expected at least 2"),
        ([1, 2, 3], 4, {"max_tokens": -2}, "max_tokens is -2, expected at least 2"),
        ([1], 4, {}, r"the text has 1 token\(s\), expected at least 2"),
        ([], 4, {}, r"the text has 0 token\(s\)"),
        (torch.zeros(2, 3, dtype=torch.int64), 4, {}, r"shape \(2, 3\), expected \(tokens,\)"),
        (torch.zeros(3), 4, {}, "dtype torch.float32, expected an integer"),
        ("text", 4, {}, "tokenizer is None"),
        ([1, "two"], 4, {}, "mixes types"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(text: Any, context: int, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(text, None, context, **more)


# ---------------------------------------------------------------------------------------------------- quality


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    result = perplexity(uniform(10), token_windows(list(range(10)), None, context=4))
    assert result["perplexity"] == pytest.approx(10)
    assert result["nll"] == pytest.approx(math.log(10))
    assert (result["tokens"], result["context"], result["windows"]) == (7, 4, 3)  # 3 + 3 + 1 scored


def test_perplexity_is_the_mean_over_tokens_not_over_windows() -> None:
    # Token 1 follows 0 with certainty; all else is uniform over 4.
    table = torch.zeros(4, 4)
    table[0, 1] = 1000.0
    windows = [torch.tensor([0, 1]), torch.tensor([2, 3, 2, 3])]
    assert perplexity(Scripted(table), windows)["nll"] == pytest.approx(3 * math.log(4) / 4)


@pytest.mark.parametrize("name", CAUSAL)
def test_perplexity_agrees_with_the_loss_of_transformers(name: str) -> None:
    model, windows = CAUSAL[name](), tiny_ids(3, 32)
    result = perplexity(model, windows)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert result["nll"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert result["tokens"] == 3 * 31


@pytest.mark.parametrize("values", [1, VOCABULARY, 5 * VOCABULARY, 1 << 22])
def test_the_size_of_the_chunks_does_not_matter(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, windows = tiny_llama(), tiny_llama(seed=1), tiny_ids(2, 32)
    wanted = compare(model, reference, windows)
    monkeypatch.setattr(quality, "_CHUNK_VALUES", values)
    assert compare(model, reference, windows) == pytest.approx(wanted, rel=1e-6)


def test_logits_of_a_low_precision_model_are_scored_in_fp32() -> None:
    model, windows = tiny_llama().bfloat16(), tiny_ids(1, 64)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[0, :-1].double()
    wanted = nn.functional.cross_entropy(logits, windows[0, 1:]).item()
    assert perplexity(model, windows)["nll"] == pytest.approx(wanted, rel=1e-6)


def test_a_model_compared_with_itself_does_not_differ() -> None:
    model, windows = tiny_llama(), tiny_ids(2, 32)
    result = compare(model, model, windows)
    assert result["kl"] == 0
    assert result["top1"] == 1
    assert result["reference_perplexity"] == result["perplexity"] == perplexity(model, windows)["perplexity"]


def test_kl_and_top1_are_those_of_the_definition() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    q = torch.tensor([[0.5, 0.25, 0.25], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])
    windows = [torch.tensor([0, 1, 2, 0])]  # the rows of tokens 0, 1 and 2 are compared
    result = compare(Scripted(q.log()), Scripted(p.log()), windows)
    assert result["kl"] == pytest.approx((p * (p / q).log()).sum().item() / 3, rel=1e-5)
    assert result["top1"] == pytest.approx(2 / 3)
    nll = -(p[0, 1] * p[1, 2] * p[2, 0]).log().item() / 3
    assert result["reference_perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)


def test_a_token_that_both_models_rule_out_leaves_kl_finite() -> None:
    table = torch.zeros(3, 3)
    table[:, 2] = -math.inf
    windows = [torch.tensor([0, 1, 0])]
    assert compare(Scripted(table), Scripted(table.clone()), windows)["kl"] == 0


def test_evaluation_runs_in_eval_mode_without_gradients_and_restores_the_mode() -> None:
    model = uniform().train()
    perplexity(model, [torch.tensor([1, 2, 3])])
    assert model.modes == [(False, False)]
    assert model.training


def test_the_mode_comes_back_after_an_error() -> None:
    model = Scripted(torch.full((4, 4), math.nan)).train()
    with pytest.raises(RuntimeError, match="window 0 is nan, expected a finite number"):
        perplexity(model, [torch.tensor([1, 2])])
    assert model.training


def test_a_ruined_model_has_an_infinite_perplexity() -> None:
    table = torch.zeros(2, 2)
    table[0, 0] = 2000.0
    assert perplexity(Scripted(table), [torch.tensor([0, 1])])["perplexity"] == math.inf


def test_progress_counts_scored_tokens() -> None:
    seen: list[tuple[int, int]] = []
    windows = token_windows(list(range(10)), None, context=4)
    perplexity(uniform(), windows, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    windows = token_windows(list(range(9)), None, context=9)
    with pytest.raises(ValueError, match=r"a window has 9 tokens, expected at most 8.*context=8"):
        perplexity(Scripted(torch.zeros(10, 10), limit=8), windows)
    with pytest.raises(ValueError, match=r"expected at most 128, the max_position_embeddings of GPT2LMHeadModel"):
        compare(uniform(), tiny_gpt2(), tiny_ids(1, 129))


@pytest.mark.parametrize("make", [tiny_t5, tiny_bert])
def test_models_that_are_not_causal_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="is not a causal language model"):
        perplexity(make(), tiny_ids(1, 8))


def test_no_window_and_too_short_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="no window to score"):
        perplexity(uniform(), [])
    with pytest.raises(ValueError, match=r"a window has 1 token\(s\)"):
        perplexity(uniform(), [torch.tensor([1])])


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has 10 logits and the reference 12"):
        compare(uniform(10), uniform(12), [torch.tensor([1, 2])])


# --------------------------------------------------------------------------------------------- speed and size


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_decode_speed_times_every_token(name: str) -> None:
    result = decode_speed(CAUSAL[name](), tiny_ids(1, 5), new_tokens=4, repeats=2)
    assert result["tokens_per_second"] > 0
    assert result["prompt_tokens_per_second"] > 0
    assert (result["new_tokens"], result["prompt_tokens"], result["repeats"]) == (4, 5, 2)


def test_decode_speed_is_the_median_of_runs_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # (seconds of the prompt, seconds of decoding): the warm-up is slow, one run is an outlier.
    runs = iter([(9.0, 90.0), (1.0, 2.0), (1.0, 8.0), (0.5, 1.0)])
    monkeypatch.setattr(speed, "timed_generation", lambda *_: next(runs))
    result = decode_speed(tiny_llama(), tiny_ids(1, 10), new_tokens=9, repeats=3)
    assert result["tokens_per_second"] == pytest.approx(8 / 2.0)
    assert result["prompt_tokens_per_second"] == pytest.approx(10 / 1.0)


def test_an_end_of_text_does_not_shorten_a_run() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[model.config.eos_token_id] = 1.0  # favours the end wherever the activations add up
    result = decode_speed(model, tiny_ids(1, 3), new_tokens=6, repeats=1)
    assert math.isfinite(result["tokens_per_second"])
    clock = speed._TokenClock()
    model.generate(tiny_ids(1, 3), min_new_tokens=6, max_new_tokens=6, do_sample=False, streamer=clock)
    assert len(clock.times) == 1 + 6  # the prompt and each token: what the rate is computed from


@pytest.mark.parametrize(
    ("ids", "new_tokens", "repeats", "message"),
    [
        (tiny_ids(2, 4), 4, 1, r"shape \(2, 4\), expected"),
        (tiny_ids(1, 4)[:, :0], 4, 1, r"shape \(1, 0\), expected"),
        (tiny_ids(1, 4), 1, 1, "new_tokens is 1, expected at least 2"),
        (tiny_ids(1, 4), 4, 0, "repeats is 0, expected at least 1"),
    ],
)
def test_decode_speed_refuses_what_it_cannot_time(
    ids: torch.Tensor, new_tokens: int, repeats: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decode_speed(tiny_llama(), ids, new_tokens, repeats=repeats)


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is not on Windows")
def test_peak_memory_is_in_megabytes_and_never_falls() -> None:
    before = peak_memory_mb()
    assert before is not None
    assert 50 < before < 100_000  # a process with torch in it
    block = torch.ones(int(before * 1e6 / 4) + 25_000_000)  # more than was ever held, by 100 MB
    after = peak_memory_mb()
    assert after is not None
    assert after > before + 50
    del block
    assert peak_memory_mb() > after - 1  # the system counts in batches of pages


def test_peak_memory_without_the_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_peak_memory_mb_linux", lambda: None)
    monkeypatch.setitem(sys.modules, "resource", None)
    info = SimpleNamespace(peak_wset=3_000_000)
    process = SimpleNamespace(memory_info=lambda: info)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    assert peak_memory_mb() == 3.0
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert peak_memory_mb() is None


def test_tensor_bytes_counts_shared_storage_once() -> None:
    model = nn.Linear(4, 8)
    assert tensor_bytes(model) == 4 * (4 * 8 + 8)
    model.register_buffer("mask", torch.zeros(16, dtype=torch.int8))
    model.register_buffer("view", model.mask[:3])
    assert tensor_bytes(model) == 160 + 16


def test_tensor_bytes_of_tied_and_untied_embeddings() -> None:
    tied, untied = tiny_llama(tied=True), tiny_llama(tied=False)
    assert tensor_bytes(untied) - tensor_bytes(tied) == VOCABULARY * 64 * 4


def test_tensor_bytes_of_tensors_without_storage() -> None:
    model = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.Linear(8, 4, device="meta"))
    assert tensor_bytes(model) == 4 * (4 * 8 + 8 + 8 * 4 + 4)
    model[1].weight = nn.Parameter(model[0].weight.data)  # two names for one tensor
    model[0].weight = model[1].weight
    assert tensor_bytes(model) == 4 * (4 * 8 + 8 + 4)


# --------------------------------------------------------------------------------------------- the real model


@pytest.mark.model
def test_the_real_model_has_the_perplexity_it_had(smollm2_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = (ROOT / "examples/data/alice.txt").read_text(encoding="utf-8")
    result = perplexity(model, token_windows(text, tokenizer, context=256, max_tokens=1024))
    assert (result["tokens"], result["windows"]) == (4 * 255, 4)
    assert result["perplexity"] == pytest.approx(34.79, rel=0.005)
