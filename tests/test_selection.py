"""Plans for a target: what each layer adds to a plan's loss, trials on held-out text, and the choice among plans."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_gpt2, tiny_ids, tiny_llama, tiny_qwen3_moe, tiny_t5
from torch import Tensor, nn

from hf_onebit import MPQConfig, MPQQuantizer
from hf_onebit.bits import selection
from hf_onebit.bits.attribution import attribute
from hf_onebit.bits.auto_bits import plan_auto
from hf_onebit.bits.auto_sensitivity import costs_on_text
from hf_onebit.bits.selection import choices_of_record, choose_by_trial
from hf_onebit.bits.sensitivity import Sensitivity, logits_of
from hf_onebit.bits.trials import PackedChoices, split
from hf_onebit.calibration import real_tokens
from hf_onebit.nn import packed_layers
from hf_onebit.nn.heads import HeadPlan
from hf_onebit.nn.replace import LayerPlan, float_weight
from hf_onebit.quantization.planning import plan_layers

ROWS = [{"input_ids": tiny_ids(1, 64, seed=i)} for i in range(8)]
FEW = ["1p", "2g64", "4g64"]


def prepared(model: nn.Module, target: float = 2.5) -> tuple[Any, LayerPlan, PackedChoices, list[Any]]:
    config = MPQConfig(bits="auto", target_bpw=target, choices=FEW)
    plan = plan_layers(model, config)
    auto = plan_auto(model, plan, config, closed=False)
    fitted, judges = split(ROWS, 128)
    return auto, plan, PackedChoices(model, auto.fit.pack, fitted), judges


def divergence(model: nn.Module, float_model: nn.Module, pieces: list[Any]) -> float:
    total, rows = 0.0, 0
    for piece in pieces:
        with torch.no_grad():
            p, q = (logits_of(m, piece).double().log_softmax(-1) for m in (float_model, model))
        total, rows = total + float((p.exp() * (p - q)).sum()), rows + len(p)
    return total / rows


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)


# ---------------------------------------------------------------------------------------------------- attribution


@pytest.mark.parametrize("choice", ["1p", "4g64"])
def test_the_parts_of_the_layers_sum_to_the_loss(choice: str) -> None:
    model = tiny_llama(layers=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _, plan, packed, _ = prepared(model)
    modules = packed.modules(dict.fromkeys(plan.selected, choice))
    parts, tokens = attribute(model, modules, ROWS, length=64, arithmetic=None)
    assert same(model, before)
    assert not packed_layers(model)
    assert tokens == 8 * 64
    whole = tiny_llama(layers=2)
    for name, module in modules.items():
        whole.set_submodule(name, module)
    assert sum(parts.values()) == pytest.approx(divergence(whole, model, ROWS), rel=0.02)
    coarse, _ = attribute(model, modules, ROWS, length=64)  # products in bfloat16
    assert sum(coarse.values()) == pytest.approx(sum(parts.values()), rel=0.1)


def test_a_layer_without_errors_adds_nothing() -> None:
    model = tiny_llama(layers=2)
    _, plan, packed, _ = prepared(model)
    bad, *rest = plan.selected
    modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in rest}
    modules[bad] = packed.modules(dict.fromkeys(plan.selected, "1p"))[bad]
    parts, _ = attribute(model, {n: _copy(m) for n, m in modules.items()}, ROWS, arithmetic=None)
    assert parts[bad] > 0
    assert all(abs(parts[name]) < 1e-6 * parts[bad] for name in rest)


def _copy(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Linear) or type(module) is not nn.Linear:
        return module
    twin = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    twin.load_state_dict(module.state_dict())
    return twin


# --------------------------------------------------------------------------------------------------------- trials


def test_text_is_split_in_what_fits_and_what_judges() -> None:
    fitted, judges = split(ROWS, 100)
    assert [batch["input_ids"].shape[1] for batch in judges] == [64, 36]
    assert all(
        judge["input_ids"][0, 0] == row["input_ids"][0, 0] for judge, row in zip(judges, ROWS[:5:-1], strict=True)
    )
    assert fitted == ROWS[:6]
    assert sum(batch["input_ids"].numel() for batch in split(ROWS, 10_000)[1]) == 128  # a quarter of all
    alone, judge = split(ROWS[:1], 32)
    assert alone == ROWS[:1]
    assert judge[0]["input_ids"].shape == (1, 32)


def padded(batch: dict[str, Tensor], left: int, right: int = 0) -> dict[str, Tensor]:
    """A sequence as tokenizers pad it to a common length."""
    ids = batch["input_ids"]
    sides = [torch.zeros(1, count, dtype=torch.int64) for count in (left, right)]
    mask = torch.cat([sides[0], torch.ones_like(ids), sides[1]], 1)
    return {"input_ids": torch.cat([sides[0], ids, sides[1]], 1), "attention_mask": mask}


@pytest.mark.parametrize(("left", "right"), [(0, 0), (104, 0), (40, 64), (0, 104)])
def test_judges_hold_as_many_tokens_with_padding_as_without(left: int, right: int) -> None:
    rows = [{"input_ids": row["input_ids"][:, :24]} for row in ROWS]
    plain = split(rows, 40)
    fitted, judges = split([padded(row, left, right) for row in rows], 40)
    assert [real_tokens(judge) for judge in judges] == [24, 16]
    assert len(fitted) == len(plain[0]) == 6
    for judge, bare in zip(judges, plain[1], strict=True):
        assert torch.equal(judge["input_ids"], bare["input_ids"])
        assert judge["attention_mask"].all()
    assert sum(map(real_tokens, split([padded(row, left, right) for row in rows])[1])) == 8 * 24 // 4
    assert real_tokens(split([padded(rows[0], left, right)], 16)[1][0]) == 16


def test_a_gap_within_a_sequence_does_not_count() -> None:
    gap = {"input_ids": tiny_ids(1, 12), "attention_mask": torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]])}
    judge = split([gap], 3)[1][0]
    assert torch.equal(judge["input_ids"], gap["input_ids"][:, 2:7])
    assert judge["attention_mask"].tolist() == [[1, 1, 0, 0, 1]]


def test_sequences_of_padding_alone_are_left_out() -> None:
    empty = padded(ROWS[0], 0)
    empty["attention_mask"] = torch.zeros_like(empty["attention_mask"])
    fitted, judges = split([empty, *ROWS, empty], 100)
    assert fitted == ROWS[:6]
    assert [real_tokens(judge) for judge in judges] == [64, 36]
    model = tiny_llama(layers=1)
    _, plan, packed, judges = prepared(model)
    plans = [dict.fromkeys(plan.selected, "4g64")]
    assert packed.losses(plans, [empty, *judges]) == packed.losses(plans, judges)
    with pytest.raises(ValueError, match="tried on hold padding alone"):
        packed.losses(plans, [empty])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5])
def test_a_trial_tells_the_divergence_of_the_packed_model(make: Any) -> None:
    model, twin = make(), make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _, plan, packed, judges = prepared(model)
    plans = [dict.fromkeys(plan.selected, choice) for choice in ("1p", "4g64")]
    plans.append({name: "1p" if index % 2 else "4g64" for index, name in enumerate(plan.selected)})
    losses, tokens = packed.losses(plans, judges)
    assert tokens == 128
    assert same(model, before)
    for one, loss in zip(plans, losses, strict=True):
        for name, module in packed.modules(one).items():
            twin.set_submodule(name, module)
        assert loss == pytest.approx(divergence(twin, model, judges), rel=1e-3, abs=1e-7)  # float32 sums
    assert losses[1] < losses[2] < losses[0]


def test_each_layer_is_fitted_once_for_each_choice() -> None:
    model = tiny_llama()
    auto, plan, _, judges = prepared(model)
    seen: list[tuple[str, str]] = []

    def pack(name: str, W: Tensor, H: Tensor | None, choice: str) -> Any:
        assert H is not None
        assert torch.equal(W, float_weight(model.get_submodule(name)))
        seen.append((name, choice))
        return auto.fit.pack(name, W, H, choice)

    packed = PackedChoices(model, pack, split(ROWS)[0])
    plans = [dict.fromkeys(plan.selected, choice) for choice in ("1p", "4g64", "1p")]
    packed.modules(plans[0])
    packed.losses(plans, judges)
    assert len(seen) == len(set(seen)) == 2 * len(plan.selected)


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(("make", "consistent"), [(tiny_llama, False), (tiny_llama, True), (tiny_qwen3_moe, False)])
def test_the_plan_that_loses_least_is_taken(make: Any, consistent: bool) -> None:
    model = make()
    auto, plan, packed, judges = prepared(model)
    measured = costs_on_text(model, auto.names, HeadPlan(), auto.fit, ROWS)
    record = choose_by_trial(auto, model, plan, measured, packed, judges, consistent=consistent)
    trials = record["trials"]
    losses = [tried["kl"] for tried in trials["plans"]]
    assert losses[trials["chosen"]] == min(losses) == packed.losses([choices_of_record(record)], judges)[0][0]
    assert all(tried["planned"] <= 2.5 for tried in trials["plans"])
    assert record["planned"] == trials["plans"][trials["chosen"]]["planned"]
    alike = [c for c in FEW if sum(bits[c] for bits in auto.budget.options.values()) <= auto.budget.bits]
    assert alike
    assert min(losses) <= packed.losses([dict.fromkeys(plan.selected, alike[-1])], judges)[0][0]
    assert record["least_cost"] <= record["cost"] * (1 + 1e-9)
    assert all(math.isfinite(layer["attributed"]) for layer in record["layers"].values())


def test_costs_that_mislead_do_not_decide() -> None:
    """With costs turned upside down the sum's best is bad; a trial finds that out."""
    model = tiny_llama(layers=3)
    auto, plan, packed, judges = prepared(model)
    sensitivity, heads = costs_on_text(model, auto.names, HeadPlan(), auto.fit, ROWS)
    largest = {choice: max(of[choice] for of in sensitivity.costs.values()) for choice in FEW}
    wrong = {n: {c: largest[c] ** 2 / of[c] for c in FEW} for n, of in sensitivity.costs.items()}
    record = choose_by_trial(auto, model, plan, (Sensitivity(wrong, 1), heads), packed, judges)
    plans = record["trials"]["plans"]
    assert plans[0]["how"] == {"added_up": True}
    assert plans[record["trials"]["chosen"]]["kl"] < plans[0]["kl"]


