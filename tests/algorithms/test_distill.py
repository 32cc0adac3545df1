"""Distillation against its formulas, and what it must never do: touch anything else, end worse, forget on resume."""

import itertools
import json
import math

import pytest
import torch
from distilled import bits, make_run, packed, same_bits, sequences
from safetensors.torch import load, save
from tiny import tiny_gpt2, tiny_ids, tiny_llama
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_onebit.algorithms import divergence
from hf_onebit.algorithms.distill import Distillation, DistillOptions, Pair, Trained
from hf_onebit.algorithms.divergence import kl_from_features, kl_from_logits
from hf_onebit.algorithms.latents import SignLatents
from hf_onebit.algorithms.sign_linear import SignLinear, SignPlane, sign_planes
from hf_onebit.distillation import distill_model, joined, training_form
from hf_onebit.head_split import pair
from hf_onebit.nn import packed_layers

# --- divergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("heads", ["both", "student", "none"])
def test_kl_and_its_gradient_equal_torchs(heads, temperature, monkeypatch):
    monkeypatch.setattr(divergence, "HEAD_ROWS", 5)  # two whole chunks and a part of one
    monkeypatch.setattr(divergence, "_ELEMENTWISE_FLOATS", 80)  # two rows of 40 at a time
    rows, d, vocabulary = 13, 6, 40
    student_head = torch.randn(vocabulary, d) if heads != "none" else None
    teacher_head = torch.randn(vocabulary, d + 1) if heads == "both" else None
    s = torch.randn(rows, d if heads != "none" else vocabulary, requires_grad=True)
    t = torch.randn(rows, d + 1 if heads == "both" else vocabulary)
    got = kl_from_features(t, s, teacher_head, student_head, temperature)
    (gradient,) = torch.autograd.grad(3 * got, s)

    logits = [
        x.double() if h is None else x.double() @ h.double().t() for x, h in ((t, teacher_head), (s, student_head))
    ]
    p, q = (F.log_softmax(x / temperature, -1) for x in logits)
    want = temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")
    (expected,) = torch.autograd.grad(3 * want, s)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_kl_keeps_the_logits_it_was_given():
    s, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    before = s.detach().clone(), t.clone()
    kl_from_features(t, s).backward()
    assert torch.equal(s.detach(), before[0])
    assert torch.equal(t, before[1])


def test_kl_of_equals_is_zero_and_of_extremes_finite():
    x = torch.randn(5, 30) * 10
    kl, gradient = kl_from_logits(x, x.clone())
    torch.testing.assert_close(kl, torch.zeros(5), rtol=0, atol=1e-5)
    assert gradient.abs().max() < 1e-6
    far = torch.tensor([[1e4, -1e4, 0.0]])
    kl, gradient = kl_from_logits(far, -far)
    assert kl.item() == pytest.approx(2e4)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(1, 3)), "same rows"),
        ((torch.zeros(0, 3), torch.zeros(0, 3)), "same rows"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), None, torch.zeros(7, 4)), "student_head"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), "one tokenizer"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), None, None, 0.0), "temperature"),
    ],
)
def test_kl_refuses_what_it_cannot_compare(arguments, message):
    with pytest.raises(ValueError, match=message):
        kl_from_features(*arguments)


# --- the training form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [1, 2])
def test_the_layers_gradients_equal_autograds(planes):
    parts = [(torch.randn(5, 7).sign(), torch.randn(5), torch.randn(7)) for _ in range(planes)]
    layer = SignLinear(parts, torch.randn(5), torch.float32)
    x = torch.randn(3, 4, 7, requires_grad=True)
    dense = [tensor.clone().requires_grad_() for _, a, b in parts for tensor in (a, b)]
    W = sum(torch.outer(dense[2 * i], dense[2 * i + 1]) * parts[i][0] for i in range(planes))
    upstream = torch.randn(3, 4, 5)
    want = torch.autograd.grad((F.linear(x, W) + layer.bias.detach()), [x, *dense], upstream)
    mine = [scale for plane in layer.planes for scale in (plane.a, plane.b)]
    got = torch.autograd.grad(layer(x), [x, *mine, layer.bias], upstream)
    for one, other in zip(got[:-1], want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[-1], upstream.sum((0, 1)))


