"""A diffusers UNet under Accelerate, gradients accumulated over two batches: the loss line replaced."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler

from robustcm import MeasuredC, RobustLoss, TimestepIndex, all_ranks  # robustcm


def latents(n: int) -> torch.Tensor:
    """``[n, 4, 8, 8]``: smooth, one in a hundred far out."""
    smooth = F.interpolate(torch.randn(n, 4, 2, 2), size=(8, 8), mode="bilinear")
    return smooth * torch.where(torch.rand(n, 1, 1, 1) < 0.01, 10, 1)


def main(steps: int = 40, seed: int = 0) -> list[float]:
    """The mean squared error of each micro-batch; ``steps`` of the optimizer."""
    torch.manual_seed(seed)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    lr_scheduler = get_scheduler("constant_with_warmup", optimizer=optimizer, num_warmup_steps=5)
    dataloader = torch.utils.data.DataLoader(latents(640), batch_size=16, shuffle=True, drop_last=True)
    unet, optimizer, dataloader, lr_scheduler = accelerator.prepare(unet, optimizer, dataloader, lr_scheduler)
    robust = RobustLoss(axis=TimestepIndex(1000), c=MeasuredC(bins=4), group=all_ranks)  # robustcm
    accelerator.register_for_checkpointing(robust.to(accelerator.device))  # robustcm

    errors: list[float] = []
    while len(errors) < 2 * steps:
        for clean in dataloader:
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(unet):
                predicted = unet(noisy, timesteps).sample
                # was: loss = F.mse_loss(predicted.float(), noise.float())
                loss = robust(predicted, noise, timesteps, closes=accelerator.sync_gradients).mean()  # robustcm
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            errors.append(F.mse_loss(predicted.detach(), noise).item())
            if len(errors) % 16 == 0:
                print(f"batch {len(errors):3d}  loss {loss.item():.3f}  mse {errors[-1]:.3f}")
            if len(errors) == 2 * steps:
                break
    return errors


if __name__ == "__main__":
    main()
