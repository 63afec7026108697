"""Each example trains, marks its few lines of ours, and is a whole trainer without them."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import robustcm
from robustcm.losses import sample_r2

FOLDER = Path(__file__).parents[1] / "examples"
FILES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
OURS = "# robustcm"
NEEDS = {"diffusers_accelerate": ("diffusers", "accelerate"), "lightning_module": ("lightning",)}
NOISIEST_OF_THE_GATE = {"bare_loop": 80.0, "flow_matching": 0.0}


class Expected(NamedTuple):
    steps: int
    falls_to: float
    """The mean of the last fifth of what main returns, as a share of that of the first fifth: at most this."""
    noisiest: float | None
    """The t of pure noise, where depth is 0; None: no axis."""
    cleanest: float | None = None
    num_levels: frozenset[int] = frozenset({2})


EXPECTED = {
    "bare_loop": Expected(250, 0.8, None, num_levels=frozenset({11, 21})),
    "diffusers_accelerate": Expected(24, 0.7, 999, 0),
    "flow_matching": Expected(200, 0.85, 0, 1),
    "latent_consistency_distillation": Expected(100, 0.5, 999, 0),
    "lightning_module": Expected(80, 0.75, 80.0, 0.002),
    "lora_huber": Expected(100, 0.5, 999, 0),
    "mean_flow": Expected(100, 0.9, 1, 0),
}
each = pytest.mark.parametrize("name", EXPECTED)


def skip_unless_installed(name: str) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"examples/{name}.py needs {package}: pip install -e '.[examples]'")


def load(name: str) -> ModuleType:
    skip_unless_installed(name)
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_lines(source: str) -> list[str]:
    marked = [line.strip() for line in source.splitlines() if line.endswith(OURS)]
    return [line for line in marked if not line.startswith(("from ", "import "))]


def without_ours(source: str) -> str:
    """The trainer as it was before."""
    kept = (line for line in source.splitlines() if not line.endswith(OURS))
    return "\n".join(re.sub(r"^(\s*)# was: ", r"\1", line) for line in kept)


class Watched(robustcm.RobustLoss):
    """Remembers what it was asked."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.asked: list[tuple[Tensor, Tensor | None, int]] = []
        self.closed: list[bool] = []

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        t: Tensor | None = None,
        num_levels: int | None = None,
        weight: Tensor | None = None,
        closes: bool | None = None,
    ) -> Tensor:
        self.asked.append((sample_r2(student.detach(), teacher).sqrt(), t, num_levels or 2))
        self.closed.append(closes is not False)
        return super().forward(student, teacher, t, num_levels, weight, closes)


class Run(NamedTuple):
    errors: list[float]
    robust: Watched
    couplings: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    """x, z, t and what came back."""
    accelerators: list[Any]


@pytest.fixture(scope="module")
def run() -> Callable[[str], Run]:
    """``run(name)``: the example with its loss and its coupling watched; each runs once."""
    runs: dict[str, Run] = {}

    def runner(name: str) -> Run:
        if name not in runs:
            module, losses, couplings, accelerators = load(name), [], [], []

            def loss(*args: Any, **given: Any) -> Watched:
                losses.append(Watched(*args, **given))
                return losses[-1]

            def coupled(x: Tensor, z: Tensor, t: Tensor, **given: Any) -> Tensor:
                couplings.append((x, z, t, robustcm.coupled_noise(x, z, t, **given)))
                return couplings[-1][3]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "RobustLoss", loss)
                if hasattr(module, "coupled_noise"):
                    patch.setattr(module, "coupled_noise", coupled)
                if hasattr(module, "Accelerator"):
                    made = module.Accelerator
                    patch.setattr(module, "Accelerator", lambda **g: accelerators.append(made(**g)) or accelerators[0])
                errors = module.main(steps=EXPECTED[name].steps)
            assert len(losses) == 1
            runs[name] = Run(errors, losses[0], couplings, accelerators)
        return runs[name]

    return runner


def test_no_example_is_left_out():
    assert set(EXPECTED) == set(FILES)


@each
def test_trains(run, name):
    errors = run(name).errors
    fifth = len(errors) // 5
    assert all(map(math.isfinite, errors))
    assert sum(errors[-fifth:]) < EXPECTED[name].falls_to * sum(errors[:fifth])


@each
def test_a_seed_says_all(name):
    main = load(name).main
    first = main(steps=3)
    assert first == main(steps=3)
    assert first != main(steps=3, seed=1)


@each
def test_the_scale_is_that_of_the_residuals_counted_once_an_optimizer_step(run, name):
    robust = run(name).robust
    ends = [i + 1 for i, closed in enumerate(robust.closed) if closed]
    steps = [robust.asked[i:j] for i, j in pairwise([0, *ends])]
    assert len(robust.asked) == len(run(name).errors)
    assert len(steps) == EXPECTED[name].steps
    assert {num_levels for _, _, num_levels in robust.asked} == EXPECTED[name].num_levels
    values, weights = [], []
    for age, step in enumerate(reversed(steps)):
        for r, _, num_levels in step:
            values.append(r.double() * (num_levels - 1))
            weights.append(torch.full_like(values[-1], 0.5 ** (age / robust.c.halflife_steps)))
    counts = robust.state[:, :-1].sum(0, keepdim=True)
    torch.testing.assert_close(counts.sum(), torch.cat(weights).sum())
    ordered, of_value = torch.cat(values).sort()
    share = torch.cat(weights)[of_value].cumsum(0)
    median = ordered[torch.searchsorted(share, 0.5 * share[-1])]
    torch.testing.assert_close(robust.c.histogram.quantile(counts, 0.5)[0], median, rtol=0.03, atol=0)


