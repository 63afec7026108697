"""--features by name: torch-fidelity's networks, TorchScript files, and one line for each way in which there are none.

torch-fidelity is not among the tests' packages: a stand-in has its registry and what of its classes is relied on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reference_trainer.errors import UserError
from reference_trainer.evaluation import fidelity
from reference_trainer.evaluation.features import Imported, identity_of, scales_kernel, vectors_of
from reference_trainer.evaluation.identity import digest_of
from reference_trainer.evaluation.named import features_named

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
CPU = torch.device("cpu")
GREY = torch.randint(0, 256, (7, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
URL = "https://nowhere.invalid/weights-of-a-stand-in-01234567.pth"


class StandIn(torch.nn.Module):
    """As a FeatureExtractorBase of torch-fidelity 0.4: names in, weights from a file, uint8 in colour to a tuple."""

    INPUT_IMAGE_SIZE = 12

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any = None) -> None:
        super().__init__()
        self.name, self.features_list = name, features_list
        self.weight = torch.nn.Parameter(torch.zeros(3, 5))
        assert feature_extractor_weights_path is not None, "would download"
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        features = x.float().mean((2, 3)) @ self.weight
        return tuple({"2048": features, "64": features[:, :2]}[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "2048"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"fid": "2048"}[metric]


class TakesNoFile(StandIn):
    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any = None) -> None:
        if feature_extractor_weights_path is not None:
            raise NotImplementedError
        raise RuntimeError("no internet connection\nand more lines")


class Unpickles(StandIn):
    """As those whose cached weights torch-fidelity has read by torch.load or torch.hub without weights_only."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any = None) -> None:
        if feature_extractor_weights_path is None:
            pytest.fail("unpickled")
        super().__init__(name, features_list, feature_extractor_weights_path)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch_fidelity, with a torch hub that holds nothing."""
    top, registry, inception = (ModuleType(f"torch_fidelity{name}") for name in ("", ".registry", INCEPTION_MODULE))
    kinds = {
        fidelity.INCEPTION: StandIn,
        "dinov2-vit-l-14": TakesNoFile,
        "vgg16": Unpickles,
        "clip-vit-b-32": Unpickles,
    }
    registry.FEATURE_EXTRACTORS_REGISTRY = kinds
    inception.URL_INCEPTION_V3 = URL
    top.registry = registry
    for module in (top, registry, inception):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


INCEPTION_MODULE = ".feature_extractor_inceptionv3"


def weights(seed: int = 0) -> dict[str, Tensor]:
    return {"weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))}


def expected(seed: int = 0) -> Tensor:
    return GREY.float().mean((2, 3)).expand(-1, 3) @ weights(seed)["weight"]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("suffix", "save"), [(".pth", torch.save), (".safetensors", save_file)])
def test_weights_come_from_a_file_and_grey_images_count_as_coloured(
    suffix: str, save: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
):
    file = tmp_path / f"weights{suffix}"
    save(weights(), file)
    found = features_named(f"Fidelity(weights={str(file)!r})", CPU)
    torch.testing.assert_close(vectors_of(GREY, found), expected())
    assert not scales_kernel(found)  # KID
    assert "FID" in found.name
    assert found.identity.resize == "to 12 px, bilinear as in TensorFlow 1, by torch-fidelity"


@pytest.mark.usefixtures("package")
def test_weights_that_would_be_unpickled_can_be_given_as_a_file(tmp_path: Path):
    torch.save(weights(), tmp_path / "w.pth")
    found = features_named(f"Fidelity(extractor='vgg16', weights='{tmp_path / 'w.pth'}')", CPU)
    torch.testing.assert_close(vectors_of(GREY, found), expected())


@pytest.mark.usefixtures("package")
def test_weights_of_its_own_come_from_the_cache_of_the_torch_hub(tmp_path: Path):
    file = tmp_path / "hub" / "checkpoints" / URL.rpartition("/")[2]
    with pytest.raises(UserError, match=rf"no weights at {file}.*no network.*put .* there, or give") as caught:
        features_named("inception", CPU)
    assert "\n" not in str(caught.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights(), file)
    torch.testing.assert_close(vectors_of(GREY, features_named("inception", CPU)), expected())


@pytest.mark.usefixtures("package")
def test_other_weights_or_another_layer_are_another_extractor(tmp_path: Path):
    digests = []
    for seed in (0, 0, 1):
        torch.save(weights(seed), tmp_path / "w.pth")
        digests.append(features_named(f"Fidelity(weights='{tmp_path / 'w.pth'}')", CPU).identity.digest)
    layer = features_named(f"Fidelity(weights='{tmp_path / 'w.pth'}', layer='64')", CPU)
    assert vectors_of(GREY, layer).shape == (7, 2)
    assert "FID" not in layer.name
    assert digests[0] == digests[1]
    assert len({*digests, layer.identity.digest}) == 3


class Trap:
    """Whoever unpickles this is caught."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("unpickled",))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("content", [{"weight": Trap()}, [1, 2], {"weight": 3}, {"other": torch.zeros(2)}])
