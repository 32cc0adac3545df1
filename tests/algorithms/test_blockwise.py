"""Block tuning on small blocks: it lowers the held-out loss or changes nothing, and leaves stored values."""

import math

import pytest
import torch
from torch import nn

from hf_onebit.algorithms.block_loss import BlockLoss, Example
from hf_onebit.algorithms.blockwise import BlockOptions, tune_block
from hf_onebit.algorithms.closed_form import closed_form_planes
from hf_onebit.algorithms.distill import Trained
from hf_onebit.algorithms.sign_linear import SignLinear, sign_planes


class Block(nn.Module):
    """Two layers with a gain in front and a residual around."""

    def __init__(self, width=24, inner=40, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x * self.gain)))


def make(count=12, planes=1, massive=False, seed=0):
    """A float block, its one-bit form, what it trains, and sequences to fit and to judge on."""
    float_block, student = Block(seed=seed), Block(seed=seed)
    for name in ("up", "down"):
        layer = getattr(student, name)
        fitted = closed_form_planes(layer.weight.detach(), planes, use_balancing=False)
        setattr(student, name, SignLinear(fitted, layer.bias, torch.float32))
    trained = {"gain": Trained(student.gain, torch.float16)}
    for name, plane in sign_planes(student).items():
        trained |= {f"{name}.a": Trained(plane.a), f"{name}.b": Trained(plane.b)}
    trained["down.bias"] = Trained(student.down.bias, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        x = torch.randn(32, 24, generator=generator)
        if massive:
            x[:, 0] *= 300
        with torch.no_grad():
            y = float_block(x)
        examples.append(Example(lambda x=x: student(x), y, x))
    latents = {name: plane.signs.float() for name, plane in sign_planes(student).items()}
    return student, trained, latents, examples[2:], examples[:2]


def loss(examples, weights):
    """L by its definition, one number after the other."""
    top = bottom = 0.0
    with torch.no_grad():
        for e in examples:
            for y, output, x in zip(e.target, e.forward(), e.float_input, strict=True):
                top += float((weights.channel * (y - output) ** 2).sum())
                bottom += float((weights.channel * (y - x) ** 2).sum())
    return top / bottom


@pytest.mark.parametrize("planes", [1, 2])
def test_it_lowers_the_held_out_loss_and_says_by_how_much(planes):
    student, trained, latents, examples, heldout = make(planes=planes)
    weights = BlockLoss.of([*examples, *heldout])
    before = {name: plane.signs.clone() for name, plane in sign_planes(student).items()}
    start = loss(heldout, weights)
    result = tune_block(
        trained, sign_planes(student), latents, examples, heldout, BlockOptions(epochs=30, learning_rate=0.01)
    )
    assert result.start == pytest.approx(start, rel=1e-3)  # the start counts as it is stored, in 16 bits
    assert loss(heldout, weights) == pytest.approx(result.best, rel=1e-4)
    assert result.best < 0.7 * result.start
    assert result.best == min(entry["loss_heldout"] for entry in result.log)
    flipped = sum(int((p.signs != before[name]).sum()) for name, p in sign_planes(student).items())
    assert result.flipped == flipped / sum(s.numel() for s in before.values())
    assert result.flipped > 0
    for name, t in trained.items():
        assert torch.equal(t.parameter, t.parameter.to(t.stored).float()), name
    assert all(plane.latent is None for plane in sign_planes(student).values())


def test_signs_earn_their_time():
    ends = {}
    for rate in (0.0, 0.05):
        student, trained, latents, examples, heldout = make()
        options = BlockOptions(epochs=30, learning_rate=0.01, sign_rate=rate)
        before = {name: plane.signs.clone() for name, plane in sign_planes(student).items()}
        result = tune_block(trained, sign_planes(student), latents, examples, heldout, options)
        ends[rate] = result.best
        same = all(torch.equal(p.signs, before[name]) for name, p in sign_planes(student).items())
        assert same == (rate == 0.0) == (result.flipped == 0.0)
    assert ends[0.05] < 0.8 * ends[0.0]


def test_what_gets_worse_is_rolled_back():
    student, trained, latents, examples, heldout = make()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    signs = {name: plane.signs.clone() for name, plane in sign_planes(student).items()}
    options = BlockOptions(epochs=2, learning_rate=30.0, sign_rate=3.0)
    result = tune_block(trained, sign_planes(student), latents, examples, heldout, options)
    assert result.best == result.start
    assert result.best_epoch == 0
    assert result.flipped == 0
    assert all(entry["loss_heldout"] > result.start for entry in result.log)
    for name, t in trained.items():
        assert torch.equal(t.parameter.detach(), before[name].to(t.stored).float())
    for name, plane in sign_planes(student).items():
        assert torch.equal(plane.signs, signs[name])
        assert torch.equal(plane.folded, torch.outer(plane.a, plane.b) * plane.signs)


def test_a_massive_channel_does_not_decide_alone():
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(4):
        x, step = torch.randn(32, 24, generator=generator), torch.randn(32, 24, generator=generator)
        step[:, 3] *= 300
        examples.append(Example(lambda x=x: x, x + step, x))
    change = sum((e.target - e.float_input).square().sum(0) for e in examples)
    assert float(change[3] / change.sum()) > 0.99
    share = change * BlockLoss.of(examples).channel
    assert float(share[0] / share[3]) > 100 * float(change[0] / change[3])


def test_weights_of_a_block_that_writes_nothing_are_finite():
    x = torch.randn(8, 6)
    example = Example(lambda: x, x, x)
    weights = BlockLoss.of([example])
    assert bool(torch.isfinite(weights.channel).all())
    assert weights.unit([example]) == 1.0
    assert float(weights.error(example)) == 0.0


def test_the_same_seed_gives_the_same_block():
    ends = []
    for _ in range(2):
        student, trained, latents, examples, heldout = make()
        tune_block(trained, sign_planes(student), latents, examples, heldout, BlockOptions(epochs=3, seed=5))
        ends.append([t.parameter.detach().clone() for t in trained.values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_wrong_input():
    student, trained, latents, examples, heldout = make()
    with pytest.raises(ValueError, match="got 0 examples"):
        tune_block(trained, sign_planes(student), latents, [], heldout)
    with pytest.raises(ValueError, match="sign_rate=-1"):
        BlockOptions(sign_rate=-1)
    bad = Example(lambda: torch.full((32, 24), math.nan), heldout[0].target, heldout[0].float_input)
    with pytest.raises(ValueError, match="is nan before any update"):
        tune_block(trained, sign_planes(student), latents, examples, [bad])
