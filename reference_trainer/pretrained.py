"""A network to start from: a UNet2DModel of diffusers, by name on the hub or from a folder, with its weights.

What it was trained to give, the scheduler beside it says. That of a consistency model is F itself. That of a diffusion
model (epsilon, v_prediction or sample) becomes F by change of parametrisation: consistency tuning.

Axes: b = batch; x_t [b, ch, h, w] = x + t z, t [b].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_trainer.errors import STOPS, UserError, one_line, type_and_message
from reference_trainer.loading import Kind, Place, quiet, weights_sha256
from reference_trainer.networks import NO_CLASSES, Beside, Patched
from robustcm.checks import LARGEST, SMALLEST, need_real, need_whole
from robustcm.consistency import Preconditioning
from robustcm.noise import NoiseRange
from robustcm.shapes import over_samples

KIND = Kind(
    noun="network", option="FromDiffusers", subfolder="unet", methods=(), such_as="a UNet2DModel", only=("UNet2DModel",)
)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
OF_THE_BETAS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
"""What of a scheduler's configuration says how a diffusion model was trained."""
NO_FILE = "does not appear to have a file named"
"""In what diffusers says of a repository without that file."""
SCHEDULERS = ("CMStochasticIterativeScheduler", "FlowMapEulerDiscreteScheduler")
"""Of networks that are F as they stand."""