def test_a_file_of_no_such_weights_is_a_line_and_not_unpickled(content: object, tmp_path: Path):
    file = tmp_path / "w.pth"
    torch.save(content, file)
    with pytest.raises(UserError, match=rf"--features Fidelity.*{file}") as caught:
        features_named(f"Fidelity(weights={str(file)!r})", CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dinov2", r"dinov2-vit-l-14 has no weights \(RuntimeError no internet connection\): run it once where"),
        ("Fidelity(extractor='dinov2-vit-l-14', weights='FILE')", "takes no file for dinov2-vit-l-14"),
        ("Fidelity(extractor='vgg16')", r"would unpickle .* of vgg16: give .*extractor='vgg16', weights='PATH'"),
        (
            "Fidelity(extractor='clip-vit-b-32')",
            "clip-vit-b-32 .*unpickles .*: take inception or dinov2, or give .*TorchS",
        ),
        ("Fidelity(extractor='clip-vit-b-32', weights='FILE')", "clip-vit-b-32 .*: take inception or dinov2"),
        ("Fidelity(extractor='nope')", "has no extractor nope; it has inception-v3-compat"),
        ("Fidelity(layer='nope')", "has no layer nope; it has 64, 2048"),
        ("Fidelity(weights='/no/such.pth')", "cannot read weights from /no/such.pth"),
        ("Fidelity(weights=3)", "weights must be a text or None, got 3"),
        ("Fidelity(extractor=None)", "extractor must be a name"),
        ("Fidelity(wait='x')", "unexpected keyword argument 'wait'"),
        ("Fidelity('x')", "every value with its name"),
        ("Fidelity(weights=open('x'))", "as in Fidelity"),
        ("Fidelity(", "as in Fidelity"),
        ("TorchScript", "missing 1 required keyword-only argument: 'path'"),
        ("TorchScript(path='x.pt', images='float')", "images must be uint8 or unit"),
        ("TorchScript(path=1)", "path must be"),
        ("TorchScript(path='x.pt', scaled=2)", "scaled must be True or False"),
        ("/no/such/file.pt", "no file /no/such/file.pt"),
    ],
)
def test_what_cannot_be_had_is_a_line_that_says_what_to_do(name: str, said: str, tmp_path: Path):
    torch.save(weights(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"--features .*{said}") as caught:
        features_named(name.replace("FILE", str(tmp_path / "w.pth")), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("no", name="torch_fidelity"), "not installed: pip install torch-fidelity"),
        (ModuleNotFoundError("no", name="torchvision"), "torch-fidelity needs torchvision, which is not installed"),
        (RuntimeError("operator torchvision::nms does not exist\n"), "the torchvision that belongs to torch"),
    ],
)
def test_without_the_package_or_with_one_that_is_broken_a_line_says_what_to_install(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
):
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] == "torch_fidelity":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(UserError, match=f"--features inception.*{said}") as caught:
        features_named("inception", CPU)
    assert "\n" not in str(caught.value)


