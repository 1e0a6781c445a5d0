"""SEED tokenizers as published (AILab-CVC/SEED: seed_quantizer.pt with LAVIS's eva_vit_g.pth), as `SEED`.

The quantizer's file has no vision tower: it comes from a file of its own. LAVIS's training checkpoints hold only what was
trained, so that a run of both stages imports from both files together, the later one winning. Sizes come from the tensors,
except the heads, which are 12 everywhere (88 channels a head in the tower); the kind of detokenizer comes from the keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from tokgen.encoders.eva import EvaConfig
from tokgen.errors import CheckpointError
from tokgen.importers.base import ImportReport, read_state_dict, rename
from tokgen.importers.eva import eva_config, eva_weights
from tokgen.pretrained import load_strictly
from tokgen.text import TextTokenizer
from tokgen.tokenizers.seed import IMAGE, SEED, TEXT, SeedConfig

HEADS = 12  # a literal in the published code
SEP = 102  # BERT's id that ends a text
TOWER = "visual_encoder."


def _qformer(published: str, ours: str, text: bool) -> list[tuple[str, str]]:
    layer, to = rf"{published}\.bert\.encoder\.layer\.(\d+)", rf"{ours}.layers.\1"
    table = [
        (rf"{published}\.bert\.embeddings\.LayerNorm\.(\w+)", rf"{ours}.norm.\1"),
        (rf"{layer}\.attention\.self\.(query|key|value)\.(\w+)", rf"{to}.attention.\2.\3"),
        (rf"{layer}\.attention\.output\.dense\.(\w+)", rf"{to}.attention.proj.\2"),
        (rf"{layer}\.attention\.output\.LayerNorm\.(\w+)", rf"{to}.attention_norm.\2"),
        (rf"{layer}\.crossattention\.self\.(query|key|value)\.(\w+)", rf"{to}.cross.\2.\3"),
        (rf"{layer}\.crossattention\.output\.dense\.(\w+)", rf"{to}.cross.proj.\2"),
        (rf"{layer}\.crossattention\.output\.LayerNorm\.(\w+)", rf"{to}.cross_norm.\2"),
        (rf"{layer}\.intermediate_query\.dense\.(\w+)", rf"{to}.query_mlp.fc1.\2"),
        (rf"{layer}\.output_query\.dense\.(\w+)", rf"{to}.query_mlp.fc2.\2"),
        (rf"{layer}\.output_query\.LayerNorm\.(\w+)", rf"{to}.query_norm.\2"),
    ]
    if text:
        table += [
            (rf"{published}\.bert\.embeddings\.word_embeddings\.weight", rf"{ours}.words.weight"),
            (rf"{published}\.bert\.embeddings\.position_embeddings\.weight", rf"{ours}.places.weight"),
            (rf"{layer}\.intermediate\.dense\.(\w+)", rf"{to}.text_mlp.fc1.\2"),
            (rf"{layer}\.output\.dense\.(\w+)", rf"{to}.text_mlp.fc2.\2"),
            (rf"{layer}\.output\.LayerNorm\.(\w+)", rf"{to}.text_norm.\2"),
        ]
    return table


SEED_KEYS = [
    (r"query_tokens", "qformer.queries"),
    *_qformer("Qformer", "qformer", text=False),
    (r"ln_vision\.(\w+)", r"ln_vision.\1"),
    (r"(en|de)code_task_layer\.(\d)\.(\w+)", r"\1code_task.\2.\3"),
    (r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
    (r"pos_embed", "reconstruction.places"),
    (r"blocks\.(\d+\..*)", r"reconstruction.blocks.\1"),
]
IMAGE_KEYS = [
    (r"pos_embed_image", "generation.places"),
    (r"blocks_image\.(\d+\..*)", r"generation.blocks.\1"),
    (r"distill_image_proj\.(\w+)", r"head.project.\1"),
]
STATES_KEYS = [  # v1
    (r"pos_embed_text", "generation.places"),
    (r"blocks_text\.(\d+\..*)", r"generation.blocks.\1"),
    (r"distill_text_proj\.(\w+)", r"head.project.\1"),
]
MLP_KEYS = [(r"image_down\.(\d)\.weight", r"head.narrow.\1.weight")]
REVERSE_KEYS = [
    (r"reverse_tokens", "head.qformer.queries"),
    *_qformer("Reverse_Qformer", "head.qformer", text=False),
]
TEXT_SIDE = [
    *_qformer("Qformer", "qformer", text=True),
    (r"(vision|text)_proj\.(\w+)", r"\1_projection.\2"),
    (r"temp", "temperature"),
]
IGNORED = [
    (r".*\.position_ids", "numbers 0, 1, 2, …"),
    (r"Qformer\.cls\..*", "the captioning head, which SEED does not train"),
    (r"itm_head\..*", "the matching head, which SEED does not train"),
    (r"Reverse_Qformer\.(cls|bert\.embeddings\.\w+_embeddings)\..*", "the reverse Q-Former reads no text"),
    (r"Reverse_Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*", "the reverse Q-Former reads no text"),
]
LEFT_OVER = "not a part of the tokenizer; left over from training"


def has_text_side(state: dict[str, Tensor]) -> bool:
    """Whether pictures and captions can be compared: all of the text path is there."""
    embeddings, layer = "Qformer.bert.embeddings", r"Qformer\.bert\.encoder\.layer\.\d+"
    wanted = {f"{embeddings}.{name}_embeddings.weight" for name in ("word", "position")}
    wanted |= {f"{part}_proj.{kind}" for part in ("vision", "text") for kind in ("weight", "bias")} | {"temp"}
    layers, texts = (
        sum(bool(re.fullmatch(rf"{layer}\.{part}\.dense\.weight", key)) for key in state)
        for part in ("intermediate_query", "intermediate")
    )
    return wanted <= state.keys() and layers == texts


def seed_config(state: dict[str, Tensor], tower: EvaConfig, where: str = "state dict") -> SeedConfig:
    """The sizes of a published state dict. Raises CheckpointError, in one line, if it is none of SEED's."""

    def layers(prefix: str) -> int:
        return 1 + max(int(m[1]) for key in state if (m := re.match(rf"{prefix}\.bert\.encoder\.layer\.(\d+)\.", key)))

    v1 = "pos_embed_text" in state and "pos_embed_image" not in state
    reverse = "reverse_tokens" in state and "image_down.0.weight" not in state  # the former may be a leftover
    text = has_text_side(state)
    try:
        _, queries, dim = state["query_tokens"].shape
        depth = layers("Qformer")
        cross = [i for i in range(depth) if f"Qformer.bert.encoder.layer.{i}.crossattention.self.key.weight" in state]
        codes, code_dim = state["quantize.embedding.weight"].shape
        target = state[f"distill_{'text' if v1 else 'image'}_proj.weight"].shape[0]
        config = {
            "image_size": tower.image_size,
            "encoder": {"type": "eva", "config": asdict(tower)},
            "queries": queries,
            "dim": dim,
            "heads": HEADS,
            "hidden": state["Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"].shape[0],
            "layers": depth,
            "cross_attention_freq": cross[1] - cross[0] if len(cross) > 1 else depth,
            "code_dim": code_dim,
            "quantizer": {**SeedConfig().quantizer, "codebook_size": codes},
            "decoder_depth": len([k for k in state if re.fullmatch(r"blocks\.\d+\.norm1\.weight", k)]),
            "decoder_heads": HEADS,
            "target": TEXT if v1 else IMAGE,
            "target_dim": target,
        }
        if reverse:
            config |= {"detok_head": "reverse_qformer", "reverse_queries": state["reverse_tokens"].shape[1]}
            config["reverse_layers"] = layers("Reverse_Qformer")
        else:
            config["head_widths"] = tuple(state[f"image_down.{i}.weight"].shape[0] for i in (0, 2, 4))
        if text:
            words = state["Qformer.bert.embeddings.word_embeddings.weight"]
            config |= {"text_vocab": len(words), "embed_dim": state["text_proj.weight"].shape[0]}
            config["text_end"] = SEP if len(words) > SEP else None
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{where} holds no whole SEED tokenizer: {error} is missing") from None
    return SeedConfig(**config)