@each
def test_depth_is_0_at_pure_noise_and_1_at_the_data(run, name):
    robust, expected = run(name).robust, EXPECTED[name]
    if expected.noisiest is None or expected.cleanest is None:
        assert robust.axis is None
        return
    ends = robust.axis(torch.tensor([float(expected.noisiest), float(expected.cleanest)]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    asked = torch.cat([robust.axis(t.float()) for _, t, _ in robust.asked])
    assert ((asked >= -0.2) & (asked <= 1.2)).all()  # EDM's lognormal has a little outside of sigma's range
    assert asked.quantile(0.9) - asked.quantile(0.1) > 0.2  # the levels of the samples, not one for all
    assert (robust.state[:, :-1].sum(1) > 0).sum() > 1


@pytest.mark.parametrize("name", NOISIEST_OF_THE_GATE)
def test_the_noise_is_coupled_at_every_step_above_the_gate(run, name):
    found, noisiest = run(name), NOISIEST_OF_THE_GATE[name]
    assert len(found.couplings) == EXPECTED[name].steps
    for x, z, t, taken in found.couplings:
        above = t > 1 if noisiest else t < 0.5
        assert torch.equal(taken[~above], z[~above])
        assert ((taken - x)[above].square().sum() < (z - x)[above].square().sum()).item()
        assert (x.norm(dim=1) - 0.7).abs().max() < 0.2  # the data: a ring of modes
    levels = torch.cat([t for _, _, t, _ in found.couplings])  # the student's, so the largest is among them
    assert abs(levels - noisiest).min() < 1e-3 * max(noisiest, 1)
    if found.robust.axis is not None:  # one t for both, each on its own axis
        for (_, _, t, _), (_, asked, _) in zip(found.couplings, found.robust.asked, strict=True):
            assert torch.equal(t, asked)


@each
def test_at_most_six_lines_are_ours(name):
    lines = our_lines(FILES[name])
    assert 2 <= len(lines) <= 6
    assert any(".mean()" in line for line in lines)


@each
def test_without_our_lines_it_is_a_whole_trainer(name):
    before = without_ours(FILES[name])
    names = {node.id for node in ast.walk(ast.parse(before)) if isinstance(node, ast.Name)}
    assert not names & set(robustcm.__all__)
    assert "import robustcm" not in before
    assert "from robustcm" not in before
    skip_unless_installed(name)
    plain: dict[str, Any] = {"__name__": "before"}
    exec(compile(before, f"{name} without our lines", "exec"), plain)
    assert all(map(math.isfinite, plain["main"](steps=2)))


@each
def test_what_was_replaced_is_shown_above_the_loss(name):
    lines = FILES[name].splitlines()
    (loss,) = (i for i, line in enumerate(lines) if line.endswith(OURS) and "loss = " in line)
    assert lines[loss - 1].lstrip().startswith("# was: loss = ")


def test_the_bare_loop_has_40_lines():
    code = re.sub(r'""".*?"""', "", FILES["bare_loop"], flags=re.DOTALL).splitlines()
    inside = [line for line in code if line.startswith(" ") and not line.lstrip().startswith("#")]
    assert len(inside) <= 40


@each
def test_runs_as_a_script(name):
    assert FILES[name].endswith('\n\nif __name__ == "__main__":\n    main()\n')


def test_the_table_has_each_file_and_counts_its_lines():
    rows = re.findall(r"^\| \[(\w+)\.py\]\((\w+)\.py\) \|[^|]+\| (\d+) \|", (FOLDER / "README.md").read_text(), re.M)
    assert {name: int(count) for name, _, count in rows} == {n: len(our_lines(source)) for n, source in FILES.items()}
    assert all(name == link for name, link, _ in rows)


def test_lightning_checkpoints_carry_the_scale(tmp_path):
    module = load("lightning_module")
    torch.manual_seed(0)
    trained, trainer = module.Denoising(), module.trainer(3)
    trainer.fit(trained, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(module.latents(96)), batch_size=32))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = module.Denoising.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    assert trained.robust.state[:, :-1].sum() > 0
    assert torch.equal(loaded.robust.state, trained.robust.state)
    x, sigma = module.latents(8), torch.ones(8)
    torch.testing.assert_close(loaded.robust(x, 0 * x, sigma), trained.robust(x, 0 * x, sigma), rtol=0, atol=0)


def test_accelerate_checkpoints_carry_the_scale(run, tmp_path):
    (accelerator,), robust = run("diffusers_accelerate").accelerators, run("diffusers_accelerate").robust
    before = {name: value.clone() for name, value in robust.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    for value in robust.buffers():
        value.zero_()
    accelerator.load_state(str(tmp_path))
    assert before["state"].sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in robust.state_dict().items())