def test_trials_are_part_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    own = PackedChoices.losses

    def watch(self: PackedChoices, plans: Any, judges: Any) -> Any:
        judged.append(sum(judge["input_ids"].numel() for judge in judges))
        return own(self, plans, judges)

    monkeypatch.setattr(PackedChoices, "losses", watch)
    quantizer = MPQQuantizer(bits="auto", dataset=ROWS, target_bpw=2.5, choices=FEW)
    quantizer.quantize_model(tiny_llama())
    assert judged == [128]
    assert quantizer.report is not None
    trials = quantizer.report["allocation"]["trials"]
    assert len(trials["plans"]) <= len(selection.MIXTURES) + 3
    without = MPQQuantizer(bits="auto", target_bpw=2.5, choices=FEW)
    without.quantize_model(tiny_llama())
    assert without.report is not None
    assert "trials" not in without.report["allocation"]
    assert judged == [128]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_rows_with_padding_in_front_are_judged_on_their_tokens(make: Any) -> None:
    rows = [padded({"input_ids": tiny_ids(1, 24, seed=i)}, 104) for i in range(8)]
    quantizer = MPQQuantizer(bits="auto", dataset=rows, target_bpw=2.5, choices=FEW)
    quantizer.quantize_model(make())
    assert quantizer.report is not None
    trials = quantizer.report["allocation"]["trials"]
    assert trials["tokens"] == 8 * 24 // 4
    assert all(0 < tried["kl"] < math.inf for tried in trials["plans"])


