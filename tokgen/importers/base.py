"""Foreign checkpoints as tables: published key patterns on the left, ours on the right, and a strict report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tokgen.errors import CheckpointError


@dataclass
class ImportReport:
    """What became of a published state dict.

    Attributes:
        mapped: {published key: our key}.
        ignored: {published key: why it is not needed}.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.mapped)} tensors mapped, {len(self.ignored)} ignored"]
        return "\n".join(lines + [f"  ignored {key}: {why}" for key, why in self.ignored.items()])


def rename(
    state: dict[str, Tensor], table: Sequence[tuple[str, str]], ignore: Sequence[tuple[str, str]], where: str
) -> tuple[dict[str, Tensor], ImportReport]:
    """Rename the keys of `state` by the first full match of a regular expression in `table`.

    Args:
        table: (pattern, replacement) pairs; replacements may use groups.
        ignore: (pattern, reason) pairs of keys that are not needed.

    Raises:
        CheckpointError: a key that neither table knows (nothing is dropped silently).
    """
    out, report, unknown = {}, ImportReport(), []
    for key, value in state.items():
        reason = next((why for pattern, why in ignore if re.fullmatch(pattern, key)), None)
        if reason is not None:
            report.ignored[key] = reason
            continue
        rule = next(((p, r) for p, r in table if re.fullmatch(p, key)), None)
        if rule is None:
            unknown.append(key)
            continue
        report.mapped[key] = re.fullmatch(rule[0], key).expand(rule[1])
        out[report.mapped[key]] = value
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise CheckpointError(
            f"{where}: keys that this importer does not know: {shown}; is it a checkpoint of this family?"
        )
    return out, report


def read_state_dict(
    path: str | Path, containers: Sequence[str] = ("model", "module", "state_dict")
) -> dict[str, Tensor]:
    """The tensors of a published .pt / .pth / .bin / .safetensors file; never unpickles objects.

    Containers {"model" | "state_dict" | "module": tensors, ...} are opened, the first that is there of those named. argparse.Namespace, which LlamaGen's files
    hold beside the weights, is the one type allowed besides tensors and plain data.
    """
    import argparse
    import pickle

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {path}; give the path of a downloaded .pt or .safetensors file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        if held := re.search(r"GLOBAL (\S+)", str(error)):  # a type that only unpickling would bring back
            reason = (
                f"it holds a {held[1]}, which only unpickling would bring back, and that can run code; save its tensors alone "
                "with the code that wrote it"
            )
        raise CheckpointError(f"{path} cannot be read as plain weights: {reason}") from None
    for name in containers:
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            data = data[name]
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path} holds no state dict; expected tensors by name, or under 'model' or 'state_dict'")
    return data
