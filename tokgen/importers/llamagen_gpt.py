"""LlamaGen's published decoders (c2i_*.pt, t2i_*.pt; Sun et al. 2024, arXiv 2406.06525) as `LlamaGenerator`.

The layout is a table; sizes come from the tensors. Three things are not in the tensors: the number of heads (a table of
the published configurations knows it), the grid of the images (in the published file's name), and the rotary positions,
which are computed. The weights were trained with the rotation of the prefix set to the number 0; `rope_prefix="zero"`
keeps it so, since they would be wrong without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tokgen.errors import CheckpointError, ConfigError
from tokgen.generators.conditions import ClassNames, T5Features
from tokgen.generators.llama import LlamaConfig, LlamaGenerator
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.pretrained import load_strictly
from tokgen.tokens import Grid

GPT_KEYS = [
    (r"cls_embedding\.embedding_table\.weight", r"condition.embeddings.weight"),
    (r"cls_embedding\.cap_proj\.(fc[12])\.weight", r"condition.\1.weight"),
    (r"cls_embedding\.uncond_embedding", r"condition.unconditional"),
    (r"(tok_embeddings|norm|output)\.weight", r"\1.weight"),
    (r"layers\.(\d+)\.attention\.(wqkv|wo)\.weight", r"layers.\1.attention.\2.weight"),
    (r"layers\.(\d+)\.feed_forward\.(w[123])\.weight", r"layers.\1.feed_forward.\2.weight"),
    (r"layers\.(\d+)\.(attention_norm|ffn_norm)\.weight", r"layers.\1.\2.weight"),
]
GPT_IGNORED = [(r"freqs_cis", "a table of rotary positions, which are computed here")]

# The published configurations: name, (dim, layers), heads. Heads are 64 channels wide up to XXL, 100 in 3B, 128 in 7B.
GPT_SIZES = {
    "B": ((768, 12), 12),
    "L": ((1024, 24), 16),
    "XL": ((1280, 36), 20),
    "XXL": ((1536, 48), 24),
    "XXXL": ((2560, 48), 40),
    "1B": ((2048, 22), 32),
    "3B": ((3200, 24), 32),
    "7B": ((4096, 32), 32),
}
TEXT_ENCODER = "google/flan-t5-xl"
# what the published demos draw with
CLASS_SAMPLING = {"guidance_scale": 4.0, "top_k": 2000}
TEXT_SAMPLING = {"guidance_scale": 7.5, "top_k": 1000}
VQ_FACTOR = 16  # of the tokenizer of all published decoders


def gpt_config(state: dict[str, Tensor], grid: int | None = None, heads: int | None = None) -> LlamaConfig:
    """The sizes of a published state dict, read off its tensors.

    Args:
        state: published keys.
        grid: side of the square of codes; None takes it from `freqs_cis`, which some files hold.
        heads: attention heads; None takes them from `freqs_cis`, else from the published configuration of that size.

    Raises:
        CheckpointError: a tensor is missing. ConfigError: grid or heads are neither given nor to be found.
    """
    try:
        codes, dim = state["tok_embeddings.weight"].shape
        hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
        rows = state["layers.0.attention.wqkv.weight"].shape[0]
        by_class = "cls_embedding.embedding_table.weight" in state
        if by_class:
            prefix = 1
            condition = {"num_classes": state["cls_embedding.embedding_table.weight"].shape[0] - 1}
        else:
            prefix, width = state["cls_embedding.uncond_embedding"].shape
            condition = {"max_text": prefix, "feature_dim": width}
    except KeyError as error:
        raise CheckpointError(f"this is not a LlamaGen GPT state dict: {error} is missing") from None
    layers = 1 + max(int(m[1]) for k in state if (m := re.match(r"layers\.(\d+)\.", k)))
    table = state.get("freqs_cis")  # (prefix + grid^2, head_dim / 2, 2)
    if heads is None and table is not None:
        heads = dim // (2 * table.shape[1])
    heads = heads or next((h for size, h in GPT_SIZES.values() if size == (dim, layers)), None)
    if heads is None:
        raise ConfigError(f"width {dim} with {layers} layers is no published configuration; say how many heads it has")
    if grid is None and table is not None:
        grid = round((table.shape[0] - prefix) ** 0.5)
    if grid is None:
        raise ConfigError("the side of the code grid is not in the file; give it, such as 24 for 384 px")
    # rows = (query heads + 2 key-value heads) x head_dim
    kv_heads = (rows - dim) * heads // (2 * dim)
    return LlamaConfig(
        layout=Grid(grid, grid).to_dict(),
        codebook_sizes=(codes,),
        condition="class" if by_class else "features",
        **condition,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        hidden=hidden,
        rope="2d",
        rope_prefix="zero",
        token_dropout=0.1,
        residual_dropout=0.1,
        ffn_dropout=0.1,
        caption_dropout=0.1,
        zero_head=True,
    )


def gpt_from_state_dict(
    state: dict[str, Tensor],
    where: str = "state dict",
    *,
    grid: int | None = None,
    heads: int | None = None,
    text_encoder: str | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[LlamaGenerator, ImportReport]:
    """A `LlamaGenerator` in eval mode with the published weights, and what was mapped and ignored.

    Args:
        state: published keys.
        where: its name in messages.
        grid, heads: see `gpt_config`.
        text_encoder: of a text-conditional model: Hub name or folder of the T5 whose features it was trained on, None
            means the published one. It is recorded by name and loaded at the first prompt.
        class_names: of a class-conditional model, in the order of its labels; None names them "0", "1", ….

    Raises:
        CheckpointError: keys or shapes that are not of this family. ConfigError: see `gpt_config`; a wrong number of
            class names, or an option of the other kind of model.
    """
    renamed, report = rename(state, GPT_KEYS, GPT_IGNORED, where)
    config = gpt_config(state, grid, heads)
    if config.condition == "class":
        if text_encoder is not None:
            raise ConfigError(f"{where} is class-conditional; it has no text encoder")
        names = [str(i) for i in range(config.num_classes)] if class_names is None else list(class_names)
        if len(names) != config.num_classes:
            raise ConfigError(f"{len(names)} class names for {config.num_classes} classes of {where}")
        prompts: Any = ClassNames(names)
        generation = CLASS_SAMPLING
    else:
        if class_names is not None:
            raise ConfigError(f"{where} is text-conditional; it has no class names")
        prompts = T5Features(text_encoder or TEXT_ENCODER, config.max_text)
        generation = TEXT_SAMPLING
    generator = LlamaGenerator(config, prompts, generation=generation)
    load_strictly(generator, renamed, where)
    return generator.eval(), report


def load_gpt(
    path: str | Path,
    grid: int | None = None,
    heads: int | None = None,
    text_encoder: str | None = None,
    class_names: str | Path | None = None,
) -> tuple[LlamaGenerator, ImportReport]:
    """Read c2i_*.pt or t2i_*.pt (or training files of that layout).

    Args:
        path: the file. Published names end in the image size, which gives the grid: c2i_L_384.pt is 24 x 24 codes.
        grid, heads, text_encoder: see `gpt_from_state_dict`.
        class_names: text file with one name in a line, in the order of the labels.

    Raises:
        CheckpointError, ConfigError: see `gpt_from_state_dict`.
    """
    state = read_state_dict(path)
    if grid is None and "freqs_cis" not in state:
        size = re.search(r"_(\d{2,4})$", Path(path).stem)
        if size is None or int(size[1]) % VQ_FACTOR:
            raise ConfigError(
                f"the side of the code grid is neither in {path} nor in its name (such as c2i_L_384.pt); "
                f"give --grid, image size / {VQ_FACTOR}"
            )
        grid = int(size[1]) // VQ_FACTOR
    names = None if class_names is None else read_class_names(class_names)
    return gpt_from_state_dict(state, str(path), grid=grid, heads=heads, text_encoder=text_encoder, class_names=names)


def read_class_names(path: str | Path) -> list[str]:
    """Names from a text file, one in a line. Raises ConfigError for an empty or repeated one, with its line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; expected one class name in a line") from None
    names: dict[str, int] = {}
    for number, name in enumerate(map(str.strip, lines), 1):
        if not name:
            raise ConfigError(f"{path}, line {number} is empty; expected one class name in a line")
        if name in names:  # ImageNet has two cranes
            raise ConfigError(
                f"{path}: {name!r} stands in lines {names[name]} and {number}; names must differ, such as 'crane (bird)'"
            )
        names[name] = number
    return list(names)