class Means(torch.nn.Module):
    """What it was given: means of uint8 pixels, or of numbers in -1 .. 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


class Inception(torch.nn.Module):
    """As the one of EDM: features only where it is asked for them."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8
        means = x.float().mean((2, 3))
        return means if return_features else means.softmax(1)


def script(network: torch.nn.Module, file: Path) -> Path:
    torch.jit.script(network).save(str(file))
    return file


@pytest.mark.parametrize("network", [Means(), Inception()])
def test_a_torchscript_file_is_given_bytes_in_colour_and_gives_features(network: torch.nn.Module, tmp_path: Path):
    found = features_named(str(script(network, tmp_path / "network.pt")), CPU)
    torch.testing.assert_close(vectors_of(GREY, found), GREY.float().mean((2, 3)).expand(-1, 3))


def test_a_torchscript_file_can_have_numbers_about_0_and_is_then_another_extractor(tmp_path: Path):
    file = script(Means(), tmp_path / "network.ts")
    unit = features_named(f"TorchScript(path='{file}', images='unit', scaled=False)", CPU)
    torch.testing.assert_close(vectors_of(GREY, unit), (GREY.float().mean((2, 3)) / 127.5 - 1).expand(-1, 3))
    assert not scales_kernel(unit)
    assert unit.identity != features_named(str(file), CPU).identity


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_a_file_that_is_no_torchscript_is_a_line_and_not_unpickled(content: bytes | None, tmp_path: Path):
    file = tmp_path / "network.pt"
    torch.save({"weight": Trap()}, file) if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} is no TorchScript .*torch.jit.script") as caught:
        features_named(str(file), CPU)
    assert "\n" not in str(caught.value)


def test_two_channels_are_refused_in_a_line(tmp_path: Path):
    found = features_named(str(script(Means(), tmp_path / "network.pt")), CPU)
    with pytest.raises(UserError, match="images of 2 channels; the network takes 3"):
        vectors_of(torch.zeros(2, 2, 4, 4, dtype=torch.uint8), found)


def test_any_other_name_is_a_function_of_the_users():
    with pytest.raises(UserError, match="expected an importable module:function"):
        features_named("no_such_module:f", CPU)


def test_a_network_of_the_users_is_known_by_its_weights_and_a_function_by_what_it_makes_of_images():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2))
    sys.modules["module_of_networks"] = module = ModuleType("module_of_networks")
    module.make, module.plain = lambda: network, lambda: lambda pixels: pixels.float().mean((2, 3))
    try:
        own, plain = Imported.of("module_of_networks:make"), Imported.of("module_of_networks:plain")
    finally:
        del sys.modules["module_of_networks"]
    assert identity_of(own, (1, 6, 6)).digest == digest_of(network.state_dict(), "module_of_networks:make")
    assert plain.identity is None
    twice = Imported("twice", lambda x: 2 * plain.function(x))
    assert identity_of(plain, (1, 6, 6)) == identity_of(plain, (1, 6, 6)) != identity_of(twice, (1, 6, 6))


def test_the_real_package_gives_the_features_of_its_inception_through_our_door(tmp_path: Path):
    """Where torch-fidelity is installed; the weights are random ones."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=Exception)

    class Blank(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    torch.save({}, tmp_path / "nothing.pth")
    network = Blank(fidelity.INCEPTION, ["2048"], feature_extractor_weights_path=tmp_path / "nothing.pth")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    found = vectors_of(GREY[:2], features_named(f"Fidelity(weights='{tmp_path / 'w.pth'}')", CPU))
    torch.testing.assert_close(found, network(GREY[:2].expand(-1, 3, -1, -1))[0])
