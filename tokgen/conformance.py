"""The laws that every tokenizer and quantizer keeps, as checks that anyone can run: `tokgen check PATH_OR_NAME`.

Tokenizers (design of `VisualTokenizer`):
  1. round trip     decode(encode(x)) is the reconstruction of forward(x), bit for bit in fp32
  2. determinism    encoding twice gives the same ids; an item's ids do not depend on the rest of the batch
  3. publication    saved, loaded and decoded in another process, tokens give the same pixels
  4. range          every id lies in its codebook, padding is 0
  5. prefixes       every prefix that the layout allows decodes
Quantizers: eval codes are lookup(ids) bit for bit, the same determinism, the same range, and state that survives saving.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tokgen.errors import TokgenError
from tokgen.quantizers.base import QUANTIZERS, Quantizer
from tokgen.tokenizers.base import TOKENIZERS, VisualTokenizer
from tokgen.tokens import Tokens

PRECISIONS = ("fp32", "bf16")


@dataclass
class Finding:
    """Outcome of one law in one case; `problem` is empty when it holds."""

    law: str
    case: str
    problem: str = ""


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
        yield


def _law(findings: list[Finding], law: str, case: str, check: Callable[[], str]) -> None:
    try:
        findings.append(Finding(law, case, check()))
    except Exception as error:  # a law that raises is broken, whatever it raises
        findings.append(Finding(law, case, f"{type(error).__name__}: {error}"))


def check_tokenizer(tokenizer: VisualTokenizer, publication: bool = True) -> list[Finding]:
    """Run the five laws in {fp32, bf16 autocast} x {square, wide}; square only where the tokenizer takes one size. A tokenizer of
    pictures and clips keeps them for both.

    Args:
        publication: also law 3, which starts a process.
    """
    tokenizer = tokenizer.eval()
    findings: list[Finding] = []
    for ndim in tokenizer.ndims:
        kind = ("clips, " if ndim == 5 else "pictures, ") if len(tokenizer.ndims) > 1 else ""
        for shape in ("square", "wide") if tokenizer.image_size is None else ("square",):
            pixels = tokenizer.example_pixels(wide=shape == "wide", ndim=ndim).to(tokenizer.device)
            for name in PRECISIONS:
                with precision(name, tokenizer.device):
                    _check_case(findings, tokenizer, pixels, f"{kind}{shape}, {name}")
        if publication:
            tokens = tokenizer.encode(tokenizer.example_pixels(wide=True, ndim=ndim))
            _law(findings, "publication", f"{kind}fp32", partial(_other_process, tokenizer, tokens))
    return findings


def _check_case(findings: list[Finding], tokenizer: VisualTokenizer, pixels: Tensor, case: str) -> None:
    tokens = tokenizer.encode(pixels)

    def round_trip() -> str:
        with torch.no_grad():
            expected = tokenizer(pixels).reconstruction.float()
        got = tokenizer.decode(tokens)
        tolerance = 0.0 if "fp32" in case else 1e-2
        worst = (got - expected).abs().max().item()
        if got.shape != pixels.shape:
            return f"decoded {tuple(got.shape)} from pixels {tuple(pixels.shape)}"
        return "" if worst <= tolerance else f"decode(encode(x)) differs from forward(x) by {worst:.3g}"

    def determinism() -> str:
        again = tokenizer.encode(pixels)
        if not torch.equal(again.ids, tokens.ids) or not torch.equal(again.mask, tokens.mask):
            return "encoding twice gives different ids"
        for i in range(len(pixels)):
            alone, n = tokenizer.encode(pixels[i : i + 1]), int(tokens.lengths[i])
            if int(alone.lengths[0]) != n or not torch.equal(alone.ids[0, :n], tokens.ids[i, :n]):
                return f"item {i} alone has other ids than in the batch"
        return ""

    def ranges() -> str:
        tokens.validate()
        return "padding ids are not 0" if tokens.ids[~tokens.mask].any() else ""

    def prefixes() -> str:
        for n in tokens.layout.prefixes():
            if n <= tokens.ids.shape[1] and not torch.isfinite(tokenizer.decode(tokens.prefix(n))).all():
                return f"the prefix of {n} tokens decodes to non-finite pixels"
        return ""

    _law(findings, "round trip", case, round_trip)
    _law(findings, "determinism", case, determinism)
    _law(findings, "range", case, ranges)
    _law(findings, "prefixes", case, prefixes)


def _other_process(tokenizer: VisualTokenizer, tokens: Tokens) -> str:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer.save_pretrained(root / "tokenizer")
        tokens.save(root / "tokens.safetensors")
        command = [sys.executable, "-m", "tokgen.conformance", str(root), str(torch.get_num_threads())]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            return f"the other process failed: {run.stderr.strip().splitlines()[-1:]}"
        pixels = load_file(root / "pixels.safetensors")["pixels"]
    return "" if torch.equal(pixels, tokenizer.decode(tokens).cpu()) else "another process decodes to other pixels"


def check_quantizer(quantizer: Quantizer) -> list[Finding]:
    """Run the quantizer's laws in {fp32, bf16 autocast} x {(B, N, d), (B, h, w, d)}, after a step of training."""
    findings: list[Finding] = []
    generator = torch.Generator().manual_seed(0)
    quantizer.train()(torch.randn(4, 32, quantizer.dim, generator=generator))
    quantizer.eval()
    for shape in ((3, 10), (3, 4, 6)):
        z = torch.randn(*shape, quantizer.dim, generator=generator)
        for name in PRECISIONS:
            with precision(name, z.device), torch.no_grad():
                _check_quantizer_case(findings, quantizer, z.bfloat16() if name == "bf16" else z, f"{shape}, {name}")
    return findings


