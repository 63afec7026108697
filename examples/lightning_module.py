"""A LightningModule (EDM's denoiser on 4x8x8 latents): the loss is a submodule, so checkpoints carry its scale."""

import logging
import warnings

import lightning
import torch
from torch import Tensor, nn

from robustcm import LikeSquares, MeasuredC, NoiseRange, RobustLoss, all_ranks, cauchy_of_r2  # robustcm

SIGMA_DATA = 0.5


class Denoising(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(5, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 4, 1)
        )
        depth, squares = NoiseRange().depth, LikeSquares(cauchy_of_r2)  # robustcm
        self.robust = RobustLoss(squares, axis=depth, c=MeasuredC(bins=4), group=all_ranks)  # robustcm
        self.errors: list[float] = []

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """``D(x_t, sigma)``, with sigma as a fifth channel."""
        s = sigma[:, None, None, None]
        scale = (s**2 + SIGMA_DATA**2).sqrt()
        known = torch.cat([x_t / scale, (s.log() / 4).expand(-1, 1, *x_t.shape[2:])], 1)
        denoised: Tensor = (SIGMA_DATA / scale) ** 2 * x_t + s * SIGMA_DATA / scale * self.network(known)
        return denoised

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        sigma = torch.exp(1.2 * torch.randn(len(x), device=x.device) - 1.2)
        denoised = self(x + sigma[:, None, None, None] * torch.randn_like(x), sigma)
        weight = 1 / sigma**2 + 1 / SIGMA_DATA**2
        # was: loss = (weight * (denoised - x).square().mean((1, 2, 3))).mean()
        loss = self.robust(denoised, x, sigma, weight=weight).mean()  # robustcm
        self.errors.append((weight * (denoised - x).detach().square().mean((1, 2, 3))).mean().item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 5e-3)


def latents(n: int) -> Tensor:
    """``[n, 4, 8, 8]``: flat patches, std one half."""
    return 0.5 * torch.randn(n, 4, 1, 1).expand(-1, -1, 8, 8)


def trainer(steps: int) -> lightning.Trainer:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(steps: int = 100, seed: int = 0) -> list[float]:
    """The weighted squared error of each step."""
    lightning.seed_everything(seed, verbose=False)
    module = Denoising()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(latents(1024)), batch_size=32, shuffle=True)
    trainer(steps).fit(module, data)
    for step in range(0, steps, 20):
        print(f"step {step:3d}  weighted squared error {module.errors[step]:.3f}")
    return module.errors


if __name__ == "__main__":
    main()
