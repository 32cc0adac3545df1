"""The tokens that every row sees in the same order, the held-out ones, and the float model's answers to them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ladder_study.protocol import Places, digest, float_answers, identity, surroundings
from torch import Tensor

from hf_onebit import evaluation, loading, sources
from hf_onebit.calibration import read_text
from hf_onebit.digests import sha256_of_file

TRAIN, HELDOUT = "wikitext-2/valid.txt", "wikitext-2/test.txt"


@dataclass(frozen=True)
class Study:
    """One set of rows that compare with each other.

    Attributes:
        places: the float model, the texts, and what runs leave behind.
        packed: folders of packed models by the name that rows start from.
        steps, length: updates, of one sequence of this many tokens each.
        heldout: tokens that only judge, from the head of another text.
        tuning: tokens at the end of the training text that only choose learning rates.
        tuning_steps: updates of a run that does.
        evaluations: how often the held-out tokens are scored after the start.
        blocks: of the model whose memory is measured; None for all.
        seed: of the order of the sequences, adapters and random words.
    """

    places: Places
    packed: dict[str, Path] = field(default_factory=dict)
    steps: int = 32
    length: int = 512
    heldout: int = 4096
    tuning: int = 1024
    tuning_steps: int = 8
    evaluations: int = 2
    blocks: int | None = None
    seed: int = 0

    def protocol(self) -> dict[str, Any]:
        """What every row shares, for the JSON."""
        texts = {name: {"file": file, "sha256": sha256_of_file(self.places.data / file)}
                 for name, file in (("train", TRAIN), ("heldout", HELDOUT))}  # fmt: skip
        names = ("steps", "length", "heldout", "tuning", "tuning_steps", "blocks", "seed")
        return {"model": identity(self.places), "texts": texts, **{name: getattr(self, name) for name in names}}

    def surroundings(self) -> dict[str, Any]:
        """Processor, threads and versions; bitsandbytes' where it is there."""
        return surroundings()

    @cached_property
    def windows(self) -> dict[str, list[Tensor]]:
        """Sequences (length,) to train on, to tune on and to judge by; no token is in two of them.

        Raises:
            ValueError: the training text is too short.
        """
        tokenizer = loading.load_tokenizer(str(self.places.model))
        whole = evaluation.token_windows(read_text(self.places.data / TRAIN), tokenizer, self.length)
        whole = [window for window in whole if len(window) == self.length]
        held = evaluation.token_windows(read_text(self.places.data / HELDOUT), tokenizer, self.length, self.heldout)
        count = max(1, self.tuning // self.length)
        rest = whole[:-count]
        if len(rest) < self.steps:
            raise ValueError(
                f"{TRAIN} has {len(rest)} sequences of {self.length} tokens beside those that tune, expected at least "
                f"{self.steps}: train for fewer --steps"
            )
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return {"train": [rest[i] for i in order[: self.steps]], "tuning": whole[-count:], "heldout": held}

    @cached_property
    def teacher(self) -> Any:
        """The float model for all windows, from its last hidden states."""
        windows = [window for part in self.windows.values() for window in part]
        return float_answers(self.places, "finetune", windows)

    def start_of(self, name: str) -> dict[str, Any]:
        """Name, preset and digests of a packed model; of one that is packed while it loads, how."""
        folder = self.packed.get(name)
        if folder is None:
            return {"preset": "closed, while loading"} if name.startswith("mpq") else {}
        config = sources.read_model_config(str(folder)).quantization_config
        files = {file.name: sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))}
        return {"preset": config.get("preset"), "sha256": files}


__all__ = ["HELDOUT", "TRAIN", "Study", "digest"]
