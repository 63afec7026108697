"""How the network is computed is chosen by device and said; whatever is chosen, it trains the same function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference_trainer.computing import Computing, Passes
from reference_trainer.config import TrainConfig
from reference_trainer.errors import UserError
from reference_trainer.networks import DiT, UNet
from reference_trainer.options import override
from reference_trainer.presets import digits, flow_map
from reference_trainer.pretrained import Denoising
from reference_trainer.run import COMPUTING, RunFolder
from reference_trainer.training.start import say_how_it_computes
from reference_trainer.training.state import TrainState
from robustcm.flow_targets import Derivative
from robustcm.gates import Above
from robustcm.objective import draw

CPU = torch.device("cpu")
SHAPE = (2, 8, 8)
TRANSFORMER = DiT(width=16, layers=2, heads=2, patch=2, dropout=0.2)
CONVOLUTIONS = UNet(block_out_channels=(8, 16), attention=(False, True), norm_num_groups=4, dropout=0.2, patch=2)


def configured(network: DiT | UNet, **computing: Any) -> TrainConfig:
    config = digits()
    objective = replace(config.objective, gate=Above(1.0), teacher_input=None)
    return replace(config, network=network, objective=objective, computing=Computing(**computing), batch_size=8)


def meanflow(config: TrainConfig) -> TrainConfig:
    """With the target that is a derivative, taken forwards."""
    objective = replace(flow_map().objective, target=Derivative(), gate=Above(1.0))
    return replace(config, objective=objective, network=replace(config.network, dropout=0.0))


def step(config: TrainConfig) -> tuple[Tensor, Tensor, TrainState]:
    """Loss and gradient of one step from weights that are not those of the start, where nothing depends on anything."""
    state = TrainState.create(config, SHAPE, CPU)
    numbers = torch.Generator().manual_seed(1)
    for weight in state.weights:
        weight.data += 0.05 * torch.randn(weight.shape, generator=numbers)
    passes = config.computing.on(CPU)
    f = config.preconditioned(passes.of(state.network.train()))
    x = 0.5 * torch.randn(8, *SHAPE, generator=numbers)
    batch = config.objective.prepare(x, draw(0, 0, x.shape), 10, 100)
    torch.manual_seed(2)
    terms = config.objective(f, batch, state.c)
    passes.backward(terms.loss)
    assert all(tensor.dtype == torch.float32 for tensor in (*state.weights, *state.gradients(), terms.student, terms.r))
    return terms.loss.detach(), torch.cat([g.flatten() for g in state.gradients()]), state


Stepped = tuple[Tensor, Tensor, TrainState]


def assert_alike(one: Stepped, two: Stepped, share: float) -> None:
    """Loss and gradient to ``share`` of their size."""
    (loss, gradient, _), (other_loss, other, _) = one, two
    assert abs(loss - other_loss) <= share * abs(loss)
    assert (gradient - other).norm() <= share * gradient.norm()
    assert gradient.norm() > 0


@pytest.mark.parametrize(
    ("asked", "kind", "capability", "computed"),
    [
        ("auto", "cpu", None, "float32"),
        ("auto", "mps", None, "float32"),
        ("auto", "cuda", (7, 5), "float32"),
        ("auto", "cuda", (8, 0), "bfloat16"),
        ("auto", "cuda", (12, 0), "bfloat16"),
        ("tf32", "cuda", (9, 0), "tf32"),
        ("tf32", "cuda", (7, 5), "float32"),
        ("tf32", "cpu", None, "float32"),
        ("float32", "cuda", (9, 0), "float32"),
        ("bfloat16", "cpu", None, "bfloat16"),
    ],
)
def test_the_precision_is_what_was_asked_for_or_the_fastest_measured(asked, kind, capability, computed):
    passes = Computing(precision=asked).decided(kind, "a device", capability)
    assert passes.precision == computed
    said = str(passes)
    assert f"in {computed} on a device: " in said
    assert "\n" not in said
    assert ("as asked" in said) == (asked == computed)


def test_a_network_whose_rounding_grows_is_computed_in_float32_unless_asked():
    assert Denoising.rounding_grows
    for asked, computed in (("auto", "float32"), ("bfloat16", "bfloat16"), ("tf32", "tf32")):
        passes = Computing(precision=asked).decided("cuda", "a device", (9, 0), grows=True)
        assert passes.precision == computed
    assert "rounding" in str(Computing().decided("cuda", "a device", (9, 0), grows=True))


def test_on_a_cpu_training_calls_the_network_itself():
    network = nn.Linear(2, 2)
    assert Computing().on(CPU).of(network) is network


@pytest.mark.parametrize("network", [TRANSFORMER, CONVOLUTIONS], ids=["transformer", "convolutions"])
def test_checkpointing_changes_neither_loss_nor_gradient(network):
    checkpointed = step(configured(network, checkpointing=True))
    assert_alike(step(configured(network)), checkpointed, 1e-6)
    state = checkpointed[2]
    assert state.network.network.is_gradient_checkpointing
    assert not state.ema.network.is_gradient_checkpointing


def saved_for_backward(config: TrainConfig) -> int:
    """Elements that a pass forwards keeps for the way back, weights aside."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step(config)
    return kept


