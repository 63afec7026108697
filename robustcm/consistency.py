"""The consistency function, the temporal difference of student and teacher, and the sampler.

Axes: b = batch, ... = one sample. x = clean data, z = standard noise, x_t = x + t z, f = the consistency function,
F = the network inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from robustcm.couplers import Coupler
from robustcm.noise import NoiseRange
from robustcm.preconditioning import Network as Network
from robustcm.preconditioning import Preconditioned as Preconditioned
from robustcm.preconditioning import Preconditioning as Preconditioning
from robustcm.shapes import level_of_all, one_a_sample, over_samples, same_shape

ConsistencyFunction: TypeAlias = Callable[..., Tensor]
"""``f(x_t [b, ...], t [b], **conditions) -> [b, ...]``: the clean sample at the end of the path through x_t."""

RandomState: TypeAlias = tuple[Tensor, Tensor | None]
"""Of torch's generators: that of the CPU, that of an accelerator."""


def add_noise(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """``x_t = x + t z``: ``[b, ...], [b, ...], [b] -> [b, ...]``.

    Raises:
        ValueError: x and z of different shapes, or ``t`` not one level a sample.
    """
    same_shape(x=x, z=z)
    return x + over_samples(one_a_sample("t", t, len(x)), x) * z


def temporal_difference(
    f: ConsistencyFunction,
    x: Tensor,
    z: Tensor,
    t_hi: Tensor,
    t_lo: Tensor,
    *,
    teacher: ConsistencyFunction | None = None,
    x_lo: Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Student ``f(x + t_hi z, t_hi)`` and teacher ``stopgrad f(x + t_lo z, t_lo)``, each ``[b, ...]``.

    The teacher is the same f without gradient: no copy of the weights. Noise and dropout mask are shared, on any
    device. The device's random state afterwards is that after one forward pass. Inside ``torch.compile`` of the whole
    objective there is no mask to share; a network with dropout layers is refused there, and compiled alone instead.

    Args:
        teacher: another function in the place of f, such as one of averaged weights (CM, CTM).
        x_lo: what the teacher is shown instead of ``x + t_lo z``, see ``robustcm.teacher_input``.
        conditions: keyword arguments of both, such as ``class_labels``.
    Source: Song and Dhariwal 2023, arXiv 2310.14189 (teacher without EMA); mask sharing checked in the sLCT code.
    """
    given = conditions or {}
    with shared_mask(f, x.device), torch.no_grad():
        target = (teacher or f)(add_noise(x, z, t_lo) if x_lo is None else x_lo, t_lo, **given)
    student = f(add_noise(x, z, t_hi), t_hi, **given)
    return student, target


def shared_mask(f: Callable[..., Tensor], device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside is drawn again by what follows: ``replayed_rng``, also inside ``torch.compile``.

    There torch's generators cannot be put back, so f must not have dropout.
    """
    if not torch.compiler.is_compiling():
        return replayed_rng(device)
    _refuse_dropout(f)
    return nullcontext()


def random_state(f: Callable[..., Tensor], device: torch.device) -> RandomState | None:
    """Torch's random state before a pass of f, for ``drawn_again``.

    None inside ``torch.compile``, where f must not have dropout.
    """
    if torch.compiler.is_compiling():
        _refuse_dropout(f)
        return None
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


def drawn_again(before: RandomState | None, device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside is what was drawn since ``before``; behind it the random state is as ahead of it.

    For a pass that needs what the first one gave. As ``shared_mask``, where the order is free.
    """
    return nullcontext() if before is None else _drawn_again(before, device)


@contextmanager
def _drawn_again(before: RandomState, device: torch.device) -> Iterator[None]:
    with replayed_rng(device):
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.get_device_module(device).set_rng_state(before[1], device)
        yield


def _refuse_dropout(f: Callable[..., Tensor]) -> None:
    network = getattr(f, "network", f)
    modules = network.modules() if isinstance(network, nn.Module) else ()
    if any(isinstance(m, _DROPOUT) and m.training and m.p > 0 for m in modules):
        raise ValueError(
            "student and teacher cannot share a dropout mask inside one compiled graph: compile the network alone, "
            "torch.compile(network), and leave the objective as it is"
        )


_DROPOUT = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout


@contextmanager
def replayed_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's random state (CPU and, if ``device`` is an accelerator, its own) on leaving the block.

    What follows the block then draws the same numbers as the block did: two passes share their dropout mask. Nor does
    it find the weights that a caller's autocast converted in the block, see ``forget_casts``.
    """
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=kind):
        yield
    forget_casts(device)


def forget_casts(device: torch.device) -> None:
    """Behind a pass without gradient: what the caller's autocast converted for it is not taken for a pass with one.

    torch before 2.10 takes it, and the weights then get no gradient.
    """
    if not torch.compiler.is_compiling() and torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()


@torch.no_grad()
def sample(
    f: ConsistencyFunction,
    z: Tensor,
    *,
    sigmas: Sequence[float] | None = None,
    noise: NoiseRange | None = None,
    generator: torch.Generator | None = None,
    coupler: Coupler | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """Draw samples with ``len(sigmas)`` network evaluations (NFE).

    ``x = f(sigmas[0] z, sigmas[0])``; then for each further t: ``x = f(x + sqrt(t^2 - sigma_min^2) z', t)`` with
    fresh noise z'.

    Args:
        f: the consistency function.
        z: standard noise ``[b, ...]``; the samples have its shape, dtype and device.
        sigmas: falling noise levels; None: one, sigma_max. iCT's two-step sampler has (80, 0.821).
        noise: the range f is made for; None: its own (``f.noise``, as ``Preconditioned`` has it), else the default.
        generator: draws the fresh noise on its own device; needed for more than one evaluation, so that no
            sample depends on an ambient generator.
        coupler: pairs the fresh noise with the estimate it is added to, as f saw them paired in training; called as
            ``coupler(x, fresh, generator=generator)``, without labels, so not ``WithinClasses``. One that draws,
            ``Entropic``, needs a CPU generator. None: not.
        conditions: keyword arguments of f, such as ``class_labels``.
    Raises:
        ValueError: levels that do not fall or lie outside the range, or no generator where one is needed.
    Source: Song et al. 2023, arXiv 2303.01469, Algorithm 1. Re-coupling between evaluations: Silvestri et al. 2025,
        arXiv 2502.18197 (there with a learned coupling).
    """
    noise = noise or getattr(f, "noise", None) or NoiseRange()
    sigmas = (noise.sigma_max,) if sigmas is None else sigmas
    if not sigmas or any(a <= b for a, b in pairwise(sigmas)):
        raise ValueError(f"sigmas must fall, got {list(sigmas)}")
    if not noise.sigma_min <= sigmas[-1] <= sigmas[0] <= noise.sigma_max:
        raise ValueError(
            f"sigmas must lie in sigma_min .. sigma_max = {noise.sigma_min} .. {noise.sigma_max}, which f is made for, "
            f"got {list(sigmas)}"
        )
    if len(sigmas) > 1 and generator is None:
        raise ValueError("more than one evaluation draws fresh noise: pass a torch.Generator as generator=")
    given = conditions or {}
    x = f(sigmas[0] * z, level_of_all(sigmas[0], z), **given).to(z.dtype)
    for t in sigmas[1:]:
        assert generator is not None
        fresh = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
        if coupler is not None:
            fresh = fresh[coupler(x, fresh, generator=generator)]
        x = f(x + (t**2 - noise.sigma_min**2) ** 0.5 * fresh, level_of_all(t, z), **given).to(z.dtype)
    return x
