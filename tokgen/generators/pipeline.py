"""Text to pictures, or to clips, in diffusers' habits: a generator and the visual tokenizer of its codes, as one callable.

>>> pipe = TextToImagePipeline.from_pretrained("assets/demo/generator")
>>> pipe("red heart, 3d style", generator=0).images[0].save("heart.png")
>>> pipe("red heart, 3d style", image=picture, mask_image=mask)  # in-painting: white is drawn anew
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokgen.errors import CheckpointError, ConfigError, InputError
from tokgen.generators.base import Generator
from tokgen.pretrained import CONFIG, resolve
from tokgen.tokens import Grid, Layout, Tokens

if TYPE_CHECKING:
    from tokgen.generators.decoding import SamplingReport
    from tokgen.generators.sampling import Seeds
    from tokgen.tokenizers.base import VisualTokenizer

OUTPUT_TYPES = ("pil", "pt", "np", "tokens")
PRECISIONS = ("float32", "bfloat16", "int8")


@dataclass
class TextToImageOutput:
    """What a call of the pipeline gives, B = prompts x num_images_per_prompt, the images of one prompt together.

    Attributes:
        images: B PIL images, or float (B, 3, H, W) tensor, or float (B, H, W, 3) array, in [0, 1]; of clips B lists of PIL
            images, (B, T, 3, H, W), or (B, T, H, W, 3); None for output_type "tokens".
        tokens: the ids behind them; of a generator whose items end by themselves, their mask says which are real.
        settings: plain data that draws them again: prompts, seeds, sampling settings, fingerprints, version.
        report: timings.
    """

    images: Any
    tokens: Tokens
    settings: dict[str, Any]
    report: SamplingReport


class TextToImagePipeline:
    """Draw pictures or clips of captions.

    Args:
        generator: captions to tokens.
        tokenizer: tokens to pixels.

    Raises:
        TokenizerMismatch: the generator was trained on another tokenizer's codes.
    """

    def __init__(self, generator: Generator, tokenizer: VisualTokenizer) -> None:
        generator.check_tokenizer(tokenizer)
        self.generator, self.tokenizer = generator.eval(), tokenizer.eval()
        self.precision = "float32"

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | VisualTokenizer | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
        precision: str = "float32",
    ) -> TextToImagePipeline:
        """Load a generator's folder or Hub repository and the tokenizer it names or holds.

        Args:
            tokenizer: another place of the tokenizer, or the tokenizer itself.
            precision: of the generator: "float32", "bfloat16", or "int8" (weights; see its `int8`). The
                tokenizer stays in float32.

        Raises:
            ConfigError: an unknown precision.
            CheckpointError: a part is missing, damaged or of the wrong kind.
            TokenizerMismatch: the two do not belong together.
        """
        from tokgen.hub import load
        from tokgen.tokenizers.base import VisualTokenizer

        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision!r}; expected one of {', '.join(PRECISIONS)}")
        folder = resolve(path_or_repo, revision)
        generator = load(folder)
        if not isinstance(generator, Generator):
            raise CheckpointError(
                f"{folder} holds a {type(generator).__name__}, not a generator; expected a generator's folder"
            )
        if tokenizer is None:
            place = folder / (generator.visual_tokenizer or "tokenizer")
            if not (place / CONFIG).is_file():
                raise CheckpointError(
                    f"{folder} neither holds nor names its visual tokenizer ({place} has no {CONFIG}); pass tokenizer=…"
                )
            tokenizer = place
        if not isinstance(tokenizer, VisualTokenizer):
            place, tokenizer = tokenizer, load(tokenizer)
            if not isinstance(tokenizer, VisualTokenizer):
                raise CheckpointError(
                    f"{place} holds a {type(tokenizer).__name__}; expected a visual tokenizer's folder"
                )
        if precision == "bfloat16":
            generator.to(torch.bfloat16)
        pipeline = cls(generator.int8() if precision == "int8" else generator, tokenizer)
        pipeline.precision = precision
        return pipeline if device is None else pipeline.to(device)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the generator, with the tokenizer in the subfolder "tokenizer"; `from_pretrained` reads it."""
        return self.generator.save_pretrained(folder, tokenizer=self.tokenizer)

    def to(self, device: torch.device | str) -> TextToImagePipeline:
        self.generator.to(device)
        self.tokenizer.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: Seeds = None,
        output_type: str = "pil",
        image: Any = None,
        mask_image: Any = None,
        **arguments: Any,
    ) -> TextToImageOutput:
        """Draw.

        Settings left at None take the defaults saved with the generator. The first image of each call depends on
        `generator` (see `Generator.sample`), the prompt and the settings alone.

        Args:
            prompt: one caption or several; "" is unconditional.
            num_images_per_prompt: images of each caption.
            guidance_scale, temperature, top_k, top_p, min_p: see `SamplingSettings`.
            generator: an int (image i gets that + i), a list of one per image, a torch.Generator, or None.
            output_type: "pil", "pt", "np" or "tokens" (no pixels).
            image: a picture to paint in, as the tokenizer's `encode` takes it (one PIL image, or a batch of one or of one for
                each image drawn); what stays of it are its tokens.
            mask_image: where to paint: a PIL image, or a tensor (H, W) or (B, 1, H, W) in [0, 1], white (above 0.5) for what
                is drawn anew. A token is drawn anew if any of its pixels is.
            arguments: `schedule`, `guidance_interval`, `guidance_power`, `negative_prompt`, `passes`, `given`, `keep`, `speculative`,
                `draft`, `compile`, `progress` of `Generator.sample`.

        Raises:
            InputError: no prompt, an unknown output_type, fewer than one image, seeds that do not match, or one of `image`
                and `mask_image` without the other.
            ConfigError: a setting out of range.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type={output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt={num_images_per_prompt}; expected at least 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        if (image is None) != (mask_image is None):
            raise InputError(
                "in-painting takes both image and mask_image (white is drawn anew); one of them is missing"
            )
        if image is not None:
            arguments["given"] = self.tokenizer.encode(image)
            arguments["keep"] = ~redrawn_tokens(mask_image, arguments["given"].layout, self.tokenizer.factor)
        tokens, report = self.generator.sample(
            prompts,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            generator=generator,
            **arguments,
        )
        pixels = None if output_type == "tokens" else self.tokenizer.decode(tokens).cpu()
        images = pixels
        if output_type == "np":
            images = pixels.movedim(-3, -1).numpy()
        elif output_type == "pil":
            images = [_to_pil(p) for p in pixels]
        return TextToImageOutput(images, tokens, self._settings(prompts, report), report)

    def _settings(self, prompts: list[str], report: SamplingReport) -> dict[str, Any]:
        import tokgen

        settings = dataclasses.asdict(report.settings)
        return {
            "prompts": prompts,
            "seeds": list(report.seeds),
            **settings,
            "guidance_interval": list(settings["guidance_interval"]),
            "precision": self.precision,
            "generator": self.generator.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "tokgen_version": tokgen.__version__,
        }


def redrawn_tokens(mask: Any, layout: Layout, factor: int) -> Tensor:
    """Which tokens of a grid have a masked pixel, bool (B, N).

    Args:
        mask: see `mask_image` of the pipeline.
        factor: pixels per token along each side.

    Raises:
        InputError: tokens that are not on a grid, or a mask of another size than the picture.
    """
    if not isinstance(layout, Grid) or layout.t:
        raise InputError(
            f"in-painting by a mask needs tokens on the grid of one picture, not {layout}; pass given and keep"
        )
    if not isinstance(mask, Tensor):
        from torchvision.transforms.functional import pil_to_tensor

        mask = pil_to_tensor(mask.convert("L"))[None].float() / 255
    mask = mask.float().view(-1, 1, *mask.shape[-2:])
    size = (layout.h * factor, layout.w * factor)
    if tuple(mask.shape[-2:]) != size:
        raise InputError(f"mask_image is {tuple(mask.shape[-2:])} pixels, the picture {size}; give one of its size")
    return torch.nn.functional.max_pool2d((mask > 0.5).float(), factor).flatten(1) > 0


def _to_pil(pixels: Tensor) -> Any:
    """A PIL image of float (3, H, W) in [0, 1]; a list of them of (T, 3, H, W)."""
    from PIL import Image

    if pixels.ndim == 4:
        return [_to_pil(frame) for frame in pixels]
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