def test_zero_scales_have_zero_gradients_and_not_nan():
    plane = SignPlane(torch.ones(2, 3), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0]), torch.float32)
    a, b = torch.autograd.grad(plane(torch.ones(4, 3)).sum(), [plane.a, plane.b])
    assert a.tolist() == [0.0, 12.0]
    assert b.tolist() == [4.0, 0.0, 4.0]


def test_moving_a_plane_keeps_its_scales_in_float32():
    layer = SignLinear([(torch.ones(2, 3), torch.ones(2), torch.ones(3))], torch.ones(2)).to(torch.float16)
    (plane,) = layer.planes
    assert (plane.a.dtype, plane.b.dtype, layer.bias.dtype) == (torch.float32,) * 3
    assert plane.folded.dtype == torch.bfloat16
    assert layer(torch.ones(1, 3, dtype=torch.float16)).dtype == torch.float16


def test_a_plane_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="expected \\(out, in\\) = \\(3, 2\\)"):
        SignPlane(torch.ones(2, 3), torch.ones(3), torch.ones(2))


class Shapes(TorchDispatchMode):
    """Shapes of what matrix products return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.seen.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("collects", [False, True])
def test_no_weight_gradient_is_computed_unless_asked_for(collects):
    plane = SignPlane(torch.ones(48, 80), torch.ones(48), torch.ones(80), torch.float32)
    plane.collect_sign_gradient(collects)
    x = torch.randn(9, 80, requires_grad=True)
    y = plane(x)
    with Shapes() as shapes:
        torch.autograd.grad(y.sum(), [x, plane.a, plane.b])
    assert (9, 80) in shapes.seen
    assert ((48, 80) in shapes.seen) == collects


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_llama(bias=True)], ids=["llama", "gpt2", "bias"])
@pytest.mark.parametrize("planes", [1, 2])
def test_the_training_form_is_the_packed_model(make, planes):
    model = packed(make(), planes=planes)
    form = training_form(model, dtype=torch.float32)
    ids = tiny_ids()
    torch.testing.assert_close(form.student(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_model_without_packed_layers_is_refused():
    with pytest.raises(ValueError, match="no packed layer"):
        training_form(tiny_llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_the_split_at_the_head_changes_no_loss(make, dtype):
    teacher = make().to(dtype)
    student = packed(teacher)
    batch = {"input_ids": tiny_ids(2, 12)}
    both = pair(student, teacher, batch)
    assert both.student_head is not None
    p, q = (F.log_softmax(m(**batch).logits.flatten(0, 1).float(), -1) for m in (teacher, student))
    want = F.kl_div(q, p, log_target=True, reduction="batchmean")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(both.loss(batch, both.targets(batch)), want, rtol=tolerance, atol=1e-6)


def test_a_head_that_does_more_than_multiply_is_not_split():
    teacher = tiny_llama()
    teacher.lm_head.register_forward_hook(lambda module, inputs, output: 0.1 * torch.tanh(output))
    both = pair(teacher, teacher, {"input_ids": tiny_ids(1, 8)})
    assert both.student_head is None
    assert both.targets({"input_ids": tiny_ids(1, 8)}).shape == (8, teacher.config.vocab_size)


def test_padding_takes_no_part():
    teacher = tiny_llama()
    ids, mask = tiny_ids(1, 12), torch.ones(1, 12, dtype=torch.int64)
    mask[:, 8:] = 0
    both = pair(packed(teacher), teacher, {"input_ids": ids})
    short, long = {"input_ids": ids[:, :8]}, {"input_ids": ids, "attention_mask": mask}
    assert both.targets(long).shape[0] == 8
    torch.testing.assert_close(both.loss(long, both.targets(long)), both.loss(short, both.targets(short)))


def test_a_probe_with_padding_is_split_as_well():
    """Left-padded rows, or the short tail of a conversation, are no reason to keep whole logits."""
    teacher = tiny_llama()
    mask = torch.ones(1, 8, dtype=torch.int64)
    mask[:, :3] = 0
    both = pair(packed(teacher), teacher, {"input_ids": tiny_ids(1, 8), "attention_mask": mask})
    assert both.student_head is not None
    assert both.teacher_head is not None


def test_joining_pads_what_is_shorter_and_masks_it():
    lengths = (4, 4, 6, 4, 4)
    batches = [{"input_ids": torch.full((1, n), 1 + i)} for i, n in enumerate(lengths)]
    batches[1]["attention_mask"] = torch.tensor([[1, 1, 1, 0]])
    first, second = joined(batches[:3]), joined(batches[3:])
    assert first["input_ids"].tolist() == [[1, 1, 1, 1, 0, 0], [2, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert set(second) == {"input_ids"}  # nothing to mask
    assert second["input_ids"].shape == (2, 4)


def test_padding_does_not_count_in_the_divergence():
    teacher = tiny_llama()
    student = training_form(packed(teacher), dtype=torch.float32).student
    rows = [{"input_ids": tiny_ids(1, n, seed=n)} for n in (7, 12, 9)]
    both = pair(student, teacher, rows[0])
    together = joined(rows)
    alone = [both.loss(row, both.targets(row)).item() * row["input_ids"].numel() for row in rows]
    assert both.loss(together, both.targets(together)).item() == pytest.approx(sum(alone) / 28, rel=1e-3)


# --- distillation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplicative", [False, True])
def test_the_divergence_falls_and_the_packed_model_has_it(multiplicative):
    teacher = tiny_llama(bias=True)
    student = packed(teacher)
    options = DistillOptions(steps=12, learning_rate=0.02, warmup=2, evaluate_every=4)
    heldout = sequences(2, 50)
    run, form = distill_model(
        student, teacher, sequences(3), heldout, options, multiplicative=multiplicative, dtype=torch.float32
    )
    result = run.run()
    assert result.best < 0.9 * result.start
    assert [entry["step"] for entry in result.log] == [4, 8, 12]
    assert result.tokens == 12 * 32
    form.write_back(run.stored())
    # The stored fp16 model, computed from its packed words, is what was judged.
    both = pair(student, teacher, heldout[0])
    measured = sum(both.loss(b, both.targets(b)).item() for b in heldout) / len(heldout)
    assert measured == pytest.approx(result.best, rel=1e-3)
    assert all(layer.a.dtype == torch.float16 for layer in packed_layers(student).values())


def test_nothing_changes_but_what_is_named():
    teacher = tiny_llama(bias=True)
    student = packed(teacher)
    before, teachers = bits(student.state_dict()), bits(teacher.state_dict())
    run, form = make_run(model=teacher, student=student)
    others = bits({n: p for n, p in form.student.state_dict().items() if n.endswith("embed_tokens.weight")})
    run.run()
    assert same_bits(bits(student.state_dict()), before)
    assert same_bits(bits(teacher.state_dict()), teachers)
    assert same_bits(others, bits({n: form.student.state_dict()[n] for n in others}))
    form.write_back(run.stored())
    after = bits(student.state_dict())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= set(form.trained)
    assert any(name.endswith("norm.weight") for name in changed)
    assert not any(name.endswith("weight") and "norm" not in name for name in form.trained)


def test_norms_stay_when_asked():
    teacher = tiny_llama()
    form = training_form(packed(teacher), norms=False)
    assert not any("norm" in name for name in form.trained)


def test_a_run_that_only_hurts_ends_where_it_began():
    run, _ = make_run(learning_rate=50.0, warmup=0, steps=6, evaluate_every=2)
    start = run.stored()
    result = run.run()
    assert result.best == result.start
    assert result.best_step == 0
    assert all(entry["rolled_back"] for entry in result.log)
    assert result.log[1]["rate"] < 0.6 * result.log[0]["rate"]
    assert same_bits(bits(run.stored()), bits(start))
    assert run.evaluate() == result.start  # the student was brought back as well


def test_the_result_is_judged_as_it_is_stored():
    run, form = make_run()
    run.run()
    for name, trained in form.trained.items():
        stored = run.stored()[name]
        assert stored.dtype == trained.stored
        if ".planes." in name or name.rpartition(".")[2] in ("a", "b"):
            assert stored.dtype == torch.float16
        assert torch.equal(trained.parameter.detach(), stored.float())


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_run_is_bit_exact(stop):
    whole, _ = make_run(steps=6, evaluate_every=2)
    result = whole.run()
    first, _ = make_run(steps=6, evaluate_every=2)
    first.run(until=stop)
    tensors, values = first.state()
    second, _ = make_run(steps=6, evaluate_every=2)
    second.load_state(load(save(tensors)), json.loads(json.dumps(values)))
    assert second.step == stop
    again = second.run()
    assert (again.start, again.best, again.best_step, again.tokens) == (
        result.start,
        result.best,
        result.best_step,
        result.tokens,
    )
    assert again.log == result.log
    assert same_bits(bits(second.stored()), bits(whole.stored()))


def test_timing_an_update_changes_nothing():
    run, form = make_run(steps=2)
    other, _ = make_run(steps=2)
    before = bits(form.student.state_dict())
    assert 0 < run.seconds_per_update(1) < 60
    assert same_bits(bits(form.student.state_dict()), before)
    assert run.state()[1] == other.state()[1]
    assert run.run() == other.run()


def test_a_state_of_another_run_is_refused():
    run, _ = make_run()
    other, _ = make_run(seed=1)
    with pytest.raises(ValueError, match="options differ"):
        other.load_state(*run.state())


def test_the_seed_decides_the_order_and_every_batch_is_met():
    run, _ = make_run(steps=9)
    met = [run.order(step) for step in range(9)]
    assert [sorted(met[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3
    orders = {tuple(make_run(steps=9, seed=seed)[0].order(step) for step in range(9)) for seed in range(4)}
    assert len(orders) > 1


def test_the_teacher_is_asked_once_a_batch_while_memory_lasts():
    asked = []
    weight = torch.nn.Parameter(torch.randn(4, 8))

    def teacher(batch):
        asked.append(int(batch))
        return torch.ones(3, 8)

    both = Pair(lambda batch: torch.ones(3, 4) @ weight, teacher)
    for cache_bytes, per_batch in ((1 << 20, 1), (0, 3)):
        asked.clear()
        options = DistillOptions(steps=6, evaluate_every=6, cache_bytes=cache_bytes)
        Distillation(both, {"w": Trained(weight)}, [0, 1], [7], options).run()
        judged = 1 if cache_bytes else 2  # before the first update and after the last
        assert sorted(asked) == [0] * per_batch + [1] * per_batch + [7] * judged


def test_rates_and_magnitudes_scale_the_steps():
    small, large, still = (torch.nn.Parameter(torch.full((4,), v)) for v in (0.01, 1.0, 1.0))
    target = torch.randn(1, 4)
    both = Pair(lambda _: (small * 100 + large + still)[None], lambda _: target)
    trained = {"s": Trained(small, torch.float32), "l": Trained(large, torch.float32), "0": Trained(still, rate=0.0)}
    options = DistillOptions(steps=1, learning_rate=0.1, warmup=0, diverged=1e9)
    run = Distillation(both, trained, [0], [0], options)
    run._update()
    torch.testing.assert_close((small - 0.01).abs(), torch.full((4,), 0.001), rtol=1e-2, atol=0)
    torch.testing.assert_close((large - 1).abs(), torch.full((4,), 0.1), rtol=1e-2, atol=0)
    assert torch.equal(still, torch.ones(4))


def test_the_rate_rises_and_falls():
    options = DistillOptions(steps=20, learning_rate=1.0, warmup=4, final_rate=0.1)
    rates = [options.rate(step) for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(one >= other for one, other in itertools.pairwise(rates[4:]))
    assert rates[20] == pytest.approx(0.1)


def test_a_long_gradient_is_clipped():
    plain, clipped = make_run(steps=1)[0], make_run(steps=1, clip=1e-5)[0]
    plain.run(), clipped.run()
    assert plain._m.norm() > 1e-5
    assert clipped._m.norm().item() == pytest.approx(1e-5 * (1 - 0.9), rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(4))
    both = Pair(lambda batch: (weight * batch)[None], lambda _: torch.zeros(1, 4))
    run = Distillation(both, {"w": Trained(weight)}, [math.inf], [1.0], DistillOptions(steps=2))
    result = run.run()
    assert torch.equal(weight, torch.ones(4))
    assert result.log[-1]["kl_train"] is None
    json.dumps(run.state()[1], allow_nan=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"learning_rate": 0.0},
        {"betas": (0.9, 1.0)},
        {"clip": 0.0},
        {"diverged": 1.0},
        {"temperature": -1.0},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillOptions(**wrong)


def test_empty_arguments_are_refused():
    weight = torch.nn.Parameter(torch.ones(4))
    both = Pair(lambda _: weight[None], lambda _: weight.detach()[None])
    for trained, batches, heldout, message in (
        ({}, [0], [0], "trained is empty"),
        ({"w": Trained(weight)}, [], [0], "batches is empty"),
        ({"w": Trained(weight)}, [0], [], "heldout is empty"),
        ({"w": Trained(torch.ones(4))}, [0], [0], "takes no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(both, trained, batches, heldout)
    with pytest.raises(ValueError, match="0 held-out"):
        distill_model(tiny_llama(), tiny_llama(), sequences(1), [], DistillOptions())


# --- signs that learn --------------------------------------------------------------------------------------------


def sign_run(moving=True, steps=60, damaged=0.1, **options):
    """A student that is its teacher but for a tenth of its signs."""
    g = torch.Generator().manual_seed(0)
    signs, a, b = torch.randn(20, 16, generator=g), torch.rand(20, generator=g) + 0.5, torch.rand(16, generator=g) + 0.5
    teacher = SignPlane(signs, a, b, torch.float32)
    wrong = torch.where(torch.rand(20, 16, generator=g) < damaged, -signs, signs)
    student = SignPlane(wrong, a, b, torch.float32)
    batches = [torch.randn(32, 16, generator=g) for _ in range(10)]
    trained = {"a": Trained(student.a), "b": Trained(student.b)}
    latents = SignLatents({"student": student}) if moving else None
    options = DistillOptions(
        **{"steps": steps, "learning_rate": 1e-3, "sign_rate": 0.1, "evaluate_every": 10, **options}
    )
    run = Distillation(
        Pair(student, teacher), trained, batches[2:], batches[:2], options, after_update=student.fold, latents=latents
    )
    return run, student, teacher


def test_signs_learn_what_scales_cannot():
    still, moving = sign_run(moving=False)[0].run(), sign_run()[0].run()
    assert still.start == moving.start
    assert moving.best < 0.1 * still.best


def test_the_best_signs_stay_and_no_latents_are_left():
    run, student, teacher = sign_run()
    result = run.run()
    assert student.latent is None
    assert run.evaluate() == pytest.approx(result.best, rel=1e-6)
    assert float((student.signs != teacher.signs).float().mean()) < 0.05
    student.signs.neg_()  # from now on the signs belong to whoever changes them
    student.fold()
    flipped = student.signs.clone()
    assert run.evaluate() > result.best
    assert torch.equal(student.signs, flipped)


def test_signs_that_diverge_go_back():
    run, student, _ = sign_run(sign_rate=3.0, steps=1, warmup=0, evaluate_every=1)
    before = student.signs.clone()
    moved = []
    run._latents.go_back = _spy(run._latents.go_back, lambda: moved.append(run._latents.values()))
    result = run.run()
    assert [entry["rolled_back"] for entry in result.log] == [True]
    assert float(((moved[0]["student"]) != (before > 0)).float().mean()) > 0.3
    assert result.best == result.start
    assert torch.equal(student.signs, before)


def _spy(function, before):
    def call(*arguments):
        before()
        return function(*arguments)

    return call


def test_a_run_with_signs_goes_on_to_the_same_bits():
    whole, student, _ = sign_run()
    whole.run()
    first = sign_run()[0]
    first.run(until=25)
    tensors, values = first.state()
    second, resumed, _ = sign_run()
    second.load_state(load(save(tensors)), json.loads(json.dumps(values)))
    second.run()
    assert torch.equal(student.signs, resumed.signs)
    assert same_bits(bits(whole.stored()), bits(second.stored()))
    with pytest.raises(ValueError, match="latents differ"):
        sign_run(moving=False)[0].load_state(tensors, values)


def test_a_packed_model_gets_the_signs_back():
    teacher = tiny_llama()
    student = packed(teacher)
    options = DistillOptions(steps=4, learning_rate=1e-6, sign_rate=2.0, warmup=0, evaluate_every=1, diverged=1e9)
    run, form = distill_model(
        student, teacher, sequences(3), sequences(2, 50), options, dtype=torch.float32, margins={}
    )
    run.run()
    form.write_back(run.stored())
    got = {name: layer.dequantize() for name, layer in packed_layers(student).items()}
    for name, plane in sign_planes(form.student).items():
        weight = got[name.removesuffix(".planes.0")]
        torch.testing.assert_close(weight, plane.folded, rtol=1e-3, atol=1e-6)
