"""Flow matching as torchcfm has it (x0 noise, x1 data, t = 1 at the data), with our coupling and robust loss."""

import torch
from torch import Tensor, nn

from robustcm import Above, MeasuredC, RobustLoss, coupled_noise, data_time, of_data_time  # robustcm


class Velocity(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SELU(), nn.Linear(width, width), nn.SELU(), nn.Linear(width, 2)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        velocity: Tensor = self.layers(torch.cat([x, t[:, None]], 1))
        return velocity


ANGLES = torch.arange(8) * torch.pi / 4
MODES = 0.7 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


@torch.no_grad()
def generate(model: nn.Module, n: int, steps: int = 10) -> Tensor:
    x = torch.randn(n, 2)
    for i in range(steps):
        x = x + model(torch.full((n,), i / steps), x) / steps
    return x


def main(steps: int = 300, seed: int = 0) -> list[float]:
    """How far samples of ten Euler steps are from the nearest mode, after each step."""
    torch.manual_seed(seed)
    model = Velocity()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    # The axis: depth is 0 at pure noise and 1 at the data, which is what t is here.
    robust = RobustLoss(axis=data_time, c=MeasuredC(bins=4))  # robustcm
    errors = []
    for step in range(steps):
        x1 = MODES[torch.randint(8, (256,))] + 0.03 * torch.randn(256, 2)
        x0 = torch.randn_like(x1)
        t = torch.rand(len(x1))
        # In the place of x0, x1 = ot_sampler.sample_plan(x0, x1); x1 stays as it is, and so do its labels.
        x0 = coupled_noise(x1, x0, t, gate=of_data_time(Above(1.0)))  # robustcm
        xt = (1 - t[:, None]) * x0 + t[:, None] * x1
        ut = x1 - x0
        vt = model(t, xt)
        # was: loss = torch.mean((vt - ut) ** 2)
        loss = robust(vt, ut, t).mean()  # robustcm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(torch.cdist(generate(model, 128), MODES).amin(1).mean().item())
        if step % 60 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  distance of samples from the modes {errors[-1]:.3f}")
    return errors


if __name__ == "__main__":
    main()
