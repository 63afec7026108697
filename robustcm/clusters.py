"""A mixture of Gaussians, fitted by expectation and maximisation, as a denoiser that needs no network.

In the ``full`` directions that vary most each cluster has a covariance of its own, in all others variances: whatever d
is, a few dozen clusters are fitted to a few thousand samples in seconds.

Axes: n = samples, j = clusters, d = principal components, the largest variance first, r = the first of them, with
covariances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 30
"""Of expectation and maximisation."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """The mixture, each cluster in its own axes: those of its covariance in the first r components, then the rest."""

    weights: Tensor
    """``[j]``, sum 1."""
    means: Tensor
    """``[j, d]``, in the common axes."""
    turns: Tensor
    """``[j, r, r]``, each cluster's axes as columns."""
    variances: Tensor
    """``[j, d]``, along each cluster's axes."""

    @staticmethod
    def fit(
        y: Tensor,
        count: int,
        generator: torch.Generator,
        *,
        full: int = 64,
        prior: float | None = None,
        on_round: Callable[[], object] = lambda: None,
    ) -> Clusters:
        """``count`` clusters of ``y [n, d]``, whose columns are uncorrelated, the largest variance first.

        Args:
            generator: CPU; chooses the samples that clusters begin at, as k-means++ does.
            full: r, at most.
            prior: samples of which the common covariance is worth in that of a cluster; None: r + 2.
            on_round: called behind each of ``ROUNDS``.
        Source: Dempster, Laird and Rubin 1977; k-means++: Arthur and Vassilvitskii 2007.
        """
        shares = torch.nn.functional.one_hot(_begun(y, count, generator), count).to(y.dtype)
        return Clusters.from_shares(y, shares, full=full, prior=prior, on_round=on_round)

    @staticmethod
    def from_shares(
        y: Tensor,
        shares: Tensor,
        *,
        rounds: int = ROUNDS,
        full: int = 64,
        prior: float | None = None,
        on_round: Callable[[], object] = lambda: None,
    ) -> Clusters:
        """The same from ``shares [n, j]``, rows of sum 1, by which each sample belongs to each cluster at first.

        Args:
            rounds: 1 or more, each a maximisation; the shares behind the last one are not used.
            full, prior, on_round: see ``fit``.
        """
        r = min(full, y.shape[1])
        prior = r + 2.0 if prior is None else prior
        for _ in range(rounds):
            found = Clusters._maximised(y, shares, r, prior)
            shares = found._log_densities(y, torch.zeros(len(y), dtype=y.dtype)).softmax(1)
            on_round()
        return found

    @staticmethod
    def _maximised(y: Tensor, shares: Tensor, r: int, prior: float) -> Clusters:
        sizes = shares.sum(0)
        own = sizes[:, None].clamp(min=1e-9)
        means = shares.T @ y / own
        scatters, squares = [], []
        for j in range(len(sizes)):
            away = y - means[j]
            scatters.append((away[:, :r] * shares[:, j, None]).T @ away[:, :r])
            squares.append(shares[:, j] @ away[:, r:].square())
        scatter, square = torch.stack(scatters), torch.stack(squares)
        common, common_squares = scatter.sum(0) / len(y), square.sum(0) / len(y)
        covariances = (scatter + prior * common) / (own[:, :, None] + prior)
        variances, turns = torch.linalg.eigh(covariances)
        others = (square + prior * common_squares) / (own + prior)
        return Clusters(sizes / len(y), means, turns, torch.cat([variances, others], 1).clamp(min=1e-12))

    def _turned(self, y: Tensor, j: int) -> Tensor:
        r = self.turns.shape[1]
        away = y - self.means[j]
        return torch.cat([away[:, :r] @ self.turns[j], away[:, r:]], 1)

    def _log_densities(self, y_t: Tensor, t: Tensor) -> Tensor:
        """``[n, j]``, of each cluster, its weight included, up to a constant."""
        out = []
        for j in range(len(self.weights)):
            spread = self.variances[j] + t[:, None] ** 2
            log_density = -0.5 * (self._turned(y_t, j).square() / spread + spread.log()).sum(1)
            out.append(log_density + self.weights[j].clamp(min=1e-30).log())
        return torch.stack(out, 1)

    def denoised(self, y_t: Tensor, t: Tensor) -> Tensor:
        """The posterior mean of the mixture: ``y_t [n, d]``, ``t [n] -> [n, d]``."""
        shares, out = self._log_densities(y_t, t).softmax(1), torch.zeros_like(y_t)
        r = self.turns.shape[1]
        for j in range(len(self.weights)):
            kept = self._turned(y_t, j) * (self.variances[j] / (self.variances[j] + t[:, None] ** 2))
            back = torch.cat([kept[:, :r] @ self.turns[j].T, kept[:, r:]], 1)
            out += shares[:, j, None] * (self.means[j] + back)
        return out


def _begun(y: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``[n]``: the nearest of ``count`` samples that lie far from each other."""
    chosen = [int(torch.randint(len(y), (), generator=generator))]
    nearest = (y - y[chosen[0]]).square().sum(1)
    owner = torch.zeros(len(y), dtype=torch.long)
    for j in range(1, count):
        if not nearest.max() > 0:  # fewer different samples than clusters
            break
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        far = (y - y[chosen[-1]]).square().sum(1)
        owner, nearest = torch.where(far < nearest, j, owner), torch.minimum(far, nearest)
    return owner
