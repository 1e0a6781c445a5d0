"""ARRA's global alignment (Xie et al. 2025, arXiv 2503.07334) beside a generator's loss: which states are aligned, and to which
embeddings. The term itself is in `tokgen.losses.alignment`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tokgen.errors import CheckpointError, ConfigError
from tokgen.generators.base import Generator, GeneratorOutput
from tokgen.generators.token_shuffle import to_windows
from tokgen.losses.alignment import AlignmentProjector, alignment_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alignment:
    """ARRA's second objective: states of one block, projected, point where an image encoder's embedding of the picture
    points (see `tokgen.losses.alignment`). It depends on no other term of the loss, and changes nothing at inference.

    Attributes:
        weight: lambda, of the term in the loss.
        block: whose output is aligned, counted from 1. The paper takes the first; late blocks work too, and by its own
            table 30 of 32 scores better than 1.
        encoder: name or folder of the image encoder, as `tokgen.encoders.base.load_encoder` takes it. With source "shard"
            it is only compared with what the shards name, and None takes whichever that is.
        source: "shard": embeddings that `tokgen tokenize --embed` stored beside the codes; "online": of the pixels of
            image shards, in training, with the encoder frozen.
        target: "every" position that predicts codes (the paper's <HYBNEXT>), or the one learned "rep" token before them
            (its <REP>), which needs config.rep_token.
        hidden: width inside the projector; None is the embedding's.
    """

    weight: float = 1.0
    block: int = 1
    encoder: str | None = None
    source: Literal["shard", "online"] = "shard"
    target: Literal["every", "rep"] = "every"
    hidden: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0 or self.block < 1:
            raise ConfigError(
                f"alignment: weight {self.weight} must be above 0 and block {self.block} at least 1; leave alignment out "
                "to train without it"
            )
        for name, known in (("source", ("shard", "online")), ("target", ("every", "rep"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"alignment.{name} {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.source == "online" and self.encoder is None:
            raise ConfigError(
                "alignment.source 'online' needs alignment.encoder, the name or folder of an image encoder"
            )

    def targets(self, data: Any, encoder: Any = None) -> dict[str, Any]:
        """What states are aligned to: the "encoder", its "name" in full, and the width "dim" of its embeddings.

        Args:
            data: the data module, set up.
            encoder: for source "online", the one that was loaded.

        Raises:
            ConfigError: data without embeddings, of several encoders, or of another than the one wanted.
        """
        if self.source == "online":
            if data.kind != "images":
                raise ConfigError(
                    f"alignment.source 'online' embeds pixels and was given {data.kind}; train on image shards with "
                    "visual_tokenizer, or store embeddings with `tokgen tokenize --embed` and set source 'shard'"
                )
            return {"encoder": self.encoder, "name": encoder.name, "dim": encoder.dim}
        if data.kind != "codes":
            raise ConfigError(
                f"alignment.source 'shard' reads embeddings of code shards and was given {data.kind}; set source "
                "'online', or train on what `tokgen tokenize --embed` writes"
            )
        found: dict[str, Any] = {}
        for split, shards in data.sets.items():
            stored = shards.meta.get("embedding")
            if not stored:
                raise ConfigError(
                    f"the {split} shards hold no embeddings, or not all of one encoder, and alignment.source is 'shard'; "
                    f"write them with `tokgen tokenize … --embed {self.encoder or 'ENCODER'}`"
                )
            if self.encoder not in (None, stored["encoder"], stored["name"]) or stored != (found or stored):
                raise ConfigError(
                    f"the {split} shards hold embeddings of encoder {stored['encoder']!r}, and "
                    + (f"others those of {found['encoder']!r}" if found else f"alignment.encoder is {self.encoder!r}")
                    + "; write them with one encoder (`tokgen tokenize … --embed`) and name that, or none, in the recipe"
                )
            found = dict(stored)
        return found

    def projector(self, generator: Generator, dim: int) -> AlignmentProjector:
        """A new projector to embeddings of `dim` channels. Raises ConfigError where the generator has no such block or token."""
        blocks = len(getattr(generator, "layers", ()))
        if self.block > blocks:
            raise ConfigError(f"alignment.block {self.block}; the generator has {blocks} blocks, counted from 1")
        if self.target == "rep" and not getattr(generator.config, "rep_token", False):
            raise ConfigError("alignment.target 'rep' aligns the <REP> token; set config.rep_token: true")
        return AlignmentProjector(generator.config.dim, dim, self.hidden)

    def add_to(
        self, output: GeneratorOutput, batch: dict[str, Any], generator: Generator, projector: AlignmentProjector
    ) -> GeneratorOutput:
        """The output with one more term in its loss.

        Args:
            output: of a forward pass with `hidden_of` this block.
            batch: of codes, with "mask" (B, N) and "embedding" (B, D).
        """
        states = output.hidden  # (B, S, dim)
        codebooks = batch["mask"][..., None].expand(-1, -1, len(generator.codebook_sizes))  # (B, N, C)
        order = generator.order[: codebooks.shape[1]]
        mask = to_windows(codebooks, order).any(-1)  # (B, S), steps that predict a code which counts
        states = states[:, : mask.shape[1]]  # without the ends
        if self.target == "rep":  # the first step is predicted from it
            states, mask = states[:, :1], mask.any(1, keepdim=True)
        distance = alignment_loss(projector(states), batch["embedding"], mask)
        output.losses["alignment"] = self.weight * distance
        output.loss = output.loss + output.losses["alignment"]
        output.stats["alignment_cosine"] = 1 - distance.detach()
        return output


def check_projector(
    projector: AlignmentProjector | None, targets: dict[str, Any], state: dict[str, Tensor], made_for: dict[str, Any]
) -> None:
    """Look whether a checkpoint fits a run's alignment before its weights are loaded.

    Args:
        projector, targets: of the run; None, and nothing, without alignment.
        state: the checkpoint's weights.
        made_for: the targets that it names.

    Raises:
        CheckpointError: one has alignment and the other has not, or embeddings of other widths.
    """
    saved = state.get("projector.fc2.weight")
    if (saved is None) != (projector is None):
        had, has = ("without", "with") if saved is None else ("with", "without")
        raise CheckpointError(
            f"the checkpoint was trained {had} alignment and this run is {has} it; use the settings it was trained "
            "with, or start from its published generator by init_from"
        )
    if saved is not None and saved.shape != projector.fc2.weight.shape:
        raise CheckpointError(
            f"the checkpoint's alignment projector gives {len(saved)} channels, the embeddings have "
            f"{targets['dim']}; use the encoder it was trained with"
        )
    if made_for and made_for["name"] != targets["name"]:
        log.warning("the checkpoint was aligned to %s, this run is to %s", made_for["name"], targets["name"])
