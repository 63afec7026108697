"""The words of a command line: at most one preset of data, at most one recipe, and path.to.field=value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reference_trainer.config import TrainConfig
from reference_trainer.data.index import is_store
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError
from reference_trainer.options import override
from reference_trainer.presets import DATA, RECIPES, on_data
from reference_trainer.published import DATA_SETS

PROGRAM = "python -m reference_trainer"
AUTOENCODER = "stabilityai/sd-vae-ft-ema"
"""Of the published data sets, as its hub calls it."""

NAMES = tuple(preset.__name__ for preset in (*DATA, *RECIPES))
"""Of all presets, those of data first."""


def names_in(words: Sequence[str]) -> list[str]:
    """The words that give no field a value."""
    return [word for word in words if "=" not in word]


def with_options(config: TrainConfig, options: Sequence[str]) -> TrainConfig:
    """``config`` with every option applied; one that does not fit yet waits for those behind it, of other parts.

    Raises:
        UserError: an option that does not fit.
    """
    left = list(options)
    while left:
        waiting, refusals = list[str](), list[UserError]()
        for option in left:
            if any(_of_one_path(option, earlier) for earlier in waiting):
                waiting.append(option)
                continue
            try:
                config = override(config, option)
            except UserError as refusal:
                waiting.append(option)
                refusals.append(refusal)
        if len(waiting) == len(left):
            raise refusals[0]
        left = waiting
    return config


def _of_one_path(one: str, other: str) -> bool:
    """Whether one of two options is of a part of what the other is of."""
    paths = [f"{option.partition('=')[0]}." for option in (one, other)]
    return paths[0].startswith(paths[1]) or paths[1].startswith(paths[0])


@dataclass(frozen=True)
class Chosen:
    """What was named: data, and what to train on them."""

    data: Callable[..., TrainConfig]
    recipe: Callable[[TrainConfig], TrainConfig] | None
    """None: that of this repository, which every preset of data brings."""
    name: str
    """As in ``celebahq-paper``, whatever the order they were typed in."""

    @staticmethod
    def of(names: Sequence[str]) -> Chosen:
        """Of names in ``NAMES``, in any order; where none of them is of data, on the digits.

        Raises:
            UserError: two of one kind.
        """
        places = [preset for preset in DATA if preset.__name__ in names]
        recipes = [recipe for recipe in RECIPES if recipe.__name__ in names]
        for kind, found in (("data", places), ("recipe", recipes)):
            same = [name for name in names if name in [one.__name__ for one in found]]
            if len(same) > 1:
                raise UserError(
                    f"{' and '.join(same)} are {len(same)} presets of one kind ({kind}): give one, and "
                    "path.to.field=value for more"
                )
        name = "-".join(one.__name__ for one in (*places, *recipes)) or DATA[0].__name__
        return Chosen(places[0] if places else DATA[0], recipes[0] if recipes else None, name)

    def configured(self, options: Sequence[str] = (), path: str | Path | None = None) -> TrainConfig:
        """The configuration on what ``--data`` names, ``path``, with every option applied.

        The steps of a published data set follow from its epochs, the images in the store and the batch size, unless
        ``steps=`` is among the options.

        Raises:
            UserError: an option that does not fit; a data set that wants a store gets something else.
        """
        if self.data not in DATA_SETS:
            return with_options(on_data(self.technique(self.data()), path), options)
        if path is None:
            config = self.technique(self.data())
        elif is_store(Path(path).expanduser()):
            images = LatentStore(path=str(Path(path).expanduser())).images()
            config = on_data(self.technique(self.data(images)), path)
        else:
            raise UserError(f"{path} is no store of latents: {self._how_to()}")
        changed = with_options(config, options)
        if changed.batch_size != config.batch_size and not any(word.startswith("steps=") for word in options):
            steps = max(1, round(config.steps * config.batch_size / changed.batch_size))
            changed = replace(changed, steps=steps)
        return changed

    def require_data(self, config: TrainConfig) -> None:
        """Refuse to go on with a ``config`` of a data set whose store was not named.

        Raises:
            UserError: in a line with the two commands that make it and train on it.
        """
        if isinstance(config.data, LatentStore) and not config.data.path:
            raise UserError(f"{self.name.replace('-', ' ')} needs latents: {self._how_to()}")

    def technique(self, config: TrainConfig) -> TrainConfig:
        """``config`` by the recipe that was named."""
        return config if self.recipe is None else self.recipe(config)

    def _how_to(self) -> str:
        wanted = self.data().data
        flips = " --flips" if isinstance(wanted, LatentStore) and wanted.flips else ""
        encode = f"encode IMAGES --out STORE --resolution 256 --autoencoder {AUTOENCODER}{flips}"
        train = f"{self.name.replace('-', ' ')} --data STORE"
        return f"make them with `{PROGRAM} {encode}`, then train with `{PROGRAM} {train}`"
