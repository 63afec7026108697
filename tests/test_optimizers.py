"""Muon: what it does to matrices, to which weights, and that all else is Adam's to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_trainer.networks import DiT, UNet
from reference_trainer.optimizers import (
    Adam,
    Muon,
    MuonAndAdam,
    _by_squares,
    _by_steps,
    matrices,
    orthogonal,
    said_of_muon,
    step_unless,
)

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


class Blocks(nn.Module):
    """First layer, two blocks, last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 8)
        self.inside = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))])
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.inside:
            x = x + block(x)
        return self.last(x)


def gradient(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, n: int) -> Tensor:
    return torch.linalg.qr(gradient(seed, n, n))[0]


def steps(asked: Adam, n: int, lr: float = 0.01, change: Callable[[int, Blocks], None] | None = None) -> Blocks:
    """A network behind ``n`` steps of a regression."""
    network = Blocks()
    optimizer = asked.build(list(network.parameters()), network)
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    for step in range(n):
        optimizer.param_groups[0]["lr"] = lr
        (network(x) - x.flip(1).square()).square().mean().backward()
        if change is not None:
            change(step, network)
        optimizer.step()
        optimizer.zero_grad()
    return network


# --- Orthogonal ------------------------------------------------------------------------------------------------------


@given(SHAPES, st.integers(0, 99))
def test_the_singular_values_become_about_one_and_the_vectors_stay(shape: tuple[int, int], seed: int):
    rows, columns = shape
    least = min(shape)
    values = torch.linspace(1.0, 0.1, least, dtype=torch.float64)
    left, right = rotation(seed, rows)[:, :least], rotation(seed + 1, columns)[:, :least]
    after = left.mT @ orthogonal(left * values @ right.mT) @ right
    assert (after.diagonal() > 0.65).all()
    assert (after.diagonal() < 1.25).all()
    assert torch.allclose(after, after.diagonal().diag(), atol=1e-9)


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-40, 1e-20, 1.0, 1e15]))
def test_the_size_of_a_gradient_does_not_matter(shape: tuple[int, int], seed: int, size: float):
    matrix = gradient(seed, *shape)
    assert torch.allclose(orthogonal(size * matrix), orthogonal(matrix), atol=1e-9)


@given(SHAPES, st.integers(0, 99))
def test_it_turns_with_the_matrix_and_transposes_with_it(shape: tuple[int, int], seed: int):
    matrix, left, right = gradient(seed, *shape), rotation(seed + 1, shape[0]), rotation(seed + 2, shape[1])
    # of a matrix of one norm: the first division, by the largest element, is undone by the second
    assert torch.allclose(orthogonal(left @ matrix @ right), left @ orthogonal(matrix) @ right, atol=1e-6)
    assert torch.allclose(orthogonal(matrix.mT), orthogonal(matrix).mT, atol=1e-9)


def test_many_matrices_are_each_by_itself_and_nothing_stays_nothing():
    together = torch.stack([gradient(0, 4, 6), gradient(1, 4, 6), torch.zeros(4, 6, dtype=torch.float64)])
    for one, of_all in zip(together, orthogonal(together), strict=True):
        assert torch.allclose(orthogonal(one), of_all, atol=1e-12)
    assert (orthogonal(together)[2] == 0).all()


@given(st.integers(1, 8), st.integers(0, 99), st.sampled_from([1.0, 1e-3, 0.0]))
def test_both_ways_to_compute_it_are_one(rows: int, seed: int, least: float):
    """Also of a matrix one of whose singular values is small, or 0."""
    matrix = gradient(seed, rows, 4 * rows)
    matrix[0] = least * matrix[0]
    matrix = (matrix / torch.linalg.matrix_norm(matrix).clamp(min=1e-9)).float()
    assert torch.allclose(_by_squares(matrix), _by_steps(matrix), atol=2e-3)


def test_gradients_whose_squares_are_zero_in_float32_are_orthogonal_too():
    matrix = gradient(0, 4, 6).float()
    assert torch.allclose(orthogonal(1e-30 * matrix), orthogonal(matrix), atol=1e-4)


# --- Which weights ---------------------------------------------------------------------------------------------------


def test_muon_has_the_matrices_of_the_blocks_and_nothing_else():
    network = Blocks()
    own = {name for name, p in network.named_parameters() if id(p) in matrices(network)}
    assert own == {"inside.0.weight", "inside.1.0.weight", "inside.1.2.weight"}


