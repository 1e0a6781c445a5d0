"""Training a visual tokenizer by reconstruction: pixels, perceptual distance, discriminator (VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tokgen.encoders.base import load_encoder
from tokgen.errors import ConfigError
from tokgen.losses.adversarial import LeCam, adaptive_weight, discriminator_loss, generator_loss
from tokgen.losses.perceptual import build_perceptual
from tokgen.losses.reconstruction import reconstruction_loss
from tokgen.nn.discriminator import PatchGAN
from tokgen.pretrained import read_weights, resolve
from tokgen.quantizers.base import sum_over_ranks, usage_stats
from tokgen.tokenizers.base import TokenizerOutput, VisualTokenizer
from tokgen.tokens import Tokens
from tokgen.training.base import OptimizerCallable, Schedule, TrainingModule, decay_groups


@dataclass(frozen=True)
class AutoencoderLoss:
    """Terms of the loss and their weights. Steps are steps of the generator (the tokenizer).

    Attributes:
        reconstruction: "l1", "l2" or "smooth_l1", on pixels in [0, 1]; times `reconstruction_weight`.
        perceptual: "lpips", "mobilenet" or "none" (see `tokgen.losses.perceptual`); times `perceptual_weight`.
        perceptual_path: weights of its backbone; None looks where they usually are.
        disc_weight: of the adversarial term; 0 leaves the discriminator out altogether.
        disc_start: from this step on the generator's loss has the adversarial term.
        disc_train_from: from this step on the discriminator trains, so that its first word is not noise; None means a
            tenth of `disc_start` before it. Earlier, nothing of it runs.
        disc_loss: "hinge" or "non-saturating"; of the generator too, unless `disc_generator_loss` names another for it.
        disc_channels, disc_layers, disc_norm: of `PatchGAN`.
        lecam_weight: of LeCam regularisation in the discriminator's loss; 0 leaves it out.
        adaptive: scale the adversarial term to the size of the reconstruction's gradient at the decoder's last layer.
        adaptive_max: upper bound of that scale.
    """

    reconstruction: Literal["l1", "l2", "smooth_l1"] = "l2"
    reconstruction_weight: float = 1.0
    perceptual: Literal["lpips", "mobilenet", "none"] = "lpips"
    perceptual_weight: float = 1.0
    perceptual_path: str | None = None
    disc_weight: float = 0.5
    disc_start: int = 20_000
    disc_train_from: int | None = None
    disc_loss: Literal["hinge", "non-saturating"] = "hinge"
    disc_generator_loss: Literal["hinge", "non-saturating"] | None = None
    disc_channels: int = 64
    disc_layers: int = 3
    disc_norm: Literal["batch", "group"] = "batch"
    lecam_weight: float = 0.0
    adaptive: bool = False
    adaptive_max: float = 10_000.0

    def __post_init__(self) -> None:
        if self.disc_train_from is None:
            object.__setattr__(self, "disc_train_from", self.disc_start - self.disc_start // 10)
        if not 0 <= self.disc_train_from <= self.disc_start:
            raise ConfigError(
                f"loss: disc_train_from {self.disc_train_from} must be between 0 and disc_start {self.disc_start}"
            )


class AutoencoderModule(TrainingModule):
    """A tokenizer, its losses, and a discriminator.

    Args:
        tokenizer: what is trained.
        schedule: learning rate over the run; both optimizers follow it.
        loss: terms and weights.
        optimizer: makes the tokenizer's optimizer from parameter groups; norms, biases and codebooks are not decayed.
        disc_optimizer: the discriminator's; None takes AdamW with lr 1e-4, betas (0.9, 0.95) and no weight decay.
        accumulate, clip, max_bad_steps: see `TrainingModule`.
        init_from: folder or Hub name of a published tokenizer of the same configuration to start from.
        init_without: names of the tokenizer's modules that do not start from it, such as [decoder], which may then have another
            size there.
        train_only: names of the tokenizer's modules that are trained, such as [decoder]; all else stays as it is, codebook
            included. None trains everything.
        teacher: encoder (as `load_encoder` takes it) whose features of places (B, N, C) the tokenizer is given as `target`;
            for tokenizers that also learn features. It is no part of the tokenizer. Shards that hold the teacher's
            features (`tokgen features`) save running it.
        channels_last: convolutions in that memory format; what it gains depends on machine and map sizes.
        compile: compile encoder, decoder and discriminator in place.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/psnr", "max")
    ema_modules: ClassVar[tuple[str, ...]] = ("tokenizer",)
    export_name: ClassVar[str] = "tokenizer"
    watched: ClassVar[tuple[str, ...]] = ("reconstruction", "perceptual")  # terms that tell how well it goes

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        loss: AutoencoderLoss = AutoencoderLoss(),
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True),
        disc_optimizer: OptimizerCallable | None = None,
        accumulate: int = 1,
        clip: float | None = 1.0,
        max_bad_steps: int = 20,
        init_from: str | None = None,
        init_without: list[str] | None = None,
        train_only: list[str] | None = None,
        teacher: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(schedule, accumulate, clip, max_bad_steps)
        pictures = tokenizer.modality == "pixels"  # or clips, whose frames are pictures
        if not pictures and (loss.disc_weight > 0 or loss.perceptual != "none"):
            raise ConfigError(
                f"{tokenizer.type_name} does not decode to pictures or clips, which perceptual loss and discriminator look "
                "at; set loss.perceptual none and loss.disc_weight 0"
            )
        self.tokenizer, self.terms = tokenizer, loss
        self.make_optimizer, self.make_disc_optimizer = optimizer, disc_optimizer or _adamw
        self.init_from = init_from
        if init_from is not None:
            self._check_names("init_without", init_without or [])
            read_weights(resolve(init_from), tokenizer, init_without or [])
        elif init_without:
            raise ConfigError(f"init_without {init_without} leaves modules out of init_from, which is not given")
        self.frozen = self._freeze(train_only)
        for module in self.frozen:
            module.eval()  # already here: Lightning trains in the mode that it finds
        self.discriminator: PatchGAN | None = None
        self.lecam: LeCam | None = None
        if loss.disc_weight > 0:
            self.discriminator = PatchGAN(loss.disc_channels, loss.disc_layers, loss.disc_norm)
            self.lecam = LeCam() if loss.lecam_weight > 0 else None
        # a yardstick: not a submodule, so that neither checkpoints, EMA nor DDP carry it
        self.__dict__["perceptual"] = build_perceptual(loss.perceptual, loss.perceptual_path)
        self.__dict__["teacher"] = None if teacher is None else load_encoder(teacher)
        if loss.adaptive and not isinstance(getattr(getattr(tokenizer, "decoder", None), "last_layer", None), Tensor):
            raise ConfigError(
                f"loss.adaptive needs a decoder with `last_layer`, which {type(tokenizer).__name__} lacks"
            )
        channels_last = channels_last and pictures  # a format of maps (B, C, H, W)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            networks = [m for m in (self.tokenizer, self.discriminator, self.perceptual) if m is not None]
            for layer in (layer for network in networks for layer in network.modules()):
                if isinstance(layer, nn.Conv2d):  # those in time have another format
                    layer.to(memory_format=torch.channels_last)
        if compile:
            for module in (
                getattr(tokenizer, "encoder", None),
                getattr(tokenizer, "decoder", None),
                self.discriminator,
            ):
                if module is not None:
                    module.compile()
        self._sums: dict[str, Tensor] = {}
        self._counts: list[Tensor] = []
        self._reported: set[str] = set()  # which of the tokenizer's reports there were

    def _freeze(self, train_only: list[str] | None) -> list[nn.Module]:
        """Freeze all but the named modules. Returns the outermost modules that hold nothing that is trained."""
        if train_only is None:
            return []
        self._check_names("train_only", train_only)
        own = dict(self.tokenizer.named_modules())
        trained = {id(p) for name in train_only for p in own[name].parameters()}
        for p in self.tokenizer.parameters():
            p.requires_grad_(id(p) in trained)
        return [
            module for name, module in self.tokenizer.named_children()
            if not any(chosen == name or chosen.startswith(f"{name}.") for chosen in train_only)
        ]  # fmt: skip

    def _check_names(self, option: str, names: list[str]) -> None:
        own = dict(self.tokenizer.named_modules())
        for name in names:
            if not name or name not in own:
                children = ", ".join(name for name, _ in self.tokenizer.named_children())
                raise ConfigError(f"{option} names {name!r}, which {self.tokenizer.type_name} lacks; it has {children}")

    def train(self, mode: bool = True) -> AutoencoderModule:
        super().train(mode)
        for module in self.frozen:
            module.eval()  # no dropout, and no codebook that follows its vectors
        return self

    def describe(self) -> dict[str, Any]:
        tokenizer = {"type": self.tokenizer.type_name, "config": asdict(self.tokenizer.config)}
        return {**super().describe(), "tokenizer": tokenizer, "loss": asdict(self.terms), "init_from": self.init_from}

    def configure_optimizers(self) -> list[Optimizer]:
        optimizers = [self.make_optimizer(decay_groups(self.tokenizer))]
        if self.discriminator is not None:
            optimizers.append(self.make_disc_optimizer(decay_groups(self.discriminator)))
        return self.adopt(*optimizers)

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and self.discriminator is not None:
            # each backward reaches the parameters of one of the two networks only
            strategy._ddp_kwargs["find_unused_parameters"] = True
        made = self.trainer.datamodule.meta.get("features") if self.teacher is not None else None
        if made is not None and made["fingerprint"] != self.teacher.fingerprint:
            raise ConfigError(
                f"the features in these shards are those of {made['name']} ({made['fingerprint']}), and the teacher is "
                f"{self.teacher.name} ({self.teacher.fingerprint}); make them again with `tokgen features`, or let "
                "model.init_args.teacher name the one that made them"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if str(self.trainer.precision) not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"trainer.precision {self.trainer.precision} is not supported; use 32-true or bf16-mixed")
        self._place_yardsticks()

    def on_validation_start(self) -> None:
        self._place_yardsticks()

    def on_test_start(self) -> None:
        self._place_yardsticks()

    def _place_yardsticks(self) -> None:
        for network in (self.perceptual, self.teacher):
            if network is not None:
                network.to(self.device)

    # -- training -----------------------------------------------------------------------------------------------------

    def pixels(self, batch: dict[str, Any]) -> Tensor:
        """What the tokenizer takes of the batch: pictures (B, 3, H, W) or clips (B, T, 3, H, W), float in [0, 1]; or motion, float
        (B, T, 2, h, w)."""
        pixels = batch[self.tokenizer.modality]
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        return pixels.contiguous(memory_format=self.memory_format) if pixels.ndim == 4 else pixels

    def reconstruct(self, pixels: Tensor, batch: dict[str, Any]) -> TokenizerOutput:
        """The tokenizer's forward, with what else it takes of the batch, and the teacher's features of the same pixels if there is
        one."""
        extras = {name: batch[name] for name in self.tokenizer.extras if name in batch}
        if self.teacher is None:
            return self.tokenizer(pixels, **extras)
        target = batch.get("features")
        with torch.no_grad():
            target = self.teacher.features(pixels) if target is None else target.float()
        return self.tokenizer(pixels, target=target, **extras)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        optimizers = self.optimizers()
        generator, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        disc_trains = self.discriminator is not None and self.disc_takes_part(self.terms.disc_train_from)
        disc_speaks = self.discriminator is not None and self.disc_takes_part(self.terms.disc_start)
        stateful = [m for m in (self.tokenizer, self.discriminator, self.lecam) if m is not None]
        completes = self.begin(stateful, others)
        logs = completes and self.should_log
        pixels = self.pixels(batch)
        metrics: dict[str, Any] = {}

        with generator.toggle_model(sync_grad=completes):
            output, terms, surrogate = self.generator_terms(pixels, batch, disc_speaks)
            self.manual_backward(surrogate / self.accumulate)
        good = True
        if completes:
            watched = {name: terms[name] for name in self.watched if name in terms}
            good, norm = self.update(generator, 0, terms.values(), stateful, watched)
            metrics["grad_norm"] = norm

        if disc_trains and good:
            (disc,) = others
            with disc.toggle_model(sync_grad=completes):
                disc_terms = self.discriminator_step(pixels, output.reconstruction.detach())
            terms |= disc_terms
            if completes:
                changed = [m for m in (self.discriminator, self.lecam) if m is not None]
                watched = discriminator_signals(disc_terms)
                _, metrics["disc_grad_norm"] = self.update(disc, 1, disc_terms.values(), changed, watched)
        elif disc_trains and completes:
            others[0].zero_grad()  # of the step's earlier batches

        rate = self.rate(len(pixels))
        if logs:
            metrics |= {"lr": self.learning_rate(), "skipped_steps": self._skipped}
            if rate is not None:
                metrics["samples_per_second"] = rate
        self.finish(completes and good)
        if logs:
            self.record_training({**terms, **output.stats, **metrics}, bar=["train/reconstruction", "train/usage"])
        return {"tokens": output.tokens}

    def disc_takes_part(self, start: int) -> bool:
        """Whether the current step is one that the discriminator has a part in, from `start` on."""
        return self.step >= start

    def generator_terms(
        self, pixels: Tensor, batch: dict[str, Any], disc_speaks: bool
    ) -> tuple[TokenizerOutput, dict[str, Tensor], Tensor]:
        """Forward of the tokenizer: its output, the detached terms of the loss by name, and a scalar with the loss's gradient.

        Losses on the picture are differentiated with respect to the picture once, each by itself; their weighted sum
        goes back through the decoder with the scalar (whose value means nothing). The adaptive weight then costs one more
        gradient of the last layer, and neither the perceptual network nor the discriminator is passed twice.
        """
        weights = self.terms
        output = self.reconstruct(pixels, batch)
        picture = output.reconstruction.detach().float().requires_grad_()  # (B, 3, H, W), or (B, T, 3, H, W) of clips
        terms: dict[str, Tensor] = {}

        terms["reconstruction"] = reconstruction_loss(picture, pixels, weights.reconstruction)
        of_picture = weights.reconstruction_weight * terms["reconstruction"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(frames(picture), frames(pixels))
            of_picture = of_picture + weights.perceptual_weight * terms["perceptual"]
        (gradient,) = torch.autograd.grad(of_picture, picture)
        if disc_speaks:
            kind = weights.disc_generator_loss or weights.disc_loss
            terms["adversarial"] = generator_loss(self.discriminator(frames(picture) * 2 - 1), kind)
            (adversarial,) = torch.autograd.grad(terms["adversarial"], picture)
            weight = torch.full_like(terms["adversarial"], weights.disc_weight)
            if weights.adaptive:
                terms["adaptive_weight"] = self.balance(output.reconstruction, gradient, adversarial)
                weight = weight * terms["adaptive_weight"]
            gradient = gradient + weight * adversarial

        surrogate = (output.reconstruction.float() * gradient).sum()
        for name, value in output.losses.items():
            terms[name] = value
            surrogate = surrogate + value
        return output, {k: v.detach() for k, v in terms.items()}, surrogate

    def balance(self, reconstruction: Tensor, of_reconstruction: Tensor, of_adversarial: Tensor) -> Tensor:
        """The adaptive weight, from gradients (B, 3, H, W) of the two losses at the picture."""
        layer = self.tokenizer.decoder.last_layer
        gradients = [
            torch.autograd.grad(reconstruction, layer, g.to(reconstruction.dtype), retain_graph=True)[0]
            for g in (of_reconstruction, of_adversarial)
        ]
        both = sum_over_ranks(torch.stack(gradients).float()) / self.trainer.world_size
        return adaptive_weight(both[0], both[1], self.terms.adaptive_max)

    def discriminator_step(self, pixels: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Forward and backward of the discriminator. Returns its detached terms and mean logits, by name."""
        real = self.discriminator(frames(pixels) * 2 - 1)  # (B, 1, h, w)
        fake = self.discriminator(frames(reconstruction).float() * 2 - 1)
        terms = {"disc": discriminator_loss(real, fake, self.terms.disc_loss)}
        loss = terms["disc"]
        if self.lecam is not None:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + self.terms.lecam_weight * terms["lecam"]
        self.manual_backward(loss / self.accumulate)
        terms |= {"logits_real": real.float().mean(), "logits_fake": fake.float().mean()}
        return {k: v.detach() for k, v in terms.items()}

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        zero = lambda: torch.zeros((), dtype=torch.float64, device=self.device)  # noqa: E731
        self._sums = {k: zero() for k in ("images", "psnr", "mse", "l1", "perceptual", *self.tokenizer.reports)}
        self._counts = [torch.zeros(k, dtype=torch.int64, device=self.device) for k in self.tokenizer.codebook_sizes]
        self._reported = set()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        pixels = self.pixels(batch)
        valid = batch.get("valid")
        valid = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device) if valid is None else valid.bool()
        output = self.reconstruct(pixels, batch)
        reconstruction = self.tokenizer.finish(output.reconstruction)
        error = (reconstruction - pixels).flatten(1)
        mse = error.square().mean(1)
        # the peak is 1, in motion too, whose unit it is; capped at 100 dB, where a picture is exact
        psnr = -10 * mse.clamp(min=1e-10).log10()
        sums = {"images": torch.ones_like(psnr), "psnr": psnr, "mse": mse, "l1": error.abs().mean(1)}
        if self.perceptual is not None:
            each = self.perceptual.per_image(frames(reconstruction), frames(pixels))
            sums["perceptual"] = each.view(len(pixels), -1).mean(1)
        sums |= {name: output.stats[name] for name in self.tokenizer.reports if name in output.stats}  # each (B,)
        self._reported |= sums.keys()
        for name, value in sums.items():
            self._sums[name] += value[valid].double().sum()
        ids = output.tokens.ids[valid]  # (b, N) or (b, N, C)
        ids = ids[output.tokens.mask[valid]].reshape(-1, len(self._counts))
        for c, counts in enumerate(self._counts):
            counts += torch.bincount(ids[:, c], minlength=len(counts))
        return {"reconstruction": reconstruction, "tokens": output.tokens}

    def on_validation_epoch_end(self) -> None:
        self.report(self.validation_metrics(), bar=["val/psnr", "val/usage"])

    def validation_metrics(self) -> dict[str, Tensor]:
        """What the validation that ends has measured, over all ranks."""
        totals = sum_over_ranks(torch.stack(list(self._sums.values())))
        sums = dict(zip(self._sums, totals))
        images = sums.pop("images").clamp(min=1)
        left_out = ("perceptual",) if self.perceptual is None else ()
        left_out += tuple(name for name in self.tokenizer.reports if name not in self._reported)
        metrics = {f"val/{k}": v / images for k, v in sums.items() if k not in left_out}
        stats = [usage_stats(sum_over_ranks(c)) for c in self._counts]  # over the whole set
        for name in stats[0]:
            metrics[f"val/{name}"] = torch.stack([s[name] for s in stats]).mean()
        return metrics

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.validation_step(batch, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tokens:
        """Tokens of the batch's valid pictures."""
        extras = {name: batch[name] for name in self.tokenizer.extras if name in batch}
        tokens = self.tokenizer.encode(batch[self.tokenizer.modality], **extras)
        return tokens if batch.get("valid") is None else tokens[batch["valid"].bool()]

    def export(self, folder: Path, write: bool) -> None:
        if write:
            self.tokenizer.save_pretrained(folder)


def discriminator_signals(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """What tells whether a discriminator explodes: its loss, and the size of its mean logits, of the two the larger.

    Both are near zero in health at times, and rise again. A discriminator that knows nothing has a loss of about 1, and
    one that is sure has logits of about 3: they are given in these units, and less counts as 1.
    """
    logits = torch.maximum(terms["logits_real"].abs(), terms["logits_fake"].abs())
    return {"disc": terms["disc"].clamp(min=1.0), "logits": (logits / 3).clamp(min=1.0)}


def frames(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as they are; of clips (B, T, 3, H, W) all frames, (B T, 3, H, W)."""
    return pixels.flatten(0, 1) if pixels.ndim == 5 else pixels


def _adamw(parameters: Iterable[Any]) -> Optimizer:
    return AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
