"""Load and publish: `tokgen.load` finds out what a folder or Hub repository holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokgen.encoders.base import ENCODERS, VIDEO_ENCODERS
from tokgen.errors import CheckpointError
from tokgen.generators.base import GENERATORS
from tokgen.pretrained import CONFIG, Pretrained, read_config, resolve
from tokgen.tokenizers.base import TOKENIZERS
from tokgen.trajectories.segmenter import SEGMENTERS

REGISTRIES = (TOKENIZERS, GENERATORS, ENCODERS, VIDEO_ENCODERS, SEGMENTERS)


def load(path_or_repo: str | os.PathLike[str], revision: str | None = None, device: str | None = None) -> Any:
    """The tokenizer, generator, encoder or segmenter of a folder or a Hub repository ('owner/name'), in eval mode.

    Args:
        revision: branch, tag or commit of a Hub repository.
        device: where to put it; the CPU if None.

    Raises:
        CheckpointError: not there, of an unknown type, or damaged.
    """
    folder = resolve(path_or_repo, revision)
    name = read_config(folder).get("type")
    for registry in REGISTRIES:
        if isinstance(name, str) and name in registry:
            module = registry[name].from_pretrained(folder)
            return module if device is None else module.to(device)
    known = ", ".join(name for registry in REGISTRIES for name in registry.names())
    raise CheckpointError(f"{folder / CONFIG} is of type {name!r}, which this version does not know; it knows {known}")


def push_to_hub(module: Pretrained, repo: str, private: bool = False, message: str = "Upload with tokgen") -> str:
    """Publish a tokenizer or generator as `owner/name` on the Hugging Face Hub; returns the commit's address.

    The token is the one `huggingface-cli login` stored, or HF_TOKEN.
    """
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(Path(folder))
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
