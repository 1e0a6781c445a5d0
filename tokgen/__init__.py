"""tokgen: train, use, compare and publish discrete visual tokenizers and the generators that draw with them.

>>> import tokgen
>>> tokenizer = tokgen.load("assets/demo/tokenizer")
>>> tokens = tokenizer.encode(images)          # Tokens: integer ids and what they mean
>>> pixels = tokenizer.decode(tokens)          # (B, 3, H, W) in [0, 1]

Names are imported when first used: `import tokgen` itself loads neither torch nor lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Grid": "tokgen.tokens",
    "Layout": "tokgen.tokens",
    "Scales": "tokgen.tokens",
    "Sequence": "tokgen.tokens",
    "TextToImagePipeline": "tokgen.generators.pipeline",
    "TokgenError": "tokgen.errors",
    "Tokens": "tokgen.tokens",
    "Trajectories": "tokgen.tokens",
    "VisualTokenizer": "tokgen.tokenizers.base",
    "load": "tokgen.hub",
    "push_to_hub": "tokgen.hub",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # for editors; at run time __getattr__ below finds them
    from tokgen.errors import TokgenError
    from tokgen.generators.pipeline import TextToImagePipeline
    from tokgen.hub import load, push_to_hub
    from tokgen.tokenizers.base import VisualTokenizer
    from tokgen.tokens import Grid, Layout, Scales, Sequence, Tokens, Trajectories


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
