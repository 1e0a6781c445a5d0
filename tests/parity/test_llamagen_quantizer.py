"""LlamaGen's vector quantizer in training: codes, the three losses and their gradients."""

from __future__ import annotations

import reference
import torch

from tokgen.quantizers.vq import VQ

CASES = r"llamagen_quantizer_train.*"


def test_losses_and_gradients_are_the_published_ones(parity_case, close):
    case, expected = parity_case
    config = case["config"]["VectorQuantizer"]
    quantizer = VQ(
        dim=config["e_dim"],
        codebook_size=config["n_e"],
        metric="cosine" if config["l2_norm"] else "l2",
        beta=config["beta"],
        entropy_weight=config["entropy_loss_ratio"],
    )
    published = reference.state_dict(case)
    quantizer.load_state_dict({"codebook.weight": published["quantize.embedding.weight"]})
    weight = quantizer.codebook.weight

    inputs = reference.inputs(case)
    z = inputs["z"].requires_grad_()  # (B, C, h, w)
    out = quantizer.train()(z.movedim(1, -1))
    quantized = out.codes.movedim(-1, 1)
    nothing = 0 * (z.sum() + weight.sum())  # the entropy term is absent, not 0, at weight 0
    entropy = out.losses.get("entropy", nothing)

    def gradients(y):
        return torch.autograd.grad(y, (z, weight), retain_graph=True, allow_unused=True)

    safe = expected["ids_safe"]
    assert torch.equal(out.ids[safe], expected["ids"][safe])
    close(case, expected, "quantized", quantized)
    for name, value in (
        ("vq_loss", out.losses["codebook"]),
        ("commit_loss", out.losses["commitment"]),
        ("entropy_loss", entropy),
    ):
        close(case, expected, name, value.reshape(expected[name].shape))
    grad_z, grad_codebook = gradients((quantized * inputs["grad_output"]).sum())
    close(case, expected, "grad_z", grad_z)
    assert grad_codebook is None
    for prefix, loss in (("loss", out.losses["codebook"] + out.losses["commitment"]), ("entropy", entropy)):
        grad_z, grad_codebook = gradients(loss)
        close(case, expected, f"{prefix}_grad_z", grad_z)
        close(case, expected, f"{prefix}_grad_codebook", grad_codebook)
