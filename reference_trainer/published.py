"""The data sets of Dao et al. 2025 as presets: data, network and budget, every constant with its source.

What is trained on them, a recipe of presets.py, goes on top. Images are 256 px; latents are those of Stable Diffusion's
VAE (``stabilityai/sd-vae-ft-ema``), 4 x 32 x 32, normalised per channel to mean 0 and std 0.5 as all latents here.

Sources, by the names used below:

    paper     Dao et al., arXiv 2502.01441, table 1: epochs and batch of CelebA-HQ, FFHQ and LSUN Church.
    code      its authors' code, github.com/quandao10/LCT: scripts/train_lct.sh, train_cm_latent.py, datasets_prep,
              models/network_karras.py; for ImageNet their script of train_cm_latent_repa.py, DiT-B/2.
    readme    that of github.com/quandao10/sLCT: ImageNet, 560 epochs. The paper has no ImageNet.
    EDM       Karras et al. 2022, arXiv 2206.00364: DhariwalUNet, their version of the U-Net of ADM (arXiv 2105.05233).
    DiT       Peebles and Xie 2023, arXiv 2212.09748, table 1.

Not from them: ``clip`` (of our recipe; the others take it away), ``save_every``, and that a NaN stops the run. At which
level a second evaluation stands, the authors pick by FID; here it is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from reference_trainer.config import ConstantLR, TrainConfig
from reference_trainer.data.classes import ByClass
from reference_trainer.data.stored import LatentStore
from reference_trainer.networks import DiT, UNet
from reference_trainer.optimizers import RAdam
from robustcm.fences import TukeyClip
from robustcm.schedules import DoublingCurriculum, LevelGrid

ADM = UNet(
    block_out_channels=(128, 256, 384, 512),  # code: 128 channels, times 1, 2, 3, 4
    layers_per_block=4,  # code
    attention=(False, True, True, False),  # code: at 16 and 8 of 32, 16, 8, 4; and, as in EDM, once at the smallest
    norm_num_groups=32,  # EDM
    attention_head_dim=64,  # EDM
    resnet_time_scale_shift="scale_shift",  # EDM, ADM
    resampling="resnet",  # EDM, ADM
    dropout=0.0,  # code
)
"""The U-Net of the paper: 151,325,956 parameters for 4 x 32 x 32, EDM's DhariwalUNet to the last one.

The paper states no count. Differences from the authors': their last norm is a LayerNorm over the whole map (261,888
parameters more); EDM starts the last convolution of each block at zero, diffusers does not.
"""

DIT_S2 = DiT(width=384, layers=12, heads=6, patch=2)
"""DiT-S/2: 22,449,808 parameters; published 33 M, see ``DIT_L2``."""
DIT_B2 = DiT(width=768, layers=12, heads=12, patch=2)
"""DiT-B/2: 89,431,312 parameters; published 130 M, see ``DIT_L2``."""
DIT_L2 = DiT(width=1024, layers=24, heads=16, patch=2)
"""DiT-L/2: 310,004,752 parameters; published 458 M.

Width, layers, heads and patch are DiT's. The count is less since the time modulation is computed once for all blocks
(adaLN-single, PixArt-alpha, arXiv 2310.00426), not by each from its own 6 width^2 weights; and the published networks
have labels and twice the output channels, for a variance.
"""
NETWORKS = {"ADM": ADM, "DIT_S2": DIT_S2, "DIT_B2": DIT_B2, "DIT_L2": DIT_L2}
"""By the names that ``network=`` takes."""


def steps_of(epochs: int, entries: int, batch_size: int) -> int:
    """Training steps of so many passes over so many ``entries``; as in the code, a last batch cut short is left out."""
    return epochs * max(1, entries // batch_size)


def celebahq(images: int = 27_000) -> TrainConfig:
    """CelebA-HQ: ADM U-Net, 151 M; batch 128, lr 1e-4, EMA 0.9999, 1400 epochs = 294,000 steps.

    Args:
        images: trained on; the default is that of the code.
    """
    return _unconditional(epochs=1400, entries=images, batch_size=128)  # paper, both


def ffhq(images: int = 70_000) -> TrainConfig:
    """FFHQ: ADM U-Net, 151 M; batch 128, lr 1e-4, EMA 0.9999, 1400 epochs = 764,400 steps.

    Args:
        images: trained on; the default is that of the code.
    """
    return _unconditional(epochs=1400, entries=images, batch_size=128)  # paper, both; a script has 2 x 128


def lsun_church(images: int = 120_000) -> TrainConfig:
    """LSUN Church: ADM U-Net, 151 M; batch 256, lr 1e-4, EMA 0.9999, 1800 epochs = 1,686,600 steps.

    With the mirrored images as entries of their own, so that an epoch passes over twice the images.

    Args:
        images: trained on, not mirrored ones; the default is that of the code.
    """
    config = _unconditional(epochs=1800, entries=2 * images, batch_size=256)  # paper, both; a script has 1750, 8 x 192
    return replace(config, data=LatentStore(path="", flips=True))  # code: latent_church256_flip, 240,000 entries


def imagenet(images: int = 1_281_167) -> TrainConfig:
    """ImageNet by class: DiT-B/2, 89 M; batch 2048, lr 1e-4, EMA 0.9999, 560 epochs = 350,000 steps.

    Not the network of the authors' figure: the readme does not say which that is, and their scripts add a
    representation loss, rotary positions, RMS norms and a filter of frequencies.

    Args:
        images: trained on; the default is that of the code.
    """
    return replace(
        _with(s0=8, s1=512, epochs=560, entries=images, batch_size=2048),  # readme: the epochs; code: the others
        classes=ByClass(dropout=0.1),  # DiT, section 4; the store's, 1000
        network=DIT_B2,  # code; of the three the one with a published figure, of CelebA-HQ: 5.7 (readme)
        optimizer=RAdam(weight_decay=1e-4, eps=1e-4, max_norm=100.0),  # code, as of the DiT runs
    )


DATA_SETS: tuple[Callable[[int], TrainConfig], ...] = (celebahq, ffhq, lsun_church, imagenet)
"""Each trains on a store of latents, which ``--data`` names."""


def _unconditional(*, epochs: int, entries: int, batch_size: int) -> TrainConfig:
    return _with(s0=10, s1=640, epochs=epochs, entries=entries, batch_size=batch_size)  # code; iCT has s1 = 1280


def _with(*, s0: int, s1: int, epochs: int, entries: int, batch_size: int) -> TrainConfig:
    ours = TrainConfig()
    levels = LevelGrid(curriculum=DoublingCurriculum(s0=s0, s1=s1))
    return TrainConfig(
        data=LatentStore(path=""),
        clip=TukeyClip(k=3.0),  # as ours has it on every folder and store
        network=ADM,
        objective=replace(ours.objective, levels=levels),
        optimizer=RAdam(weight_decay=1e-4, max_norm=100.0),  # code
        learning_rate=ConstantLR(lr=1e-4),  # code: without warm-up or decay
        ema_decay=0.9999,  # code; it evaluates others from 0.999 to 0.99997, too
        batch_size=batch_size,
        steps=steps_of(epochs, entries, batch_size),
        log_every=100,  # code
        save_every=5000,  # a checkpoint of the U-Net has 2.4 GB
    )