# ------------------------------------------------------------------------------------------------ what is published


def published(file: str) -> list[dict[str, Any]]:
    """The rows of a file of results, which the page must show."""
    docs = Path(__file__).parents[1] / "docs"
    rows: list[dict[str, Any]] = json.loads((docs / "results" / file).read_text())["rows"]
    page = (docs / "methods" / "auto_bits.md").read_text()
    for row in rows:
        assert f"| {row['row']} | {row['linear_bpw']:.3f} | {row['kl']:.3f} | {row['perplexity']:.1f} |" in page
    return rows


def test_the_page_has_the_figures_of_the_file_and_its_claim_holds() -> None:
    rows = published("auto_bits.json")
    automatic = [row for row in rows if row["row"].startswith("auto ")]
    assert len(automatic) == 5
    for row in automatic:
        uniform = [other for other in rows if other["row"].startswith("uniform ")]
        beside = [other for other in uniform if other["linear_bpw"] < row["linear_bpw"] + 0.06]
        assert beside
        assert all(row["kl"] < other["kl"] for other in beside)


def test_layers_that_llama_cpp_can_take_lose_less_here() -> None:
    found = {row["row"]: row for row in published("auto_bits_down.json")}
    more = [row for name, row in found.items() if name.startswith("llama ") and row["linear_bpw"] < 1.7]
    assert len(more) == 2  # TQ1_0 and IQ1_S
    for row in more:
        assert found["auto 1.5"]["linear_bpw"] <= 1.5 < row["linear_bpw"]
        assert found["auto 1.5"]["kl"] < row["kl"]
