"""Images in one or a few evaluations of a network. This file goes with a model; it needs diffusers.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe(batch_size=16, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images

Axes: b = batch; latents [b, ch, h, w], in the model's units until the end: mean 0 and std ``sigma_data`` a channel.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class FewStepPipeline(DiffusionPipeline):
    """What the samplers below share: noise, labels, guidance, and images of latents.

    Args:
        scheduler, unet, transformer, vae: of diffusers; one network, and no ``vae`` where ``pixels``.
        noise_schedule: scheduler of the diffusion model that the network is, of a ``TunedPipeline``.
        latents_mean, latents_std: one a channel, of the latents that the ``vae`` takes.
        sigma_data: std of a channel in the model's units.
        pixels: the latents are the images, -1 .. 1.
        patch: side of the squares that are laid into channels before a ``unet`` sees them.
        time_scale: what a ``transformer`` is told is multiplied by it.
        data_scale: of a ``TunedPipeline``, the diffusion model's data are so many times those here.
        vae_patch: side of the squares of pixels that the ``vae`` has in its channels.
        vae_tanh: what the ``vae`` gives is logits: images are tanh of so many times them; 0: it gives images.
        guidance_scale: weight w of guidance unless another is asked for; 1: none.
        num_classes: the network is told of; 0: none.
        class_counts: training images of each, by which classes are drawn where none are asked for; None: all alike.
        id2label: their names.
        timesteps: indices into the scheduler's noise levels, for one evaluation, two, ...; as the run would take them.
    """

    model_cpu_offload_seq = "unet->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["unet", "transformer", "vae", "noise_schedule"]  # noqa: RUF012 (as diffusers has it)

    def __init__(  # type: ignore[no-untyped-def]  # diffusers compares what is annotated
        self,
        scheduler,
        unet=None,
        transformer=None,
        vae=None,
        noise_schedule=None,
        latents_mean=(0.0,),
        latents_std=(0.5,),
        sigma_data=0.5,
        pixels=False,
        patch=1,
        time_scale=1.0,
        data_scale=1.0,
        vae_patch=1,
        vae_tanh=0.0,
        guidance_scale=1.0,
        num_classes=0,
        class_counts=None,
        id2label=None,
        timesteps=None,
    ):
        super().__init__()
        parts = {"unet": unet, "transformer": transformer, "vae": vae, "noise_schedule": noise_schedule}
        self.register_modules(scheduler=scheduler, **parts)
        self.register_to_config(
            latents_mean=list(latents_mean),
            latents_std=list(latents_std),
            sigma_data=sigma_data,
            pixels=pixels,
            patch=patch,
            time_scale=time_scale,
            data_scale=data_scale,
            vae_patch=vae_patch,
            vae_tanh=vae_tanh,
            guidance_scale=guidance_scale,
            num_classes=num_classes,
            class_counts=class_counts,
            id2label=id2label,
            timesteps=timesteps,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | list[int] | int | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images.

        Args:
            class_labels: one for all or one each; None: drawn from ``generator``, each class as often as among the
                training images.
            guidance_scale: None: the model's.
            num_inference_steps: evaluations of the network, those with another label for guidance not counted.
            timesteps: of consistency models, in the place of those of the model; see the class.
            generator: of the noise.
            latents: standard noise ``[b, ch, h, w]``; None: drawn from ``generator``.
            output_type: "pil"; "np" ``[b, h, w, ch]`` and "pt" ``[b, ch, h, w]``, in 0 .. 1; "latent", as the vae takes
                them.
        """
        network = self._network
        if latents is None:
            shape = (batch_size, *self.latent_shape)
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=network.dtype)
        latents = latents.to(self._execution_device, network.dtype)
        told = self._labels(class_labels, len(latents), generator)
        weight = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        latents = self._sampled(latents, told, weight, num_inference_steps, timesteps, generator)
        images = self._shown(self._undone(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(ch, h, w)."""
        config, p = self._network.config.get("pixart", self._network.config), self.config["patch"]
        size = config["sample_size"]
        h, w = (size, size) if isinstance(size, int) else size
        return config["in_channels"] // p**2, h * p, w * p

    @property
    def _network(self) -> Any:
        return self.transformer if self.unet is None else self.unet

    def _sampled(
        self,
        noise: Tensor,
        labels: Tensor | None,
        weight: float,
        steps: int,
        timesteps: list[int] | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        raise NotImplementedError

    def _guided(self, x: Tensor, labels: Tensor | None, weight: float, *times: Tensor) -> Tensor:
        """What the network gives, drawn away from what it gives without a class."""
        if labels is None or weight == 1:
            return self._told(x, labels, *times)
        nothing = self._told(x, torch.full_like(labels, self.config["num_classes"]), *times)
        return nothing if weight == 0 else nothing + weight * (self._told(x, labels, *times) - nothing)

    def _told(self, x: Tensor, labels: Tensor | None, *times: Tensor) -> Tensor:
        """``F(x [b, ch, h, w], time, second time) -> [b, ch, h, w]``; times are 0-dim."""
        times = tuple(time.to(x.device, torch.float32).expand(len(x)) for time in times)
        if self.unet is not None:
            beside = labels if len(times) == 1 else times[1]
            x = F.pixel_unshuffle(x, self.config["patch"])
            return F.pixel_shuffle(self.unet(x, times[0], class_labels=beside).sample, self.config["patch"])
        times = tuple(self.config["time_scale"] * time for time in times)
        if hasattr(self.transformer, "labels"):
            return self.transformer(x, *(times if len(times) == 2 else (times[0], None)), labels)
        return self.transformer(x, timestep=times[0]).sample

    def _labels(self, asked: Any, count: int, generator: torch.Generator | None) -> Tensor | None:
        classes = self.config["num_classes"]
        if not classes:
            if asked is not None:
                raise ValueError("the model was trained without classes: leave class_labels out")
            return None
        if asked is None:
            device = generator.device if generator is not None else None
            shares = torch.tensor(self.config["class_counts"] or [1] * classes, dtype=torch.float32, device=device)
            asked = torch.multinomial(shares, count, replacement=True, generator=generator)
        labels = torch.as_tensor(asked).reshape(-1).to(self._execution_device, torch.long)
        if len(labels) not in (1, count) or not ((labels >= 0) & (labels <= classes)).all():
            raise ValueError(f"class_labels must be 1 or {count} of 0 .. {classes - 1} ({classes}: none), got {asked}")
        return labels.expand(count)

    def _undone(self, latents: Tensor) -> Tensor:
        """From the model's units to those of the vae."""
        mean, std = (latents.new_tensor(self.config[name]).reshape(1, -1, 1, 1) for name in _STATISTICS)
        return latents * (std / self.config["sigma_data"]) + mean

    def _shown(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        if self.vae is None and not self.config["pixels"]:
            raise ValueError("the model has no vae here: ask for output_type='latent' and decode them by your own")
        images = latents
        if self.vae is not None:
            images = F.pixel_shuffle(self.vae.decode(latents.to(self.vae.dtype)).sample, self.config["vae_patch"])
        if self.config["vae_tanh"]:
            images = torch.tanh(self.config["vae_tanh"] * images)
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """model_index.json, and the code that is not diffusers' own: this file, and that of the transformer."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder, own = Path(save_directory), Path(__file__).with_name(f"{Path(__file__).stem}.py")
        index = json.loads((folder / self.config_name).read_text())
        shutil.copyfile(own, folder / "few_step_pipeline.py")
        index["_class_name"] = ["few_step_pipeline", type(self).__name__]
        if hasattr(self.transformer, "labels"):
            source = str(sys.modules[type(self.transformer).__module__].__file__)
            shutil.copyfile(source, folder / "transformer" / "conditioned_transformer.py")
            index["transformer"] = ["conditioned_transformer", type(self.transformer).__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class ConsistencyPipeline(FewStepPipeline):
    """With CMStochasticIterativeScheduler, whose coefficients stand around the network: multistep sampling."""

    def _sampled(
        self,
        noise: Tensor,
        labels: Tensor | None,
        weight: float,
        steps: int,
        timesteps: list[int] | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        if timesteps is None:
            known = self.config["timesteps"]
            if not 1 <= steps <= len(known):
                raise ValueError(f"num_inference_steps must be 1 .. {len(known)}, got {steps}; or give timesteps")
            timesteps = list(known[steps - 1])
        self.scheduler.set_timesteps(timesteps=timesteps, device=noise.device)
        x = noise * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self._guided(self.scheduler.scale_model_input(x, t), labels, weight, t)
            x = self.scheduler.step(output, t, x, generator=generator).prev_sample
        return x


class TunedPipeline(ConsistencyPipeline):
    """Of a diffusion model tuned to be a consistency model: F is made of its output, as in training."""

    def _told(self, x: Tensor, labels: Tensor | None, *times: Tensor) -> Tensor:
        """F of ``x`` = c_in x_t at c_noise: ``(1 - c_skip) / c_out x_t - (t - sigma_min) / c_out epsilon``."""
        sd, low, k = self.config["sigma_data"], self.scheduler.config["sigma_min"], self.config["data_scale"]
        t = (times[0].double() / 250).exp()
        gone, scale, sigma = t - low, (t**2 + sd**2).sqrt(), k * t
        x_t = scale * x
        preserved = k / (1 + sigma**2).sqrt() * x_t
        output = super()._told(preserved.to(x.dtype), labels, self._timestep(sigma))[:, : x.shape[1]]
        prediction = self.noise_schedule.config["prediction_type"]
        if prediction == "v_prediction":
            output = (output + sigma * preserved) / (1 + sigma**2).sqrt()
        elif prediction == "sample":
            output = (k * x_t - output) / sigma
        return gone * scale / (sd * (gone**2 + sd**2)) * x_t - scale / sd * output

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The timestep with this noise over signal, between two of them by interpolation in its logarithm."""
        alphas = self.noise_schedule.alphas_cumprod.double()
        logs = ((1 - alphas) / alphas).sqrt().log()
        logs = logs[logs.isfinite()].to(sigma.device)
        above = torch.searchsorted(logs, sigma.log()).clamp(1, len(logs) - 1)
        low, high = logs[above - 1], logs[above]
        return above - 1 + ((sigma.log() - low) / (high - low)).clamp(0, 1)


class FlowMapPipeline(FewStepPipeline):
    """With FlowMapEulerDiscreteScheduler; the coefficients around the network, as in ``robustcm.flow_maps``, here."""

    def _sampled(
        self,
        noise: Tensor,
        labels: Tensor | None,
        weight: float,
        steps: int,
        timesteps: list[int] | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps=steps, timesteps=timesteps, device=noise.device)
        x, sigmas = noise, self.scheduler.sigmas
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            u = self._velocity(x, labels, weight, sigmas[step], sigmas[step + 1])
            x = self.scheduler.step(u, t, x).prev_sample
        return x

    def _velocity(self, x: Tensor, labels: Tensor | None, weight: float, t: Tensor, r: Tensor) -> Tensor:
        """u from flow time ``t`` to ``r``: ``c_skip x + c_out F(c_in x, 250 t, 250 (t - r))``."""
        sd = self.config["sigma_data"]
        at_t, at_r = (((1 - time) * sd) ** 2 + time**2 for time in (t, r))
        c_skip = ((1 + sd**2) * (t + r) - 2 * sd**2) / (at_t + (at_t * at_r).sqrt())
        scale = at_t.rsqrt()
        output = self._guided((scale * x).to(x.dtype), labels, weight, 250 * t, 250 * (t - r))
        return (c_skip * x + sd * scale * output).to(x.dtype)


_STATISTICS = ("latents_mean", "latents_std")
