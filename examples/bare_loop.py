"""Consistency training in a bare loop: the robust loss and the gated coupling used directly, without Objective."""

import torch
from torch import Tensor, nn

from robustcm import RobustLoss, coupled_noise  # robustcm

LOW, HIGH, DATA = 0.002, 80.0, 0.5  # noise levels, spread of the data
ANGLES = torch.arange(8) * torch.pi / 4
MODES = 0.7 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def f(network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    t = t[:, None]
    c_skip, c_in = DATA**2 / ((t - LOW) ** 2 + DATA**2), (t**2 + DATA**2) ** -0.5
    return c_skip * x_t + DATA * (t - LOW) * c_in * network(torch.cat([c_in * x_t, t.log() / 4], 1))


def main(steps: int = 300, seed: int = 0) -> list[float]:
    """How far one-step samples are from the nearest mode, after each step."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(network.parameters(), 4e-4)
    robust = RobustLoss()  # robustcm
    errors = []
    for step in range(steps):
        num_levels = 11 if step < steps // 2 else 21
        levels = torch.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), num_levels) ** 7
        likely = torch.exp(-((levels[:-1].log() + 1.1) ** 2) / 8)  # lognormal
        i = torch.multinomial(likely, 128, replacement=True)
        t_hi, t_lo = levels[i], levels[i + 1]
        x = MODES[torch.randint(8, (128,))] + 0.03 * torch.randn(128, 2)
        z = torch.randn_like(x)
        z = coupled_noise(x, z, t_hi)  # robustcm
        student = f(network, x + t_hi[:, None] * z, t_hi)
        teacher = f(network, x + t_lo[:, None] * z, t_lo).detach()
        # was: loss = ((student - teacher).square().mean(1) / (t_hi - t_lo)).mean()
        loss = robust(student, teacher, num_levels=num_levels, weight=1 / (t_hi - t_lo)).mean()  # robustcm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        samples = f(network, HIGH * torch.randn(256, 2), torch.full((256,), HIGH)).detach()
        errors.append(torch.cdist(samples, MODES).amin(1).mean().item())
        if step % 60 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  distance of samples from the modes {errors[-1]:.3f}")
    return errors


if __name__ == "__main__":
    main()
