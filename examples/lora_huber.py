"""Fine-tuning with LoRA layers, the Huber loss with its c scheduled by SNR (as sd-scripts has it) replaced."""

import torch
from torch import Tensor, nn

from robustcm import MeasuredC, RobustLoss, TimestepIndex, pseudo_huber  # robustcm

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS_BAR = torch.cumprod(1 - BETAS, 0)


class LoRA(nn.Module):
    """A frozen linear layer and a correction of rank ``rank``, zero at first."""

    def __init__(self, frozen: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x) + self.up(self.down(x))
        return out


def epsilon(network: nn.Module, noisy: Tensor, t: Tensor) -> Tensor:
    """Of latents ``[b, 4, 8, 8]``, pixel by pixel: the network sees it, the mean of all, and the time."""
    pixels = noisy.flatten(2).mT  # [b, 64, 4]
    mean, time = pixels.mean(1, keepdim=True), t.reshape(-1, 1, 1) / 500 - 1
    output = network(torch.cat([pixels, mean.expand_as(pixels), time.expand(-1, 64, 1)], 2))
    return output.mT.reshape(noisy.shape)


def latents(n: int, style: float) -> Tensor:
    """``[n, 4, 8, 8]``: flat patches around ``style``, one in a hundred far out."""
    flat = (style + 0.2 * torch.randn(n, 4, 1, 1)).expand(-1, -1, 8, 8)
    return flat * torch.where(torch.rand(n, 1, 1, 1) < 0.01, 10, 1)


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    alpha_bar = ALPHAS_BAR[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise


def pretrained(steps: int) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        x, t = latents(64, style=-1.0), torch.randint(1000, (64,))
        noise = torch.randn_like(x)
        loss = nn.functional.mse_loss(epsilon(network, noised(x, noise, t), t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def main(steps: int = 150, seed: int = 0) -> list[float]:
    """The median over the batch of a latent's mean squared error, for each step of fine-tuning."""
    torch.manual_seed(seed)
    network = nn.Sequential(*(LoRA(m) if isinstance(m, nn.Linear) else m for m in pretrained(200)))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 3e-3)
    robust = RobustLoss(pseudo_huber, axis=TimestepIndex(1000), c=MeasuredC(bins=8))  # robustcm
    errors = []
    for step in range(steps):
        x, t = latents(16, style=1.0), torch.randint(1000, (16,))
        noise = torch.randn_like(x)
        predicted = epsilon(network, noised(x, noise, t), t)
        snr = ALPHAS_BAR[t] / (1 - ALPHAS_BAR[t])
        weight = torch.clamp(5 / snr, max=1)  # min-SNR
        # was: c = ((1 - 0.1) / (1 + snr**-0.5) ** 2 + 0.1).reshape(-1, 1, 1, 1)
        # was: elementwise = 2 * c * (((predicted - noise) ** 2 + c**2).sqrt() - c)
        # was: loss = (elementwise.mean((1, 2, 3)) * weight).mean()
        loss = robust(predicted, noise, t, weight=weight).mean()  # robustcm
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        errors.append((predicted - noise).detach().square().mean((1, 2, 3)).median().item())
        if step % 30 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  squared error {errors[-1]:.3f}")
    return errors


if __name__ == "__main__":
    main()
