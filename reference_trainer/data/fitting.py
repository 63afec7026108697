"""How the small autoencoder is fitted: in so many steps, or until its PSNR on images held out no longer rises.

The rule: every ``CHECK_EVERY`` steps the PSNR of the held-out images is measured. Where it has not risen by ``RISE``
dB in ``PATIENCE`` steps, the learning rate falls to a third; when that is to happen for the fourth time, or at the cap,
the fit is at its end. Its weights are those of the best check. Towards the cap the learning rate falls to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.images import ImageSet, psnr_of_each, to_pixels, to_unit
from reference_trainer.data.latents import spread
from robustcm.randomness import step_generator

CHECK_EVERY = 100
"""Steps between two looks at the held-out images."""
RISE = 0.1
"""dB."""
PATIENCE = 500
"""Steps without such a rise."""
FALLS = 3
"""Of the learning rate, before a fit is at its end."""
WARM_UP = 50
"""Steps."""
COOLING = 0.2
"""Share of the cap, over the last of which the learning rate falls to 0."""
HELD_OUT_SHARE = 0.05
"""Of the training images, evenly over them: not fitted on where the data set has no held-out images."""
MOST_JUDGED = 256
"""Images a PSNR is measured on, evenly over those there are."""


@dataclass(frozen=True)
class Fit:
    """How a fit went."""

    steps: int
    psnr_train: float
    """dB, mean over images of the PSNR of each; see ``psnr_of_each``."""
    psnr_held_out: float | None
    """None: nothing was held out."""
    stopped: str
    """Why it stopped, in words."""

    def in_words(self) -> str:
        """One line."""
        held_out = "" if self.psnr_held_out is None else f"{self.psnr_held_out:.2f} dB held out, "
        return f"{held_out}{self.psnr_train:.2f} dB on what it was fitted to; {self.steps} steps: {self.stopped}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fitted_and_judged(images: ImageSet) -> tuple[Tensor, Tensor]:
    """The images to fit on and those to measure the PSNR on, uint8 ``[n, ch, h, w]`` both; the second may be empty.

    The second are the data set's held-out images, or, where it has none, a share of its training images.
    """
    train, held_out = images.train, images.held_out
    if len(held_out):
        return train, spread(held_out, MOST_JUDGED)
    every = round(1 / HELD_OUT_SHARE)
    kept = torch.arange(len(train)) % every == every - 1
    return train[~kept], spread(train[kept], MOST_JUDGED)


class Course:
    """The learning rate of a fit without a number of steps, as a share of its peak; knows when it is at its end."""

    def __init__(self, most_steps: int) -> None:
        self._cap, self._falls = most_steps, 0
        self._mark, self._since = -math.inf, 0
        self.end = most_steps
        self.stopped = f"the cap of {most_steps} steps (autoencoder.most_steps)"

    def __call__(self, step: int) -> float:
        """At ``step``: warm-up, the peak or a third of it or a ninth, the way to the cap."""
        warm, cool = (step + 1) / WARM_UP, (self._cap - step) / max(1.0, COOLING * self._cap)
        return min(1.0, warm) * min(1.0, cool) / 3**self._falls

    def check(self, step: int, psnr: float) -> None:
        """Note the held-out PSNR behind ``step`` steps, at most ``end``."""
        if psnr >= self._mark + RISE:
            self._mark, self._since = psnr, step
        elif step - self._since >= PATIENCE:
            if self._falls == FALLS:
                self.end = step
                self.stopped = f"held-out PSNR no longer rose by {RISE:g} dB in {PATIENCE} steps"
            self._falls, self._since = min(FALLS, self._falls + 1), step


def fit(
    network: Any,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    reconstruct: Callable[[Tensor], Tensor],
    images: ImageSet,
    device: torch.device,
    *,
    steps: int | None,
    most_steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Fit:
    """Fit ``network`` in place, under a progress bar with the loss and the PSNR.

    Args:
        loss_of: (images ``[b, ch, h, w]`` in -1 .. 1, a generator for what it draws) -> what to minimise.
        reconstruct: images ``[n, ch, h, w]`` in -1 .. 1, there and back.
        steps: so many, in one cycle of the learning rate; None: by the rule above, up to ``most_steps``.
    """
    pixels, judged = (images.train, spread(images.held_out, MOST_JUDGED)) if steps else fitted_and_judged(images)

    def psnr(of: Tensor) -> float | None:
        if not len(of):
            return None
        with torch.no_grad():
            there = torch.cat([reconstruct(to_unit(part).to(device)).cpu() for part in of.split(64)])
        return float(psnr_of_each(of, to_pixels(there)).mean()) if there.isfinite().all() else math.nan

    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    course = Course(most_steps)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if steps is None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, course)
    else:
        # Without a warm-up where it would be one step or less, which torch divides by.
        warm = 0.05 if steps > 20 else 0.0
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warm)
    shown: dict[str, str] = {}
    best, weights = -math.inf, dict[str, Tensor]()
    done = 0
    with tqdm(total=steps or most_steps, desc="fitting the autoencoder", unit="step") as bar:
        while done < (steps or course.end):
            generator = step_generator(seed, done)
            chosen = torch.randint(len(pixels), (min(batch_size, len(pixels)),), generator=generator)
            loss = loss_of(to_unit(pixels[chosen]).to(device), generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if done % 20 == 0:
                shown["loss"] = f"{float(loss.detach()):.4f}"
            done += 1
            if done % CHECK_EVERY == 0 and (there := psnr(judged)) is not None:
                shown["psnr"] = f"{there:.2f} dB"
                if math.isnan(there):  # the caller will say so
                    break
                course.check(done, there)
                if steps is None and there > best:
                    best, weights = there, {name: t.clone() for name, t in network.state_dict().items()}
                bar.total = steps or course.end
            bar.set_postfix(shown, refresh=False)
            bar.update()
    if weights and best > (psnr(judged) or best):
        network.load_state_dict(weights)
    why = f"as many as autoencoder.steps={steps} says" if steps else course.stopped
    return Fit(done, psnr(spread(pixels, MOST_JUDGED)) or 0.0, psnr(judged), why)
