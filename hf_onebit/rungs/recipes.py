"""How much of each rung of the ladder a preset takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_onebit.algorithms.blockwise import BlockOptions


@dataclass(frozen=True)
class Recipe:
    """What a preset does.

    Attributes:
        rounds: of flips and scales per layer.
        prefix_tokens: calibration tokens that layers and blocks are fitted on; the first sequences.
        prefix_lengths: tokens of one sequence there, at the most, in turn.
        block: how each block is tuned on the prefix; None leaves it as its layers were fitted.
        heldout_tokens: tokens kept apart to judge distillation on; the last ones, at most an eighth of all.
        steps: updates of the distillation, each of about ``step_tokens`` tokens.
        lengths: tokens of one sequence in distillation, at the most, in turn: what was only ever read in short
            sequences loses more the further it reads (docs/results.md).
        step_tokens: see ``steps``.
        learning_rate: largest relative step of scales, gains and biases in distillation.
        sign_rate: largest step of the signs' latents in distillation; 0 leaves the signs alone.
        flip_rounds: rounds of gated sign flips after distillation, at the most.
        flip_tokens: tokens whose gradients a round of flips sums.
    """

    rounds: int = 2
    prefix_tokens: int = 16384
    prefix_lengths: tuple[int, ...] = (512, 512, 512, 2048)
    block: BlockOptions | None = None
    heldout_tokens: int = 8192
    steps: int = 36
    lengths: tuple[int, ...] = (256, 2048)
    step_tokens: int = 2048
    learning_rate: float = 0.02
    sign_rate: float = 0.0
    flip_rounds: int = 0
    flip_tokens: int = 16384

    @property
    def block_epochs(self) -> int:
        """Passes of block tuning."""
        return 0 if self.block is None else self.block.epochs


def _tuning(epochs: int) -> BlockOptions:
    return BlockOptions(epochs=epochs, sequences_per_step=1, learning_rate=0.02, sign_rate=0.1)


RECIPES = {
    "fast": Recipe(rounds=1, prefix_tokens=16384, block=_tuning(2), heldout_tokens=4096, steps=80),
    "balanced": Recipe(prefix_tokens=40960, block=_tuning(6), steps=144),
    "best": Recipe(
        rounds=3,
        prefix_tokens=61440,
        block=_tuning(8),
        heldout_tokens=16384,
        steps=576,
        sign_rate=0.004,
        flip_rounds=2,
    ),
}


def _tuning_codes(epochs: int) -> BlockOptions:
    # Codes start where no single one can do better: at the signs' rates so many move at once that the loss rises.
    return BlockOptions(epochs=epochs, sequences_per_step=1, learning_rate=0.003, sign_rate=0.003)


# Of group quantization: fewer rounds than signs need, and smaller steps; it loses less to begin with, and was only ever
# measured with short sequences.
_of_codes = partial(Recipe, prefix_lengths=(512,), lengths=(256,))

MPQ_RECIPES = {
    "fast": _of_codes(rounds=1, prefix_tokens=16384, heldout_tokens=4096, steps=40, learning_rate=0.01),
    "balanced": _of_codes(prefix_tokens=40960, block=_tuning_codes(2), steps=120, learning_rate=0.01, sign_rate=0.004),
    "best": _of_codes(
        rounds=3,
        prefix_tokens=147456,
        block=_tuning_codes(6),
        heldout_tokens=16384,
        steps=480,
        learning_rate=0.01,
        sign_rate=0.004,
    ),
}