@pytest.mark.parametrize("network", [DiT(width=16, layers=2, patch=2), UNet(attention=(False, True))])
def test_of_a_backbone_it_has_matrices_alone_but_not_the_first_and_the_last(network: DiT | UNet):
    built = network.build((4, 8, 8), 0)
    own = {name: p for name, p in built.named_parameters() if id(p) in matrices(built)}
    assert all(p.ndim == 2 for p in own.values())
    of_attention = {"to_q", "to_k", "to_v", "to_out.0"}
    expected = of_attention | ({"ff.net.0.proj", "ff.net.2"} if isinstance(network, DiT) else {"time_emb_proj"})
    assert {ending for ending in expected if any(name.endswith(f"{ending}.weight") for name in own)} == expected
    assert all(name.removesuffix(".weight").endswith(tuple(expected)) for name in own)


def test_a_matrix_that_is_used_outside_the_blocks_too_is_adams():
    network = Blocks()
    last = nn.Linear(8, 8)
    last.weight = network.inside[0].weight
    network.last = last
    assert id(last.weight) not in matrices(network)
    assert len(matrices(network)) == 2


def test_a_run_says_how_much_muon_moves():
    assert said_of_muon(Blocks()) == "Muon moves 3 matrices, 78% of the weights; AdamW moves the others"
    assert "nothing to move" in said_of_muon(nn.Sequential(nn.Linear(3, 3)))


def test_weights_that_are_not_the_networks_are_no_weights_for_muon():
    with pytest.raises(AssertionError, match="another network"):
        Muon().build(list(Blocks().parameters()), Blocks())


def test_what_is_outside_is_adams_to_the_bit():
    """One step: in the next the gradients differ, since the matrices do."""
    adam, muon = steps(Adam(weight_decay=0.1, eps=1e-8), 1), steps(Muon(weight_decay=0.1), 1)
    inside = matrices(muon)
    for (name, p), q in zip(muon.named_parameters(), adam.parameters(), strict=True):
        assert torch.equal(p, q) != (id(p) in inside), name


# --- Its step --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has none")
def test_it_does_as_torchs_own():
    """That one computes in bfloat16: to three digits."""
    first = gradient(0, 8, 6).float()
    weights = [nn.Parameter(first.clone()), nn.Parameter(first.clone())]
    lr, decay = 0.1, 0.3
    theirs = torch.optim.Muon(
        weights[:1], lr=lr, weight_decay=decay, momentum=0.9, adjust_lr_fn="original", nesterov=True
    )
    ours = MuonAndAdam(weights[1:], [True], momentum=0.9, size=1.0, weight_decay=decay)
    ours.param_groups[0]["lr"] = lr
    for step in range(5):
        for weight in weights:
            weight.grad = gradient(step + 1, 8, 6).float()
        theirs.step()
        ours.step()
    assert torch.allclose(weights[0], weights[1], atol=5e-3)
    assert not torch.allclose(first, weights[1], atol=0.1)


@pytest.mark.parametrize(("shape", "times"), [((8, 8), 1), ((4, 16), 1), ((16, 4), 2)])
def test_an_update_has_the_size_asked_for(shape: tuple[int, int], times: float):
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = MuonAndAdam([weight], [True], momentum=0.0, size=5.0)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = 1e-6 * gradient(0, *shape).float()
    optimizer.step()
    assert 0.5 * times * 0.65 < torch.linalg.matrix_norm(weight, 2) < 0.5 * times * 1.25


def test_a_weight_without_a_gradient_stays():
    def leave_out(_: int, network: Blocks) -> None:
        first = network.inside[0]
        assert isinstance(first, nn.Linear)
        first.weight.grad = None

    after, before = steps(Muon(), 3, change=leave_out), Blocks()
    assert torch.equal(after.inside[0].weight, before.inside[0].weight)
    assert not torch.equal(after.inside[0].bias, before.inside[0].bias)


def test_gradients_are_there_behind_a_step():
    network = Blocks()
    optimizer = Muon().build(list(network.parameters()), network)
    network(torch.ones(1, 3)).sum().backward()
    before = [p.grad for p in network.parameters()]
    optimizer.step()
    assert all(p.grad is gradient for p, gradient in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_changes_nothing_the_first_neither(bad: float):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = MuonAndAdam([weight], [True], momentum=0.9, size=1.0)
    optimizer.param_groups[0]["lr"] = 1.0
    for step in range(3):
        before = weight.clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
        weight.grad = torch.full((4, 4), bad)
        step_unless(torch.tensor(True), optimizer)
        assert torch.equal(weight, before[0])
        assert (optimizer.state[weight]["momentum"] == before[1].get("momentum", 0.0)).all()
        weight.grad = gradient(step, 4, 4).float()
        step_unless(torch.tensor(False), optimizer)
        assert not torch.equal(weight, before[0])


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan, math.inf])
def test_an_average_that_never_forgets_is_refused(momentum: float):
    with pytest.raises(ValueError, match="momentum must be in"):
        Muon(momentum=momentum)
