"""The generator's contract: captions and code ids to a loss, captions to `Tokens`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokgen.errors import ConfigError, InputError
from tokgen.generators.conditions import Prompts, T5Features, load_prompts
from tokgen.pretrained import Pretrained, Registry
from tokgen.text import SETTINGS
from tokgen.tokens import Layout, Tokens

if TYPE_CHECKING:
    from tokgen.generators.decoding import SamplingReport
    from tokgen.generators.sampling import SamplingSettings, Seeds
    from tokgen.tokenizers.base import VisualTokenizer

GENERATORS: Registry[Generator] = Registry(
    "generator",
    {
        "llama": "tokgen.generators.llama:LlamaGenerator",
        "tokenflow-t2i": "tokgen.generators.tokenflow:TokenFlowGenerator",
    },
)


@dataclass
class GeneratorOutput:
    """What a generator's forward gives.

    Attributes:
        loss: the weighted sum of `losses`, a scalar.
        logits: float32 (B, N, K), or (B, N, C, max K) for C codebooks, -inf beyond a codebook's size; in the layout's
            own order, each position's prediction of its own id. Where items end by themselves, N is one more than the batch
            has, up to the layout's length, and the first codebook's K includes the end.
        losses: the terms as they enter `loss`, by name ("ce", "z_loss", "text").
        stats: detached scalars for the log ("accuracy").
        text_logits: float32 (B, T, text vocabulary), the prediction of the next text id; None unless asked for.
        hidden: (B, S, dim), one block's output at exactly the S positions that predict codes; None unless asked for.
    """

    loss: Tensor
    logits: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    text_logits: Tensor | None = None
    hidden: Tensor | None = None


class Generator(Pretrained):
    """Base of all generators: a causal language model over [condition, codes].

    Args:
        config: the system's configuration.
        text: what users write to the condition's tensors (captions to ids or features, class names to labels); needed by
            `loss` on captions and by `generate`.
        tokenizer_fingerprint: of the visual tokenizer whose codes this was trained on; written into generated tokens.
        visual_tokenizer: where that tokenizer lies, relative to the saved folder ("tokenizer", "../tokenizer").
        generation: default arguments of `generate` (fields of `SamplingSettings`), kept in `config.json`.

    Raises:
        ConfigError: sizes that do not fit together, or an unknown name in `generation`.
    """

    layout: Layout
    codebook_sizes: tuple[int, ...]
    max_text: int
    config_class: ClassVar[type]

    def __init__(
        self,
        config: Any,
        text: Prompts | None = None,
        tokenizer_fingerprint: str = "",
        visual_tokenizer: str | None = None,
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config)
        from tokgen.generators.sampling import SamplingSettings

        self.text = text
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.visual_tokenizer = visual_tokenizer
        self.generation = dict(generation or {})
        SamplingSettings.of(self.generation)  # complains about unknown names now rather than at the first picture

    def constructed_with(self) -> dict[str, Any]:
        """The arguments, but for `text`, that make a generator of this kind again, without its weights."""
        names = ("config", "tokenizer_fingerprint", "visual_tokenizer", "generation")
        return {name: getattr(self, name) for name in names}

    # -- what a system implements -------------------------------------------------------------------------------------

    def forward(
        self,
        prompt: Tensor,
        prompt_mask: Tensor,
        code_ids: Tensor,
        code_mask: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        text_loss: float = 0.0,
        hidden_of: int | None = None,
    ) -> GeneratorOutput:
        """Teacher-forced prediction of every code id.

        Args:
            prompt, prompt_mask: the condition and which of it is real, as `encode_prompts` gives them.
            code_ids: int64 (B, N) or (B, N, C), N the layout's length, or at most that where items end by themselves.
            code_mask: bool (B, N), True where an id counts in the loss; None means all. Where items end it says how long they
                are: real positions come first.
            z_loss: weight of mean(log^2 sum exp logits).
            label_smoothing: of the code cross-entropy.
            text_loss: weight of the cross-entropy of the next text id; above 0 `text_logits` are computed.
            hidden_of: also give the output of this block (1 is the first) at the positions that predict codes.
        """
        raise NotImplementedError

    # -- the tokenizer's codebook --------------------------------------------------------------------------------------

    @property
    def needs_codebook(self) -> bool:
        """Whether this generator reads codes by their vectors in the tokenizer's codebook, not by embeddings of its own."""
        return False

    def take_codebook(self, table: Tensor) -> None:
        """Keep the vectors of the codes, float32 (K, code_dim), as `VisualTokenizer.codebook_table` gives them.

        They are saved with the weights and never trained.
        """
        raise ConfigError(f"{type(self).__name__} reads codes by embeddings of its own")

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], hidden_of: int | None = None, **weights: float) -> GeneratorOutput:
        """`forward` on a batch of code shards; in training, prompts are dropped with `config.caption_dropout`.

        A dropped prompt is the condition's unconditional one: for text its begin-of-sequence id and begin-of-image alone.

        Args:
            batch: "ids" integer (B, N[, C]), optionally "mask" bool (B, N), and either "caption" (list of B strings) or
                "prompt" and "prompt_mask".
            hidden_of: see `forward`.
            weights: `z_loss`, `label_smoothing`, `text_loss` of `forward`.
        """
        device = self.device
        given = (batch["prompt"], batch["prompt_mask"]) if "prompt" in batch else self.encode_prompts(batch["caption"])
        prompt, mask = (t.to(device) for t in given)
        dropout = getattr(self.config, "caption_dropout", 0.0)
        if self.training and dropout > 0:
            dropped = (torch.rand(len(prompt)) < dropout).to(device)
            empty, empty_mask = self.condition.null(prompt, mask)
            prompt = torch.where(dropped.view(-1, *[1] * (prompt.ndim - 1)), empty, prompt)
            mask = torch.where(dropped[:, None], empty_mask, mask)
        code_mask = batch.get("mask")
        code_mask = None if code_mask is None else code_mask.to(device)
        return self(prompt, mask, batch["ids"].to(device).long(), code_mask, hidden_of=hidden_of, **weights)

    def encode_prompts(self, prompts: Sequence[str | int], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """The condition's tensors and mask. Raises ConfigError without a prompt encoder."""
        if self.text is None:
            raise ConfigError(
                f"this {type(self).__name__} cannot read prompts; pass text=TextTokenizer…, ClassNames… or T5Features… "
                "when building it"
            )
        if isinstance(self.text, T5Features):
            self.text.to(self.device)
        return self.text.encode(prompts, self.max_text, pad_to)

    def counted(self, mask: Tensor) -> Tensor:
        """How many predictions the means of the loss are over, for a batch's code mask, bool (B, N)."""
        return mask.sum() * len(self.codebook_sizes)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str | int], **arguments: Any) -> Tokens:
        """Tokens drawn for the prompts; the arguments are those of `sample`."""
        return self.sample(prompts, **arguments)[0]

    def sample(
        self,
        prompts: Sequence[str | int],
        *,
        guidance_scale: float | None = None,
        schedule: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        negative_prompt: str | None = None,
        passes: Sequence[tuple[int, float]] | None = None,
        generator: Seeds = None,
        given: Tokens | None = None,
        keep: Tensor | None = None,
        speculative: int = 1,
        draft: Generator | None = None,
        compile: bool = False,
        progress: bool = False,
    ) -> tuple[Tokens, SamplingReport]:
        """Draw one image's tokens for each prompt.

        Arguments left at None take the value in `self.generation`, else the default of `SamplingSettings`, which explains
        them. Every image has exactly the layout's length of ids; of a generator whose items end by themselves, a mask says
        which are real.

        Args:
            prompts: B captions, or classes by name or number; "" is unconditional.
            generator: seeds. An int gives image i the seed `generator + i`; a list gives each image its own; a
                torch.Generator draws them; None draws fresh ones. The same prompt and seed give the same ids in any batch.
            given: tokens that stay, one item for all images or one for each; the others are drawn around them, each knowing
                those before it in decoding order. Fewer positions than the layout's complete a prefix.
            keep: bool (B or 1, N), which of the given tokens stay; None keeps all real ones.
            speculative: guess and check this many steps in one call of the transformer; the ids stay those of 1, up to
                rounding. See `tokgen.generators.decoding`.
            draft: a smaller generator that guesses, such as `self.int8()`; without one the picture itself does, which
                pays off only where pictures repeat themselves.
            compile: compile the decoding step; slow in the first call, then faster. Needs a C++ compiler on the CPU.
            progress: show a progress bar.

        Raises:
            InputError: no prompts, or seeds or given tokens that do not match them. ConfigError: a setting out of range.
            TokenizerMismatch: the given tokens are another tokenizer's.
        """
        from tokgen.generators import sampling

        if isinstance(prompts, str) or not len(prompts):
            raise InputError("prompts must be a list of at least one string; wrap a single prompt as [prompt]")
        chosen = {
            "guidance_scale": guidance_scale,
            "schedule": schedule,
            "guidance_interval": guidance_interval,
            "guidance_power": guidance_power,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "negative_prompt": negative_prompt,
            "passes": passes,
        }
        settings = sampling.SamplingSettings.of(
            {**self.generation, **{name: value for name, value in chosen.items() if value is not None}}
        )
        seeds = sampling.seeds_of(generator, len(prompts))
        other = [settings.negative_prompt] if settings.negative_prompt and settings.guidance_scale != 1 else []
        # One prompt length for all calls keeps the compiled step's shapes static.
        prompt, mask = self.encode_prompts([*prompts, *other], pad_to=self.max_text if compile else None)
        unconditional = None
        if other:
            unconditional = prompt[-1:].expand_as(prompt[:-1]), mask[-1:].expand_as(mask[:-1])
            prompt, mask = prompt[:-1], mask[:-1]
        stays = None if given is None else self._given(given, keep, len(prompts))
        ids, report = self.draw(
            prompt,
            mask,
            settings,
            seeds,
            unconditional=unconditional,
            given=stays,
            speculative=speculative,
            draft=draft,
            compile=compile,
            progress=progress,
        )
        real = ids[..., 0] >= 0  # (B, N)
        ids = ids if len(self.codebook_sizes) > 1 else ids[..., 0]
        return Tokens(ids, self.layout, self.codebook_sizes, real, self.tokenizer_fingerprint), report

    def draw(
        self, prompt: Tensor, prompt_mask: Tensor, settings: SamplingSettings, seeds: Sequence[int], **how: Any
    ) -> tuple[Tensor, SamplingReport]:
        """The loop behind `sample`, on the condition's tensors: see `decoding.generate`, whose keywords `how` are.

        Returns:
            ids int64 (B, N, C) in the layout's order, -1 after the end of an item that has ended, and what was done.
        """
        from tokgen.generators import decoding

        if settings.passes:
            raise ConfigError(f"passes={settings.passes} are of generators that draw scale by scale; leave them out")
        return decoding.generate(self, prompt, prompt_mask, settings, seeds, **how)

    def int8(self) -> Generator:
        """A copy with int8 weights, to draw with. Raises ConfigError for a generator that has none."""
        raise ConfigError(f"{type(self).__name__} has no int8 form; use float32 or bfloat16")

    def _given(self, given: Tokens, keep: Tensor | None, images: int) -> tuple[Tensor, Tensor]:
        """Given ids as (B, N, C) and which of them stay, on the CPU."""
        from tokgen.errors import TokenizerMismatch

        if given.codebook_sizes != self.codebook_sizes or (
            given.tokenizer and self.tokenizer_fingerprint and given.tokenizer != self.tokenizer_fingerprint
        ):
            raise TokenizerMismatch(
                f"the given tokens are of tokenizer {given.tokenizer or 'unknown'} with codebooks {given.codebook_sizes}; "
                f"this generator draws {self.codebook_sizes} of {self.tokenizer_fingerprint or 'unknown'}"
            )
        given = given.validate().cpu()
        rows, n = given.ids.shape[:2]
        fits = rows in (1, images) and n <= self.layout.length
        if not fits or (
            keep is not None and (keep.ndim != 2 or keep.shape[0] not in (1, images) or keep.shape[1] != n)
        ):
            raise InputError(
                f"given tokens {tuple(given.ids.shape)} (keep {'all' if keep is None else tuple(keep.shape)}) do not fit "
                f"{images} image(s) of {self.layout.length} ids; expected 1 or {images} rows of each, equally long"
            )
        stays = given.mask if keep is None else given.mask & keep.bool().cpu()  # (rows, n)
        if n == self.layout.length and given.layout != self.layout:
            raise InputError(f"the given tokens lie on {given.layout}, this generator draws {self.layout}")
        ids = torch.zeros(rows, self.layout.length, len(self.codebook_sizes), dtype=torch.int64)
        ids[:, :n] = given.ids.view(rows, n, -1)
        mask = torch.zeros(len(stays), self.layout.length, dtype=torch.bool)
        mask[:, :n] = stays
        return ids.expand(images, -1, -1), mask[..., None].expand(images, -1, ids.shape[-1])

    # -- files --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def extra_config(self) -> dict[str, Any]:
        return {
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "visual_tokenizer": self.visual_tokenizer,
            "generation": self.generation,
        }

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: VisualTokenizer | None = None) -> Path:
        """Write weights, configuration and text tokenizer; with `tokenizer`, also that into the subfolder "tokenizer".

        Raises:
            TokenizerMismatch: `tokenizer` is not the one this generator was trained for.
        """
        folder = Path(folder)
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
            tokenizer.save_pretrained(folder / "tokenizer")
            self.visual_tokenizer = "tokenizer"
        if self.text is not None:
            self.text.save(folder)
        return super().save_pretrained(folder)

    @classmethod
    def build(cls, config: Any, folder: Path, data: dict[str, Any], **kwargs: Any) -> Generator:
        kwargs.setdefault("text", load_prompts(folder) if (folder / SETTINGS).is_file() else None)
        for name in ("tokenizer_fingerprint", "visual_tokenizer", "generation"):
            if name in data:
                kwargs.setdefault(name, data[name])
        return cls(config, **kwargs)

    def check_tokenizer(self, tokenizer: VisualTokenizer) -> None:
        """Raise TokenizerMismatch unless this generator's codes are those of `tokenizer`."""
        from tokgen.errors import TokenizerMismatch

        if tuple(tokenizer.codebook_sizes) != self.codebook_sizes:
            raise TokenizerMismatch(
                f"the generator draws codebooks {self.codebook_sizes} but the tokenizer has "
                f"{tuple(tokenizer.codebook_sizes)}; use the tokenizer it was trained with"
            )
        if self.tokenizer_fingerprint and self.tokenizer_fingerprint != tokenizer.fingerprint:
            raise TokenizerMismatch(
                f"the generator was trained on codes of tokenizer {self.tokenizer_fingerprint}, this one is "
                f"{tokenizer.fingerprint}; use the tokenizer it was trained with"
            )