@dataclass(frozen=True, kw_only=True)
class FromDiffusers:
    """A UNet2DModel of diffusers to start from, by name on the hub or from a folder, such as ``export`` writes.

    Of a consistency model (beside CMStochasticIterativeScheduler, as OpenAI's are, or beside no scheduler) it is F. Of
    a diffusion model (DDPM, DDIM and their kin) it is made F, so that the run begins as a denoiser: ``Denoising``.

    Safetensors only; weights that are missing, left over or of another shape are an error. The run keeps what it was:
    its hash, its configuration and that of its scheduler; once begun it does not need the folder any more.
    """

    name: str
    """As on the hub, ``openai/diffusers-cd_cat256_l2``, or a folder."""
    subfolder: str | None = None
    """Below it; None: ``unet``, if there is one."""
    revision: str | None = None
    """On the hub: a branch, tag or commit. None: the newest."""
    patch: int = 1
    """Side of the squares of latents that it has in its channels."""
    scale: float = 1.0
    """The data of a diffusion model are so many times those of the run, as ``statistics`` make them: 2 where it was
    trained on latents of std 1, which are here of std 0.5."""
    sha256: str = ""
    """Of its weights; filled in where a run begins."""
    model: str = ""
    """Its configuration, as JSON; filled in where a run begins."""
    scheduler: str = ""
    """That of its scheduler; filled in where a run begins."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name must be one on the hub or a folder, got {self.name!r}")
        need_whole(self, "patch", least=1, most=2**16)
        need_real(self, "scale", least=SMALLEST, most=LARGEST)

    def found(self) -> FromDiffusers:
        """The same with what is there now noted: hash and configurations, the folder's name in full.

        Raises:
            UserError: it cannot be had, see ``Place.load``; or it is no network that training can start from.
        """
        folder = Path(self.name).expanduser()
        known = replace(self, subfolder=self._subfolder(), name=str(folder.resolve()) if folder.is_dir() else self.name)
        network: Any = known._place.load()
        config = {name: value for name, value in dict(network.config).items() if not name.startswith("_")}
        scheduler = _scheduler_beside(known._place)
        known = replace(
            known,
            sha256=weights_sha256(network),
            model=json.dumps(config, sort_keys=True),
            scheduler=json.dumps(scheduler, sort_keys=True) if scheduler else "",
        )
        known._require_usable()
        return known

    def is_that_of(self, noted: FromDiffusers) -> bool:
        """Whether ``noted``, which a run has found, is what this asks for, be it still there or not."""
        names = self.name, str(Path(self.name).expanduser().resolve())
        alike = replace(self, name=noted.name, subfolder=self.subfolder or noted.subfolder, sha256=noted.sha256)
        return noted.name in names and replace(alike, model=noted.model, scheduler=noted.scheduler) == noted

    @property
    def in_words(self) -> str:
        """What a run begins with."""
        what = f"as it is, F of a consistency model ({self._scheduler.get('_class_name', 'no scheduler is beside it')})"
        if (schedule := self.diffusion) is not None:
            what = f"a diffusion model ({schedule.prediction}, {len(schedule.sigmas)} timesteps) turned into F"
        return f"the network begins with {self._place.shown}, {what}"

    @property
    def diffusion(self) -> Schedule | None:
        """What it was trained at, if it is a diffusion model; once it is found."""
        scheduler = self._scheduler
        if not scheduler or scheduler.get("_class_name") in SCHEDULERS:
            return None
        return Schedule.of(self.noise_schedule())

    def noise_schedule(self) -> Any:
        """Of a diffusion model a DDPMScheduler with the betas that it was trained with."""
        from diffusers import DDPMScheduler

        with quiet():
            known = {name: value for name, value in self._scheduler.items() if name in OF_THE_BETAS}
            return DDPMScheduler(**known)

    def build(
        self, shape: tuple[int, int, int], seed: int, times: int = 1, classes: int = 0, sigma_min: float = 0.002
    ) -> nn.Module:
        """The network for latents of ``shape`` (ch, h, w), told 1 or 2 ``times`` and of ``classes``; its weights drawn.

        Args:
            sigma_min: of the noise levels, at which a consistency function is the identity.
        Raises:
            ValueError: it is not made for latents, times or classes like these.
            UserError: see ``found``, where it has not been asked yet.
        """
        from diffusers import UNet2DModel  # slow to import

        if not self.model:
            return self.found().build(shape, seed, times, classes, sigma_min)
        try:
            config, schedule = json.loads(self.model), self.diffusion
            self._require_fit(config, shape, times, classes)
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                network: Any = UNet2DModel.from_config(config)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"what is noted of {self._place.shown} is no UNet2DModel: {one_line(error)}") from error
        patched = Patched(network, self.patch, Beside(network, classes) if classes else None)
        return patched if schedule is None else Denoising(patched, schedule, self.scale, sigma_min)

    def start(self, network: nn.Module) -> None:
        """Put its weights into what ``build`` made.

        Raises:
            UserError: they are not those that were noted; or see ``Place.load``.
        """
        loaded: Any = self._place.load()
        if self.sha256 and (now := weights_sha256(loaded)) != self.sha256:
            raise UserError(
                f"network {self._place.shown} has other weights than when the run was begun (sha256 {self.sha256[:8]} "
                f"then, {now[:8]} now): bring those back, or give a new run another --out"
            )
        patched: Any = network.network if isinstance(network, Denoising) else network
        weights = loaded.state_dict()
        table = weights.pop("class_embedding.weight", None) if patched.beside is not None else None
        if patched.beside is not None:
            second = {name: weights.pop(name) for name in list(weights) if name.startswith("class_embedding.")}
            if second:
                patched.beside.second.load_state_dict(
                    {name.removeprefix("class_embedding."): tensor for name, tensor in second.items()}
                )
        patched.network.load_state_dict(weights)
        if table is not None:
            rows = patched.beside.labels.weight
            with torch.no_grad():  # one told of classes alone says no class by their mean
                rows.copy_(table if len(table) == len(rows) else torch.cat([table, table.mean(0, keepdim=True)]))

    def _require_usable(self) -> None:
        """Refuse what is neither F nor a diffusion model known here.

        Raises:
            UserError: just that.
        """
        config, scheduler, where = json.loads(self.model), self._scheduler, f"network {self._place.shown}"
        if (embedding := config.get("time_embedding_type")) not in (None, "positional"):
            raise UserError(f"{where}: its time embedding is {embedding!r}; training can start from 'positional' ones")
        if not scheduler or scheduler.get("_class_name") in SCHEDULERS:
            if scheduler.get("sigma_data", 0.5) != 0.5:
                raise UserError(f"{where}: its scheduler has sigma_data {scheduler['sigma_data']}, here it is 0.5")
            return
        if "beta_schedule" not in scheduler or scheduler.get("prediction_type", "epsilon") not in PREDICTIONS:
            gives = scheduler.get("prediction_type")
            raise UserError(
                f"{where}: beside {scheduler.get('_class_name')} (prediction_type {gives}) it is no consistency model, "
                "nor a diffusion model with betas: take another, or a copy of its unet folder alone to have it as F"
            )
        if scheduler.get("timestep_type") == "continuous":
            raise UserError(f"{where}: it is told a logarithm of the noise, not a timestep: take another")
        try:
            sigmas = Schedule.of(self.noise_schedule()).sigmas
        except (ValueError, TypeError, RuntimeError) as error:  # of diffusers; NotImplementedError is one
            raise UserError(f"{where}: its scheduler's betas make no sense: {type_and_message(error)}") from error
        if len(sigmas) < 2 or not sigmas[0] > 0 or any(low >= high for low, high in pairwise(sigmas)):
            raise UserError(f"{where}: by its scheduler's betas noise does not rise from timestep to timestep")

    @property
    def _place(self) -> Place:
        return Place(KIND, self.name, KIND.subfolder if self.subfolder is None else self.subfolder, self.revision)

    def _subfolder(self) -> str:
        """The one asked for, else where it is: of some pipelines at their root."""
        if self.subfolder is not None:
            return self.subfolder
        folder = Path(self.name).expanduser()
        there = (folder / KIND.subfolder).is_dir() if folder.is_dir() else _on_hub(self._place)
        return KIND.subfolder if there else ""

    @property
    def _scheduler(self) -> dict[str, Any]:
        return json.loads(self.scheduler) if self.scheduler else {}

    def _require_fit(self, config: Mapping[str, Any], shape: tuple[int, int, int], times: int, classes: int) -> None:
        """
        Raises:
            ValueError: names what does not fit.
        """
        ch, h, w = shape
        wanted, where = ch * self.patch**2, self._place.shown
        doubled = 2 if self.diffusion is not None else 1  # the second half, a variance, is left out
        if config["in_channels"] != wanted or config["out_channels"] not in (wanted, doubled * wanted):
            raise ValueError(
                f"{where} takes {config['in_channels']} channels and gives {config['out_channels']}, the latents have "
                f"{ch} (patch={self.patch}: {wanted}): take other latents, or another network or patch"
            )
        divisor = self.patch * 2 ** (len(config["block_out_channels"]) - 1)
        if h % divisor or w % divisor:
            raise ValueError(f"{where} wants latents whose sides are multiples of {divisor}, these are {h}x{w}")
        kind, table = config.get("class_embed_type"), config.get("num_class_embeds")
        if times == 2 and (kind != "timestep" or self.diffusion is not None):
            raise ValueError(
                f"{where} is told one time, flow maps and trajectories need two: take a consistency objective"
            )
        if times == 1 and kind is not None:
            raise ValueError(f"{where} is told more than a time and a class (class_embed_type={kind!r})")
        if times == 1 and table is not None and classes not in (table, table - 1):
            there = f"trained by class on {classes}" if classes else "trained without classes"
            raise ValueError(
                f"{where} is told of {table} classes, the run is {there}: take such data and classes=ByClass"
            )


@dataclass(frozen=True)
class Schedule:
    """What a diffusion model was trained at, in variance-exploding terms, and what it gives."""

    sigmas: tuple[float, ...]
    """Noise over signal of each timestep, rising: sqrt((1 - alphas_cumprod) / alphas_cumprod)."""
    prediction: str
    """Of ``PREDICTIONS``."""

    @staticmethod
    def of(scheduler: Any) -> Schedule:
        """Of a scheduler of diffusers with ``alphas_cumprod``."""
        alphas = scheduler.alphas_cumprod.double()
        sigmas = ((1 - alphas) / alphas).sqrt()
        return Schedule(tuple(sigmas[sigmas.isfinite()].tolist()), scheduler.config.prediction_type)


class Denoising(nn.Module):
    """F of a diffusion model, so that at the start ``f(x_t, t) = x_t - (t - sigma_min) epsilon(x_t, t)``.

    That is the model's own step (DDIM's) along the path from t down to sigma_min, where a consistency function is the
    data; it differs from the denoiser ``x_t - t epsilon`` by sigma_min epsilon, and for sigma_min = 0 is it. Of
    ``f = c_skip x_t + c_out F`` that leaves

        F = (1 - c_skip) / c_out x_t - (t - sigma_min) / c_out epsilon,

    both coefficients finite at t = sigma_min.

    The model is variance-preserving: it sees ``x_t / sqrt(1 + sigma^2)``, sigma = t in its own units, at the timestep
    whose sigma that is; between two of them by interpolation in ln sigma, beyond the last at the last.

    Source: ours; interpolated timesteps as in diffusers' EulerDiscreteScheduler; consistency tuning from a diffusion
    model: Geng et al. 2024, arXiv 2406.14548.
    """

    log_sigmas: Tensor
    rounding_grows = True
    """f subtracts t epsilon(x_t): at t = 80 what bfloat16 rounds off, some 0.4 %, is of the size of the data."""

    def __init__(self, network: Patched, schedule: Schedule, scale: float, sigma_min: float) -> None:
        super().__init__()
        self.network = network
        self.prediction = schedule.prediction
        self.scale = scale
        self.preconditioning = Preconditioning(noise=NoiseRange(sigma_min=sigma_min))
        self.register_buffer("log_sigmas", torch.tensor(schedule.sigmas).log(), persistent=False)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None and self.network.beside is None:
            raise ValueError(NO_CLASSES)
        p, t = self.preconditioning, (c_noise / 250).exp()
        sd, gone = p.sigma_data, t - p.noise.sigma_min
        scale = (t**2 + sd**2).sqrt()  # 1 / c_in
        x_t = over_samples(scale, x) * x
        of_x = gone * scale / (sd * (gone**2 + sd**2))  # (1 - c_skip) / c_out
        epsilon = self.epsilon(x_t, t, labels)
        return over_samples(of_x, x) * x_t - over_samples(scale / sd, x) * epsilon

    def epsilon(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise in ``x_t [b, ch, h, w]``, as the model has it."""
        sigma = self.scale * t
        preserved = over_samples(self.scale / (1 + sigma**2).sqrt(), x_t) * x_t
        output = self.network(preserved, self.timestep(sigma), labels=labels)[:, : x_t.shape[1]]
        if self.prediction == "epsilon":
            return output
        if self.prediction == "v_prediction":
            return (output + over_samples(sigma, x_t) * preserved) * over_samples((1 + sigma**2).rsqrt(), x_t)
        return (self.scale * x_t - output) / over_samples(sigma, x_t)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Where ``sigma [b]`` lies among the timesteps, from 0 to the last."""
        log = sigma.log()
        above = torch.searchsorted(self.log_sigmas, log.contiguous()).clamp(1, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[above - 1], self.log_sigmas[above]
        return above - 1 + ((log - low) / (high - low)).clamp(0, 1)


def _scheduler_beside(place: Place) -> dict[str, Any]:
    """The configuration of the scheduler in the pipeline that ``place`` is of; empty if it is of none.

    Raises:
        UserError: it cannot be read.
    """
    from diffusers import DDPMScheduler

    folder, below = Path(place.name).expanduser(), "scheduler" if place.subfolder else ""
    beside = [folder / "scheduler", folder, *([folder.parent / "scheduler"] if folder.name == KIND.subfolder else [])]
    if folder.is_dir():
        there = [str(path) for path in beside if (path / DDPMScheduler.config_name).is_file()]
        if not there:
            return {}
        source, options = there[0], dict[str, Any]()
    else:
        source, options = place.name, {"subfolder": below or None, "revision": place.revision}
    try:
        with quiet():
            found = DDPMScheduler.load_config(source, **options)
    except STOPS:
        raise
    except BaseException as error:
        if _has_no_such_file(error):
            return {}
        raise UserError(
            f"network {place.shown}: the configuration of its scheduler cannot be read: {type_and_message(error)}"
        ) from error
    return {key: value for key, value in dict(found).items() if _is_json(value)}


def _on_hub(place: Place) -> bool:
    """Whether a repository has such a folder; yes, where it cannot be asked: the loader will say why not."""
    from diffusers import UNet2DModel

    try:
        with quiet():
            UNet2DModel.load_config(place.name, subfolder=place.subfolder, revision=place.revision)
    except OSError as error:
        return not _has_no_such_file(error)
    return True


def _has_no_such_file(error: BaseException | None) -> bool:
    """Whether ``error`` of diffusers says that a repository lacks a file, and not that it could not be asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if error is None or NO_FILE not in str(error):
        return False
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return not (isinstance(value, float) and math.isnan(value))