def _check_quantizer_case(findings: list[Finding], quantizer: Quantizer, z: Tensor, case: str) -> None:
    out = quantizer(z)

    def codes() -> str:
        if out.ids.dtype != torch.int64:
            return f"ids are {out.ids.dtype}, not int64"
        same = torch.equal(out.codes.float(), quantizer.lookup(out.ids).to(out.codes.dtype).float())
        return "" if same else "eval codes are not lookup(ids)"

    def determinism() -> str:
        if not torch.equal(quantizer(z).ids, out.ids):
            return "quantizing twice gives different ids"
        alone = torch.cat([quantizer(z[i : i + 1]).ids for i in range(len(z))])
        return "" if torch.equal(alone, out.ids) else "an item's ids depend on the rest of the batch"

    def ranges() -> str:
        ids = out.ids if len(quantizer.codebook_sizes) > 1 else out.ids[..., None]
        for c, size in enumerate(quantizer.codebook_sizes):
            if ids[..., c].min() < 0 or ids[..., c].max() >= size:
                return f"ids of codebook {c} leave 0..{size - 1}"
        return ""

    def state() -> str:
        import copy

        twin = copy.deepcopy(quantizer)
        for p in twin.parameters():
            torch.nn.init.zeros_(p)
        twin.load_state_dict(quantizer.state_dict())
        return "" if torch.equal(twin(z).ids, out.ids) else "state_dict does not carry the codebook"

    _law(findings, "codes", case, codes)
    _law(findings, "determinism", case, determinism)
    _law(findings, "range", case, ranges)
    _law(findings, "state", case, state)


def examples(name: str, seed: int = 0) -> Iterator[tuple[str, VisualTokenizer | Quantizer]]:
    """The registered tokenizer or quantizer of that name, in each of its example configurations."""
    if name in TOKENIZERS:
        cls = TOKENIZERS[name]
        for label, config in cls.example_configs().items():
            torch.manual_seed(seed)
            yield f"{name}/{label}", cls(config)
    elif name in QUANTIZERS:
        cls = QUANTIZERS[name]
        for label, options in cls.example_options().items():
            torch.manual_seed(seed)
            yield f"{name}/{label}", cls(dim=8, **options)
    else:
        known = ", ".join([*TOKENIZERS.names(), *QUANTIZERS.names()])
        raise TokgenError(f"{name!r} is neither a model folder nor a registered name; names are {known}")


def check(module: VisualTokenizer | Quantizer, publication: bool = True) -> list[Finding]:
    """The laws of a tokenizer or of a quantizer."""
    return check_quantizer(module) if isinstance(module, Quantizer) else check_tokenizer(module, publication)


def _decode_in_this_process(root: Path, threads: int) -> None:
    import tokgen
    from tokgen.pretrained import write_safetensors

    torch.set_num_threads(threads)
    tokens = Tokens.load(root / "tokens.safetensors")
    write_safetensors({"pixels": tokgen.load(root / "tokenizer").decode(tokens)}, root / "pixels.safetensors", {})


if __name__ == "__main__":
    _decode_in_this_process(Path(sys.argv[1]), int(sys.argv[2]))