def seed_from_state_dict(
    state: dict[str, Tensor],
    vit: dict[str, Tensor] | None = None,
    where: str = "state dict",
    vit_heads: int | None = None,
    text: TextTokenizer | None = None,
) -> tuple[SEED, ImportReport]:
    """A `SEED` in eval mode with the published weights, and what was mapped and ignored.

    Args:
        state: of the quantizer; of a training run the union of both stages.
        vit: of the tower, without a prefix; None: it is in `state`, under "visual_encoder.". In the report, too, its keys
            have that prefix.
        vit_heads: of the tower; None: of 88 channels each.
        text: how captions are read, if the state has a text side.

    Raises:
        CheckpointError: a file of another family, or a key of the tokenizer that is missing.
    """
    inside = {key.removeprefix(TOWER): value for key, value in state.items() if key.startswith(TOWER)}
    state = {key: value for key, value in state.items() if not key.startswith(TOWER)}
    if "query_tokens" not in state:
        hint = (
            "; the checkpoint of stage II needs that of stage I before it"
            if "encode_task_layer.0.weight" in state
            else ""
        )
        hint = "; it is a vision tower, which goes to `vit`" if "patch_embed.proj.weight" in state else hint
        raise CheckpointError(f"{where} holds no SEED tokenizer: query_tokens is missing{hint}")
    if vit is None and not inside:
        raise CheckpointError(f"{where} holds no vision tower; give the path of eva_vit_g.pth as `vit`")
    if vit is not None and "patch_embed.proj.weight" not in vit:
        raise CheckpointError("what was given as `vit` is no EVA-CLIP vision tower; expected LAVIS's eva_vit_g.pth")
    tower = inside if vit is None else vit
    sizes = eva_config(tower, "seed", vit_heads)
    renamed, report = eva_weights(tower, sizes, where)
    ours = {f"encoder.{key}": value for key, value in renamed.items()}
    # the tower's own file has no prefix, and names (pos_embed, blocks) that the quantizer has too
    whole = ImportReport(
        {f"{TOWER}{key}": f"encoder.{to}" for key, to in report.mapped.items()},
        {f"{TOWER}{key}": why for key, why in report.ignored.items()},
    )

    config = seed_config(state, sizes, where)
    table = SEED_KEYS + (IMAGE_KEYS if config.target == IMAGE else STATES_KEYS)
    table = table + (MLP_KEYS if config.detok_head == "mlp" else REVERSE_KEYS)
    if config.text_vocab:
        table = TEXT_SIDE + table
    known = [pattern for pattern, _ in [*table, *IGNORED]]
    rest = [(re.escape(k), LEFT_OVER) for k in state if not any(re.fullmatch(p, k) for p in known)]
    renamed, report = rename(state, table, [*IGNORED, *rest], where)
    whole.mapped |= report.mapped
    whole.ignored |= report.ignored

    tokenizer = SEED(config, text)
    load_strictly(tokenizer, {**ours, **renamed}, where)
    return tokenizer.eval(), whole


def load_seed(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    vit: str | os.PathLike[str] | None = None,
    text: str | None = None,
) -> tuple[SEED, ImportReport]:
    """Read seed_quantizer.pt, or the checkpoints of both training stages in their order, and eva_vit_g.pth.

    Args:
        path: of the quantizer's file, or a list of files whose tensors are put together, a later one winning.
        vit: of LAVIS's eva_vit_g.pth; None: the tower is among the tensors of `path`.
        text: Hub name or folder of BERT's vocabulary, to compare with captions (bert-base-uncased); it is used where the
            files hold the text side.
    """
    paths = [Path(path)] if isinstance(path, (str, os.PathLike)) else [Path(p) for p in path]
    state: dict[str, Tensor] = {}
    for p in paths:
        state |= read_state_dict(p)
    where = " + ".join(str(p) for p in paths)
    words = TextTokenizer.from_name(text, lowercase=True) if text is not None and has_text_side(state) else None
    return seed_from_state_dict(state, None if vit is None else read_state_dict(vit), where, text=words)
