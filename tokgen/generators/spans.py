"""Pictures in the ids of a published language model: SEED-LLaMA's, LaVIT's and Video-LaVIT's way of writing codes.

These models have one vocabulary for words and codes, and put a picture between a begin and an end id. As published they
generate freely, and a picture of a wrong length breaks its decoder; `SpanGrammar` lets `transformers`' `generate` make only
whole ones.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import torch
from torch import Tensor

from tokgen.errors import ConfigError, InputError
from tokgen.tokens import Layout, Sequence, Tokens


@dataclass(frozen=True)
class ImageSpan:
    """How a language model writes the codes of one picture: begin id, `min_length` to `max_length` codes, end id.

    Attributes:
        begin, end: ids around the codes.
        offset: id of code 0; code k is `offset + k`.
        codes: size of the codebook.
        min_length, max_length: codes of a picture.
    """

    begin: int
    end: int
    offset: int
    codes: int
    min_length: int
    max_length: int

    def __post_init__(self) -> None:
        inside = [i for i in (self.begin, self.end) if self.offset <= i < self.offset + self.codes]
        if inside or self.begin == self.end or min(self.begin, self.end, self.offset) < 0 or self.codes < 1:
            raise ConfigError(f"{self}: begin, end and the ids of codes must all differ")
        if not 1 <= self.min_length <= self.max_length:
            raise ConfigError(f"{self}: expected 1 <= min_length <= max_length")

    @classmethod
    def seed(cls, begin: int = 40192, end: int = 40193) -> ImageSpan:
        """SEED-LLaMA: 32 codes, the first after LLaMA's 32,000 words.

        The published tokenizer gives <img> and </img> by name. That they are 40192 and 40193, in this order, is inferred
        from the size of the vocabulary: compare with `tokenizer.convert_tokens_to_ids("<img>")`.
        """
        return cls(begin, end, 32_000, 8192, 32, 32)

    @classmethod
    def lavit(cls, min_length: int = 1, max_length: int = 256) -> ImageSpan:
        """LaVIT: as many codes as the picture needs. Its authors sample 20 to 200."""
        return cls(32_000, 32_001, 32_002, 16_384, min_length, max_length)

    @classmethod
    def video_lavit_motion(cls) -> ImageSpan:
        """Video-LaVIT's motion of a clip of 24 frames; its key frame is written as LaVIT's."""
        return cls(48_386, 48_387, 48_388, 1024, 135, 135)

    @property
    def vocabulary(self) -> int:
        """Ids that the language model must have for it."""
        return max(self.begin, self.end, self.offset + self.codes - 1) + 1

    # -- tokens to ids ------------------------------------------------------------------------------------------------

    def wrap(self, tokens: Tokens) -> list[list[int]]:
        """The ids of each picture, begin and end included.

        Raises:
            InputError: tokens of another codebook, or of a number that a span cannot have.
        """
        if tokens.codebook_sizes != (self.codes,):
            raise InputError(f"tokens have codebooks {tokens.codebook_sizes}; this model writes {self.codes} codes")
        rows = []
        for ids, mask in zip(tokens.ids.cpu(), tokens.mask.cpu()):
            codes = ids[mask]
            self._check_length(len(codes), f"picture {len(rows)}")
            rows.append([self.begin, *(codes + self.offset).tolist(), self.end])
        return rows

    def wrap_padded(self, tokens: Tokens, pad_id: int, left: bool = True) -> tuple[Tensor, Tensor]:
        """`wrap` as ids int64 (B, T) and mask bool (B, T), padded on the left, as for generating, or on the right."""
        rows = self.wrap(tokens)
        width = max(map(len, rows), default=0)
        fill = [[pad_id] * (width - len(row)) for row in rows]
        ids = [pad + row if left else row + pad for pad, row in zip(fill, rows)]
        mask = torch.ones(len(rows), width, dtype=torch.bool)
        for i, pad in enumerate(fill):
            mask[i, slice(0, len(pad)) if left else slice(width - len(pad), width)] = False
        return torch.tensor(ids, dtype=torch.int64).reshape(len(rows), width), mask

    # -- ids to tokens ------------------------------------------------------------------------------------------------

    def parse(
        self,
        ids: Tensor | SequenceABC[int] | SequenceABC[SequenceABC[int]],
        layout: Layout | None = None,
        tokenizer: str = "",
    ) -> Tokens:
        """The pictures in generated ids, one item for each span, in order.

        End ids that close nothing are passed over: generating may have padded with them.

        Args:
            ids: (T,) or (B, T), or lists of ids.
            layout: of the tokens; None: `Sequence(max_length)`.
            tokenizer: fingerprint to write into them.

        Raises:
            InputError: a span of a wrong length, with other ids inside, or without an end; a code outside of any span.
        """
        rows = ids.tolist() if isinstance(ids, Tensor) else [list(r) if isinstance(r, SequenceABC) else r for r in ids]
        rows = rows if rows and isinstance(rows[0], list) else [rows]
        spans: list[list[int]] = []
        for row, line in enumerate(rows):
            codes: list[int] | None = None  # of the span that is open
            for place, i in enumerate(line):
                where = f"id {i} at place {place} of row {row}"
                code = 0 <= i - self.offset < self.codes
                if codes is None:
                    if code:
                        raise InputError(f"{where} is a code outside of any span; begin it with id {self.begin}")
                    codes = [] if i == self.begin else None
                elif i == self.end:
                    self._check_length(len(codes), f"the span that ends at place {place} of row {row}")
                    spans.append(codes)
                    codes = None
                elif code:
                    codes.append(i - self.offset)
                else:
                    raise InputError(f"{where} stands inside a span; expected codes, then id {self.end}")
            if codes is not None:
                raise InputError(f"row {row} ends inside a span, after {len(codes)} codes; let it generate more ids")
        length = max(map(len, spans), default=self.max_length)
        out = torch.zeros(len(spans), length, dtype=torch.int64)
        mask = torch.zeros(len(spans), length, dtype=torch.bool)
        for k, codes in enumerate(spans):
            out[k, : len(codes)], mask[k, : len(codes)] = torch.tensor(codes), True
        return Tokens(out, layout or Sequence(self.max_length), (self.codes,), mask, tokenizer)

    def _check_length(self, length: int, what: str) -> None:
        if not self.min_length <= length <= self.max_length:
            wanted = f"{self.min_length} to {self.max_length}"
            wanted = str(self.min_length) if self.min_length == self.max_length else wanted
            raise InputError(f"{what} has {length} codes; expected {wanted}")


class SpanGrammar:
    """A logits processor for `generate` of transformers, under which every span has a right length and an end.

    After a begin id come codes alone, at least `min_length`; then the end id, at the latest after `max_length`. Outside,
    codes and end ids are not drawn, nor a begin id that the rest of the text has no room for. It keeps no state: the rows may
    be in different places, and beams may be exchanged. Pass it as `logits_processor=LogitsProcessorList([grammar])`.

    Args:
        spans: kinds of spans that the model writes.
        max_length: ids of a row in the end, prompt and padding included: the length of the prompt plus `max_new_tokens`.
    """

    def __init__(self, spans: ImageSpan | SequenceABC[ImageSpan], max_length: int) -> None:
        self.spans = (spans,) if isinstance(spans, ImageSpan) else tuple(spans)
        self.max_length = max_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (B, V) with -inf for ids that must not follow `input_ids` (B, T).

        Raises:
            InputError: the model has fewer ids than a span needs, or the prompt leaves a span open that cannot be closed.
        """
        vocabulary, length = scores.shape[1], input_ids.shape[1]
        room = self.max_length - length  # ids still to come, the one that is drawn now included
        outside = torch.ones(vocabulary, dtype=torch.bool, device=scores.device)
        for span in self.spans:
            if span.vocabulary > vocabulary:
                raise InputError(f"the model has {vocabulary} ids and {span} needs {span.vocabulary}")
            outside[span.offset : span.offset + span.codes] = False
            outside[span.end] = False
            outside[span.begin] = room >= span.min_length + 2
        allowed = outside.expand(len(scores), -1)
        for span in self.spans:
            count = length - 1 - _last(input_ids == span.begin)  # codes so far, where a span is open
            is_open = _last(input_ids == span.begin) > _last(input_ids == span.end)
            missing = (span.min_length - count - 1).clamp(min=0)  # after one more code
            more = is_open & (count < span.max_length) & (room >= missing + 2)
            enough = is_open & (count >= span.min_length) & (count <= span.max_length)
            stuck = is_open & ~more & ~enough
            if bool(stuck.any()):
                so_far = int(count[stuck][0])
                raise InputError(
                    f"a span has {so_far} codes, needs {span.min_length} to {span.max_length} and an end, and {room} ids are "
                    f"left of max_length {self.max_length}; leave more room, or begin no span in the prompt"
                )
            inside = torch.zeros(len(scores), vocabulary, dtype=torch.bool, device=scores.device)
            inside[:, span.offset : span.offset + span.codes] = more[:, None]
            inside[:, span.end] = enough
            allowed = torch.where(is_open[:, None], inside, allowed)
        return scores.masked_fill(~allowed, -torch.inf)


def _last(found: Tensor) -> Tensor:
    """The last place (B,) where `found` (B, T) is True; -1 where it is nowhere."""
    places = torch.arange(found.shape[1], device=found.device)
    return torch.where(found, places, -1).amax(1)
