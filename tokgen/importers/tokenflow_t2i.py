"""TokenFlow-t2i's published folder (Qu et al. 2024, arXiv 2412.03069) as `TokenFlowGenerator`.

A Hugging Face folder of a Llama with norms of queries and keys, a projector, levels and positions. Names and order of the ids
are those of the released code, which made it. Three things are not in the folder and come from elsewhere: the tokenizer,
whose code vectors and scales it was trained with; the text vocabulary, Llama-2's; and the text ids that begin an image,
which are what this vocabulary makes of the word "<img>".

Its vocabulary is words, [PAD], codes, and the embedding and the head have rows for all of them. Codes are not read by their
rows of the embedding, and words are left out when drawing: these rows are dropped, and the report says so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokgen.errors import CheckpointError, ConfigError
from tokgen.generators.tokenflow import TokenFlowGenerator, TokenFlowGeneratorConfig
from tokgen.importers.base import ImportReport, rename
from tokgen.importers.causal_lm import interleaved
from tokgen.importers.sharded import INDEX, shapes_in, tensors_in, weight_files
from tokgen.pretrained import CONFIG, read_config, resolve
from tokgen.text import TextTokenizer
from tokgen.tokenizers.tokenflow import TokenFlow
from tokgen.tokens import Scales

# on the right, "#q", "#k" and "#v" are the parts of a matrix, "#pairs" asks for the order of rotary pairs, and "#words" and
# "#codes" are rows of the vocabulary
T2I_KEYS = [
    (r"model\.embed_tokens\.weight", r"condition.embeddings.weight#words"),
    (r"lm_head\.weight", r"output.weight#codes"),
    (r"model\.norm\.weight", r"norm.weight"),
    (r"model\.mm_projector\.0\.(weight|bias)", r"codes.projector.layers.0.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"codes.projector.layers.1.\1"),
    (r"model\.lvl_embed\.weight", r"levels.weight"),
    (r"model\.pos_1LC", r"positions"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", r"layers.\1.attention.wqkv.weight#\2"),
    (r"model\.layers\.(\d+)\.self_attn\.qknorm\.query_norm\.weight", r"layers.\1.attention.q_norm.weight#pairs"),
    (r"model\.layers\.(\d+)\.self_attn\.qknorm\.key_norm\.weight", r"layers.\1.attention.k_norm.weight#pairs"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", r"layers.\1.attention.wo.weight"),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight", r"layers.\1.feed_forward.w1.weight"),
    (r"model\.layers\.(\d+)\.mlp\.up_proj\.weight", r"layers.\1.feed_forward.w3.weight"),
    (r"model\.layers\.(\d+)\.mlp\.down_proj\.weight", r"layers.\1.feed_forward.w2.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"layers.\1.attention_norm.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"layers.\1.ffn_norm.weight"),
]
T2I_IGNORED = [
    (r"image_token_(start|end)", "where the codes lie in the vocabulary, which is read"),
    (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "rotary positions are computed here"),
]
WORDS = 32_001  # ids before the first code where the folder does not say: Llama-2's 32,000 and [PAD]
IMAGE_BEGIN = "<img>"
# what the released script draws with: cfg 7.5, one pass. Its other presets are in `tokgen.generators.next_scale`
SAMPLING = {
    "guidance_scale": 8.5,
    "schedule": "linear",
    "top_k": 600,
    "top_p": 0.6,
    "negative_prompt": (
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
        "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    ),
}


def load_t2i(
    path: str | os.PathLike[str],
    tokenizer: TokenFlow,
    text: str | os.PathLike[str],
    image_begin: Sequence[int] | None = None,
) -> tuple[TokenFlowGenerator, ImportReport]:
    """Read a downloaded TokenFlow-t2i folder, or its Hub name; one tensor at a time.

    The weights become float32, 27 GB for the published model.

    Args:
        path: folder with config.json and safetensors.
        tokenizer: the one that it was trained with, tokenflow_clipb_32k_enhanced.pt at 256 px.
        text: Hub name or folder of its text vocabulary, meta-llama/Llama-2-7b-hf; the folder's own will do if it has a
            fast tokenizer, without the ids of codes that it was given.
        image_begin: text ids between caption and codes; None: what the vocabulary makes of "<img>".

    Returns:
        the generator in eval mode, and what was mapped and ignored.

    Raises:
        CheckpointError: keys or shapes that are not of this family. ConfigError: a tokenizer of other codes, scales or
            kind, or a text vocabulary that is too large.
    """
    if not isinstance(tokenizer, TokenFlow):
        raise ConfigError(f"TokenFlow-t2i draws TokenFlow's codes and was given a {type(tokenizer).__name__}")
    folder = resolve(path, files=(CONFIG, "model*.safetensors", INDEX))
    files, where = weight_files(folder), str(path)
    shapes = shapes_in(files)
    _, report = rename(shapes, T2I_KEYS, T2I_IGNORED, where)
    ends = {key: int(value) for key, value in tensors_in(files, ("image_token_start", "image_token_end"))}
    words = ends.get("image_token_start", WORDS)
    stop = ends["image_token_end"] + 1 if "image_token_end" in ends else None
    prompts = _words_alone(TextTokenizer.from_name(str(text), normalize_whitespace=False), words)
    if image_begin is None:
        image_begin = prompts.tokenizer.encode(IMAGE_BEGIN, add_special_tokens=False).ids
    config = t2i_config(shapes, words, stop, tokenizer.config.scales, tuple(image_begin), read_config(folder), where)
    generator = TokenFlowGenerator(config, prompts, generation=SAMPLING).eval()
    generator.check_tokenizer(tokenizer)
    generator.take_codebook(tokenizer.codebook_table())
    generator.tokenizer_fingerprint = tokenizer.fingerprint
    fill_t2i(generator, tensors_in(files), report, where)
    return generator, report


@torch.no_grad()
def fill_t2i(
    generator: TokenFlowGenerator, tensors: Iterable[tuple[str, Tensor]], report: ImportReport, where: str
) -> None:
    """Give a generator of the right sizes the published tensors, one at a time; `report` is of `rename` with `T2I_KEYS`.

    Raises:
        CheckpointError: tensors that are missing, without a place, or of another shape.
    """
    own = dict(generator.named_parameters())
    expected = {k + p for k in own if not k.endswith("boi") for p in _parts(k)}
    for label, wrong in (
        ("missing", expected - {*report.mapped.values()}),
        ("without a place", {*report.mapped.values()} - expected),
    ):
        if wrong:
            raise CheckpointError(f"{where} is no TokenFlow-t2i: {label}: {', '.join(sorted(wrong)[:4])}")
    attention, words = generator.layers[0].attention, generator.config.text_vocab
    for key, value in tensors:
        if key not in report.mapped:
            continue
        target, _, part = report.mapped[key].partition("#")
        destination = own[target]
        if part in ("q", "k", "v"):
            q, kv = (n * attention.head_dim for n in (attention.n_heads, attention.n_kv_heads))
            destination = destination.split([q, kv, kv])["qkv".index(part)]
        if part in ("words", "codes"):
            value = value[:words] if part == "words" else value[words : words + len(destination)]
        if destination.shape != value.shape:
            raise CheckpointError(f"{where}: {key} is {tuple(value.shape)}, expected {tuple(destination.shape)}")
        destination.copy_(interleaved(value, attention.head_dim) if part in ("q", "k", "pairs") else value)
    report.ignored["model.embed_tokens.weight, rows of codes"] = "codes are read by their vectors"
    report.ignored["lm_head.weight, rows of words"] = "words are left out when drawing"


def t2i_config(
    shapes: dict[str, tuple[int, ...]],
    words: int,
    stop: int | None,
    scales: Sequence[int],
    image_begin: tuple[int, ...],
    stated: dict[str, Any],
    where: str,
) -> TokenFlowGeneratorConfig:
    """The sizes of a published folder, read off its tensors; theta and epsilon are in its `config.json`.

    Args:
        shapes: of the published keys.
        words: ids before the first code.
        stop: id after the last code; None: the vocabulary ends there.
        scales: of the tokenizer.
        stated: `config.json`. Without rope_theta and rms_norm_eps those of Llama-2 hold, 10,000 and 1e-5.

    Raises:
        CheckpointError: a tensor is missing. ConfigError: the folder has positions of other scales.
    """
    try:
        rows, dim = shapes["lm_head.weight"]
        head = shapes["model.layers.0.self_attn.qknorm.query_norm.weight"][0]
        q, kv = (shapes[f"model.layers.0.self_attn.{n}_proj.weight"][0] for n in "qk")
        hidden = shapes["model.layers.0.mlp.gate_proj.weight"][0]
        code_dim = shapes["model.mm_projector.0.weight"][1]
        positions, levels = shapes["model.pos_1LC"][0], shapes["model.lvl_embed.weight"][0] - 1
    except KeyError as error:
        raise CheckpointError(f"{where} is no TokenFlow-t2i folder: {error} is missing") from None
    layout = Scales(scales)
    if (layout.length, len(layout.sizes)) != (positions, levels):
        raise ConfigError(
            f"{where} was trained on {positions} codes of {levels} scales, the tokenizer has {layout.length} of "
            f"{len(layout.sizes)}; give the one it was trained with (the published one at 256 px)"
        )
    return TokenFlowGeneratorConfig(
        layout=layout.to_dict(),
        codebook_sizes=((rows if stop is None else stop) - words,),
        text_vocab=words,
        code_dim=code_dim,
        dim=dim,
        n_layers=1 + max(int(m[1]) for k in shapes if (m := re.match(r"model\.layers\.(\d+)\.", k))),
        n_heads=q // head,
        n_kv_heads=None if kv == q else kv // head,
        hidden=hidden,
        rope_base=float(stated.get("rope_theta", 10_000.0)),
        norm_eps=float(stated.get("rms_norm_eps", 1e-5)),
        image_begin=image_begin,
    )


def _parts(key: str) -> Sequence[str]:
    """What the published tensors behind one of ours are marked with in `T2I_KEYS`."""
    name = key.removesuffix(".weight")
    marks = {"wqkv": ("#q", "#k", "#v"), "q_norm": ("#pairs",), "k_norm": ("#pairs",)}
    marks |= {"condition.embeddings": ("#words",), "output": ("#codes",)}
    return marks.get(name, marks.get(name.rpartition(".")[2], ("",)))


def _words_alone(text: TextTokenizer, below: int) -> TextTokenizer:
    """A vocabulary without the ids that were added for codes, so that no caption is read as one."""
    data = json.loads(text.tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < below]
    settings = {**text.settings, "pad_id": text.pad_id if text.pad_id < below else text.bos_id}
    return TextTokenizer(type(text.tokenizer).from_str(json.dumps(data)), settings)
