"""A MeanFlow step (average velocity, JVP target) with its adaptive weight replaced by the robust loss."""

import torch
from torch import Tensor, nn

from robustcm import MeasuredC, RobustLoss, flow_time  # robustcm


class AverageVelocity(nn.Module):
    """u(z, t, r): the mean velocity between the times r and t <= 1 = noise."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u: Tensor = self.layers(torch.cat([z, t[:, None], (t - r)[:, None]], 1))
        return u


def two_times(b: int, equal: float = 0.75) -> tuple[Tensor, Tensor]:
    """t >= r, logit-normal; the same for a share ``equal`` of the samples (flow matching)."""
    pair = torch.sigmoid(torch.randn(2, b) - 0.4)
    t, r = pair.amax(0), pair.amin(0)
    return t, torch.where(torch.rand(b) < equal, t, r)


def main(steps: int = 200, seed: int = 0) -> list[float]:
    """The mean squared norm of the error, of each step."""
    torch.manual_seed(seed)
    model = AverageVelocity()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    robust = RobustLoss(axis=flow_time, c=MeasuredC(bins=4))  # robustcm
    errors = []
    for step in range(steps):
        angle = torch.randint(8, (256,)) * torch.pi / 4
        x = 0.7 * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(256, 2)
        e = torch.randn_like(x)
        t, r = two_times(len(x))
        z, v = (1 - t[:, None]) * x + t[:, None] * e, e - x
        u, du_dt = torch.func.jvp(model, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
        target = (v - (t - r)[:, None] * du_dt).detach()
        # These two lines have the gradient of the Cauchy distance at c = sqrt(0.01 / 2), fixed by hand, and a value
        # near 1 whatever happens. Any p and eps are a distance and a c: of_adaptive_weight(p, eps) of robustcm.losses.
        # was: r2 = (u - target).square().sum(1)
        # was: loss = (r2 / (r2 + 0.01).detach() ** 1.0).mean()
        loss = robust(u, target, t).mean()  # robustcm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((u - target).detach().square().sum(1).mean().item())
        if step % 40 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  squared error {errors[-1]:.4f}")
    return errors


if __name__ == "__main__":
    main()
