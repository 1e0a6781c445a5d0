"""How well a generator predicts the codes of pictures or clips that it did not draw, given their captions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokgen.evaluation.metrics import CodeHistogram, Means
from tokgen.evaluation.progress import Facts, Sums
from tokgen.generators.pipeline import TextToImagePipeline


class Likelihood:
    """The cross-entropy of the reference set's codes, each predicted from the caption and the codes before it.

    Beside it the same from the unconditional prompt, as guidance takes it. What the caption saves is the model's own estimate of the
    information between the two: a generator that ignores its captions has none.

    Args:
        pipeline: its tokenizer encodes the references, its generator predicts them. Int8 copies are for drawing and predict none.
    """

    def __init__(self, pipeline: TextToImagePipeline) -> None:
        self.pipeline = pipeline
        codes = CodeHistogram(pipeline.generator.codebook_sizes)
        self.sums = Sums(means=Means(), codes=codes, facts=Facts())

    @torch.no_grad()
    def update(self, batch: Mapping[str, Any]) -> None:
        """Count a batch of pixels and captions."""
        generator, tokenizer, facts = self.pipeline.generator, self.pipeline.tokenizer, self.sums.facts
        extras = {name: batch[name] for name in tokenizer.extras if name in batch}
        tokens = tokenizer.encode(batch["pixels"], **extras)
        self.sums.codes.update(tokens.cpu())
        self.sums.means.add({"reference_tokens": tokens.lengths.cpu()})
        if self.pipeline.precision == "int8":
            facts.add("notes", "No likelihood: an int8 copy of a generator draws and does not predict.")
            return
        if tokens.layout != generator.layout:
            facts.add(
                "notes",
                f"No likelihood: the references are {tokens.layout}, and the generator draws {generator.layout}.",
            )
            return
        prompt = tuple(t.to(generator.device) for t in generator.encode_prompts(batch["caption"]))
        prompts = {"bits": prompt}
        if getattr(generator.config, "caption_dropout", 0.0):
            prompts["bits_without"] = generator.condition.null(*prompt)
        else:
            facts.add("notes", "What captions save is not known: the generator was never trained without them.")
        sums = {"codes": int(tokens.mask.sum()) * tokens.codebooks}
        for name, (ids, mask) in prompts.items():
            out = generator.loss({"ids": tokens.ids, "mask": tokens.mask, "prompt": ids, "prompt_mask": mask})
            sums[name] = float(out.losses["ce"]) * int(generator.counted(tokens.mask)) / math.log(2)
        # spread evenly over the batch: sums are all that is read of them
        even = torch.ones(len(tokens), dtype=torch.float64) / len(tokens)
        self.sums.means.add({name: total * even for name, total in sums.items()})

    def state(self) -> dict[str, Tensor]:
        return self.sums.state()

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.sums.merge(state)

    def result(self) -> dict[str, float]:
        """ "bits_per_code", over the codes of all items, and "bits_of_item", on average; ends of items are included.

        "caption_gain": how many fewer bits an item takes with its caption than without, on average; less than 0 where captions
        mislead. Only of generators that were trained with `caption_dropout`.
        """
        found = self.sums.means.result(("bits", "codes", "bits_without"))
        if not found:
            return {}
        figures = {"bits_per_code": found["bits"] / found["codes"], "bits_of_item": found["bits"]}
        if "bits_without" in found:
            figures["caption_gain"] = found["bits_without"] - found["bits"]
        return figures

    def lengths(self) -> dict[str, float]:
        return self.sums.means.result(("reference_tokens",))

    def entropies(self) -> dict[str, list[float]]:
        return {"reference_entropy": self.sums.codes.result()["entropy"]}

    def notes(self) -> list[str]:
        return self.sums.facts["notes"]