def test_checkpointing_keeps_less():
    deep = replace(TRANSFORMER, layers=6)
    assert saved_for_backward(configured(deep, checkpointing=True)) < 0.5 * saved_for_backward(configured(deep))


@pytest.mark.parametrize("objective", [lambda config: config, meanflow], ids=["consistency", "derivative"])
@pytest.mark.parametrize("network", [TRANSFORMER, replace(CONVOLUTIONS, attention=(False, False))], ids=["dit", "unet"])
def test_in_bfloat16_a_step_is_that_in_float32_to_its_rounding(network, objective):
    """Weights, residuals and gradients stay float32, see ``step``."""
    plain, half = (step(objective(configured(network, precision=named))) for named in ("float32", "bfloat16"))
    assert_alike(plain, half, 0.1)
    assert plain[0] != half[0]


def inputs_of_convolutions(config: TrainConfig) -> list[Tensor]:
    state = TrainState.create(config, SHAPE, CPU)
    f, seen = config.computing.on(CPU).of(state.network), list[Tensor]()
    for module in state.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    f(torch.randn(3, *SHAPE), torch.ones(3))
    return seen


def test_channels_last_reaches_every_convolution_and_changes_no_number():
    without = replace(CONVOLUTIONS, dropout=0.0)  # which draws its masks in the order of the memory
    plain, last = configured(without), configured(without, channels_last=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs_of_convolutions(last))
    assert not all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs_of_convolutions(plain))
    stepped = step(last)
    assert_alike(step(plain), stepped, 1e-4)
    assert all(
        weight.is_contiguous() for weight in stepped[2].weights
    )  # as the optimizer's state, the averages, the file


def compile_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of inductor, which takes minutes to write C++ for the same graph."""
    whole = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, *, dynamic, options: whole(self, dynamic=dynamic, backend=backend)
    )


def test_compiled_a_step_is_the_same_and_its_state_has_the_same_names(monkeypatch):
    """Dropout's masks, shared by student and teacher, among it."""
    graphs: list[Any] = []
    compile_by(lambda graph, inputs: graphs.append(graph) or graph, monkeypatch)
    small = replace(TRANSFORMER, layers=1)
    plain, compiled = step(configured(small)), step(configured(small, compile=True))
    assert_alike(plain, compiled, 1e-5)
    assert len(graphs) >= 2  # with and without a gradient
    assert list(compiled[2].tensors()) == list(plain[2].tensors())


def test_what_cannot_be_compiled_is_said_in_one_line(monkeypatch):
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nand a trace")

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    compile_by(broken, monkeypatch)
    f = Computing(compile=True).on(CPU).of(Twice())
    with pytest.raises(UserError, match=r"computing.compile=True: .*no compiler and a trace.*leave it out") as refused:
        f(torch.ones(1, 2))
    assert "\n" not in str(refused.value)


def test_channels_last_is_of_convolutions():
    with pytest.raises(UserError, match=r"computing.channels_last.*network=UNet"):
        override(digits(), "computing.channels_last=True")


def test_a_network_without_blocks_is_not_checkpointed():
    with pytest.raises(UserError, match=r"computing.checkpointing"):
        Computing(checkpointing=True).on(CPU).of(nn.Linear(2, 2))


GPU = Passes(Computing(), "bfloat16", "cuda", "a GPU", "the fastest")
PROCESSOR = replace(GPU, precision="float32", kind="cpu", device="a CPU")


def starts(run: RunFolder, *parts: tuple[Passes, int]) -> list[tuple[int, str]]:
    for passes, begun in parts:
        say_how_it_computes(passes, run, begun, 100)
    return [(row["step"], row["precision"]) for row in run.rows(COMPUTING)]


def test_a_run_keeps_where_it_was_computed_and_says_a_change(tmp_path, capsys):
    run = RunFolder(tmp_path)
    assert starts(run, (GPU, 0), (GPU, 20)) == [(0, "bfloat16")]
    assert "bit for bit" not in capsys.readouterr().out
    assert starts(run, (PROCESSOR, 40)) == [(0, "bfloat16"), (40, "float32")]
    said = capsys.readouterr().out
    assert "computed in float32 on a CPU" in said
    assert "up to step 40 it was device a GPU, precision bfloat16: " in said
    assert starts(run, (GPU, 40)) == [(0, "bfloat16")]  # nothing was saved of what the CPU did
    assert starts(run, (PROCESSOR, 100)) == [(0, "bfloat16")]  # complete


def test_switches_of_torch_are_put_back(monkeypatch):
    """Else a sample would not be what it is without training before it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    seen: list[tuple[bool, bool]] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            seen.append((matmul.allow_tf32, cudnn.allow_tf32))
            return x

    before = matmul.allow_tf32, cudnn.allow_tf32
    for precision in ("float32", "tf32"):
        passes = Computing(precision=precision).decided("cuda", "a GPU", (9, 0))
        passes.of(Looks())(torch.ones(2, 1), torch.ones(2))
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    assert seen == [(False, False), (True, True)]
