"""Causal language models as readers of pictures use them: vectors in, the next text id out.

`PublishedLM` is any causal model of transformers; `OwnLM` is the decoder of a `LlamaGenerator`, which then reads pictures
with the weights that it draws with.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from tokgen.errors import CheckpointError, ConfigError, MissingDependency
from tokgen.generators.base import GENERATORS
from tokgen.generators.llama import LlamaGenerator
from tokgen.nn.attention import rope_table
from tokgen.nn.projector import Projector
from tokgen.pretrained import CONFIG, read_config, resolve
from tokgen.text import TextTokenizer


class LanguageModel(nn.Module):
    """Base of the two.

    Attributes:
        text: its vocabulary.
        dim: width of its inputs.
        begin: the id that begins every sequence, None if the model has none.
        end: the id that ends a text.
    """

    text: TextTokenizer | None
    dim: int
    begin: int | None
    end: int

    def embed(self, ids: Tensor) -> Tensor:
        """Inputs (B, T, dim) of text ids (B, T)."""
        raise NotImplementedError

    def forward(self, x: Tensor, keep: int, places: tuple[int, int]) -> Tensor:
        """float32 logits (B, keep, vocabulary) of the text id after each of the last `keep` positions.

        Every position sees those before it. Padding on the right needs no mask: what is real never sees it.

        Args:
            x: inputs (B, L, dim).
            places: first position and number of the picture's places among them.
        """
        raise NotImplementedError

    def reading_parameters(self) -> list[nn.Parameter]:
        """The parameters that `forward` and `embed` use."""
        raise NotImplementedError

    def heads(self) -> list[nn.Module]:
        """Modules whose matrices give logits, which optimizers of hidden matrices leave out."""
        raise NotImplementedError

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder that `load_language_model` reads."""
        raise NotImplementedError


def load_language_model(name: str | os.PathLike[str]) -> LanguageModel:
    """A generator's folder as `OwnLM`, anything else as `PublishedLM`. Raises CheckpointError, ConfigError."""
    folder = resolve(name, files=(CONFIG,))
    if read_config(folder).get("type") not in GENERATORS:
        return PublishedLM(str(name))
    import tokgen

    generator = tokgen.load(name)
    if not isinstance(generator, LlamaGenerator):
        raise ConfigError(f"{name} holds a {generator.type_name!r}, which reads no text without drawing; use a 'llama'")
    return OwnLM(generator.train())


class PublishedLM(LanguageModel):
    """A causal language model by its Hub name or folder, in float32, with its own vocabulary and its own begin and end ids.

    Raises:
        MissingDependency: transformers is not installed. CheckpointError: no such model with safetensors, no fast
            tokenizer, or no id that ends a text.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise MissingDependency(
                f"language model {name!r} needs transformers; install it with pip install 'tokgen[transformers]'"
            ) from None
        self.name = name
        self.text = TextTokenizer.from_name(name)
        self.words = AutoTokenizer.from_pretrained(name)
        if self.words.eos_token_id is None:
            raise CheckpointError(
                f"the tokenizer of {name!r} has no eos_token, which would end a caption; set one there"
            )
        self.begin, self.end = self.words.bos_token_id, self.words.eos_token_id
        try:
            # their default is the precision of the file, in which small updates are lost
            self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no causal language model at {name!r} ({type(error).__name__}: {error}); expected a Hub name or a local "
                "folder with safetensors"
            ) from None
        rows, self.dim = self.model.get_input_embeddings().weight.shape
        if rows < self.text.vocab_size:
            raise CheckpointError(f"{name!r} has {rows} text embeddings and {self.text.vocab_size} ids")

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def forward(self, x: Tensor, keep: int, places: tuple[int, int]) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False, logits_to_keep=keep).logits.float()

    def reading_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def heads(self) -> list[nn.Module]:
        return [self.model.get_output_embeddings()]

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.model.save_pretrained(folder)
        self.words.save_pretrained(folder)


class OwnLM(LanguageModel):
    """The text side of a `LlamaGenerator`: its text embedding, which is the head too, its blocks and final norm.

    The generator has one id that begins a text, and here that id also ends it. A picture's places have the positions that
    its steps have when the generator draws, and the text goes on where they end.

    Args:
        generator: of condition "text".
    """

    def __init__(self, generator: LlamaGenerator) -> None:
        super().__init__()
        if generator.config.condition != "text":
            raise ConfigError(
                f"a generator of condition {generator.config.condition!r} reads no text; use one of 'text'"
            )
        self.generator = generator
        self.dim = generator.config.dim

    @property
    def text(self) -> TextTokenizer | None:
        return self.generator.text

    @property
    def begin(self) -> int:
        return self.generator.text.bos_id

    end = begin

    def embed(self, ids: Tensor) -> Tensor:
        return self.generator.condition.embeddings(ids)

    def forward(self, x: Tensor, keep: int, places: tuple[int, int]) -> Tensor:
        model, length = self.generator, x.shape[1]
        rope = rope_table(
            self._positions(length, *places)[None], self.dim // model.config.n_heads, model.config.rope_base
        )
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        # nothing is read from the picture's places in the last block
        hidden = model.blocks(
            x, (rope[0].expand(len(x), -1, -1), rope[1].expand(len(x), -1, -1)), causal, keep=length - keep
        )
        return model.text_logits(hidden)

    def _positions(self, length: int, first: int, count: int) -> Tensor:
        """int64 (length, axes)."""
        steps = self.generator.places  # (S, axes), of the picture alone
        positions = torch.zeros(length, steps.shape[1], dtype=torch.int64, device=steps.device)
        positions[:, 0] = torch.arange(length, device=steps.device)
        if count == len(steps):
            positions[first : first + count] = steps
            positions[first : first + count, 0] += first
            after = length - first - count
            following = int(steps[:, 0].max()) + 1 + first
            positions[first + count :, 0] = torch.arange(following, following + after, device=steps.device)
        return positions

    def reading_parameters(self) -> list[nn.Parameter]:
        g = self.generator
        return [p for part in (g.condition.embeddings, g.layers, g.norm) for p in part.parameters()]

    def heads(self) -> list[nn.Module]:
        return []

    def take_eye(self, codebook: Tensor, projector: Projector) -> None:
        """Give a generator that reads codes by their vectors what the picture was read with."""
        self.generator.take_codebook(codebook)
        if self.generator.codes.projector is not None:
            self.generator.codes.projector.load_state_dict(projector.state_dict())

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.generator.save_pretrained(Path(folder))
