"""Latent consistency distillation: a frozen teacher's guided DDIM step, an EMA target, the Huber line replaced."""

import copy

import torch
from torch import Tensor, nn

from robustcm import MeasuredC, RobustLoss, TimestepIndex  # robustcm

NUM_CLASSES, NULL = 8, 8  # and one label for "no condition"
ALPHAS_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
DDIM_TIMESTEPS = torch.arange(19, 1000, 20)


class Epsilon(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.classes = nn.Embedding(NUM_CLASSES + 1, width)
        self.into = nn.Linear(3, width)
        self.out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        h = self.into(torch.cat([x_t, t[:, None] / 500 - 1], 1)) + self.classes(labels)
        epsilon: Tensor = self.out(nn.functional.silu(h))
        return epsilon


def coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
    return ALPHAS_BAR[t].sqrt()[:, None], (1 - ALPHAS_BAR[t]).sqrt()[:, None]


def ddim_step(x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = coefficients(t)
    return alpha * x0 + sigma * epsilon


def consistency(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    alpha, sigma = coefficients(t)
    x0 = (x_t - sigma * network(x_t, t, labels)) / alpha
    scaled = 10 * t[:, None]
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return c_skip * x_t + c_out * x0


def latents(n: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(NUM_CLASSES, (n,))
    angle = labels * 2 * torch.pi / NUM_CLASSES
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2), labels


def pretrained_teacher(steps: int) -> nn.Module:
    teacher = Epsilon()
    optimizer = torch.optim.Adam(teacher.parameters(), 5e-3)
    for _ in range(steps):
        x, labels = latents(256)
        labels = torch.where(torch.rand(len(x)) < 0.1, NULL, labels)
        t, e = torch.randint(1000, (len(x),)), torch.randn_like(x)
        loss = nn.functional.mse_loss(teacher(ddim_step(x, e, t), t, labels), e)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.requires_grad_(False)


def main(steps: int = 200, seed: int = 0) -> list[float]:
    """The mean squared difference of student and target, of each step."""
    torch.manual_seed(seed)
    teacher = pretrained_teacher(200)
    student, ema = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    robust = RobustLoss(axis=TimestepIndex(1000), c=MeasuredC(bins=4))  # robustcm
    errors = []
    for step in range(steps):
        x, labels = latents(256)
        i = torch.randint(1, len(DDIM_TIMESTEPS), (len(x),))
        start, end = DDIM_TIMESTEPS[i], DDIM_TIMESTEPS[i - 1]
        w = 1 + 2 * torch.rand(len(x), 1)  # guidance
        x_t = ddim_step(x, torch.randn_like(x), start)
        predicted = consistency(student, x_t, start, labels)
        with torch.no_grad():
            conditional, unconditional = (teacher(x_t, start, y) for y in (labels, torch.full_like(labels, NULL)))
            epsilon = unconditional + w * (conditional - unconditional)
            alpha, sigma = coefficients(start)
            x_prev = ddim_step((x_t - sigma * epsilon) / alpha, epsilon, end)
            target = consistency(ema, x_prev, end, labels)
        # was: loss = torch.mean(torch.sqrt((predicted - target) ** 2 + 0.001**2) - 0.001)
        loss = robust(predicted, target, start).mean()  # robustcm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p, q in zip(ema.parameters(), student.parameters(), strict=True):
            p.lerp_(q.detach(), 0.05)
        errors.append(torch.mean((predicted - target).detach() ** 2).item())
        if step % 40 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  mse {errors[-1]:.5f}")
    return errors


if __name__ == "__main__":
    main()
