"""Weights cut into shards, one a process, by torch's FSDP2: for networks that do not fit on one GPU.

What a step does to weights, averages and moments it does to each rank's own shards, plain tensors; whole they are only
a block at a time, while the network computes, and tensor by tensor in a checkpoint, which is that of any run.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from reference_trainer.errors import UserError
from reference_trainer.networks import blocks
from reference_trainer.optimizers import Adam, Muon
from reference_trainer.ranks import Ranks
from robustcm.flow_maps import FlowMapObjective
from robustcm.flow_targets import Derivative
from robustcm.objective import FewStepObjective

ROWS = (Shard(0),)
"""Each tensor is cut along its first axis; of one with fewer rows than processes some hold none."""


@dataclass(frozen=True)
class Sharding:
    """How the ranks hold a network between them."""

    ranks: Ranks
    mesh: DeviceMesh

    @staticmethod
    def over(ranks: Ranks, device: torch.device) -> Sharding:
        """All ranks, with ``device`` for their own. All call it."""
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where the mesh is taken to be
        return Sharding(ranks, init_device_mesh(device.type, (ranks.world,)))

    def cut(self, network: nn.Module) -> None:
        """Cut ``network``, which is whole and the same on all ranks, in its place and onto the ranks' devices."""
        # Of outputs that are views of others: nobody writes into what a network returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for module in (*blocks(network), network):
            fully_shard(module, mesh=self.mesh)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # a sum over the parts, not a mean
            module.set_force_sum_reduction_for_comms(True)

    def shards(self, network: nn.Module) -> list[Tensor]:
        """Of each weight what is on this rank, a weight by itself in the same memory."""
        return [nn.Parameter(shard_of(p).detach(), requires_grad=p.requires_grad) for p in network.parameters()]

    def take_gradients(self, network: nn.Module, shards: list[Tensor]) -> None:
        """Give ``shards`` of ``network`` the gradients that backward has added up over the ranks and cut."""
        for p, shard in zip(network.parameters(), shards, strict=True):
            shard.grad = None if p.grad is None else shard_of(p.grad)
            p.grad = None

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Of what the ranks' shards ``gradients`` are cut of, 0-dim, the same bits on all of them."""
        squared = torch.nn.utils.get_total_norm(gradients).square()
        self.ranks.add_up([squared])
        return squared.sqrt()

    def all(self, flag: Tensor) -> Tensor:
        """Whether ``flag`` (0-dim bool) is true on all ranks; nobody waits for the device."""
        against = (~flag).float()
        self.ranks.add_up([against])
        return against == 0

    @torch.no_grad()
    def joined(self, own: Tensor, like: Tensor) -> Tensor:
        """The tensor of which each rank has its ``own`` shard, with the shape of ``like``."""
        return DTensor.from_local(own, self.mesh, ROWS, shape=like.shape, stride=like.stride())

    @torch.no_grad()
    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard of a tensor that all ranks have, in memory of its own."""
        return distribute_tensor(whole, self.mesh, ROWS, src_data_rank=None).to_local().clone()

    @torch.no_grad()
    def put(self, into: Tensor, whole: Tensor) -> None:
        """Copy ``whole``, which all ranks have, to where ``into`` lies."""
        shard_of(into).copy_(self.own(whole) if isinstance(into, DTensor) else whole)

    @torch.no_grad()
    def gathered(self, tensor: Tensor) -> Tensor:
        """``tensor``; of one that is cut the whole on the CPU, for the leading rank: the others get an empty one.

        All ranks call it.
        """
        if not isinstance(tensor, DTensor):
            return tensor
        whole = tensor.full_tensor()
        return whole.cpu() if self.ranks.leads else whole.new_empty(0)

    @torch.no_grad()
    def whole(self, network: nn.Module, like: nn.Module) -> nn.Module:
        """``like`` with the weights of ``network``, whole, on every rank. All call it."""
        tensors = network.state_dict()
        for name, into in like.state_dict().items():
            tensor = tensors[name]
            into.copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        return like


def require_shardable(objective: FewStepObjective, optimizer: Adam, micro_batches: int, ranks: Ranks) -> None:
    """Refuse what cannot be trained in shards.

    Raises:
        UserError: one process; micro-batches that are not the same number for each; an objective that differentiates
            the network forwards; an optimizer that needs whole matrices.
    """
    if ranks.world == 1:
        raise UserError("--sharded needs several processes: start it with torchrun, or leave it out")
    if micro_batches % ranks.world:  # each forward and backward is one of all ranks
        raise UserError(
            f"--sharded needs as many micro-batches for each of {ranks.world} processes: set micro_batches to a "
            f"multiple of {ranks.world}, got {micro_batches}"
        )
    if isinstance(objective, FlowMapObjective) and isinstance(objective.target, Derivative):
        raise UserError(
            "objective.target=Derivative() differentiates the network forwards, which FSDP2 has no means for: leave "
            "--sharded out, or take objective.target=TwoPoint()"
        )
    if isinstance(optimizer, Muon):
        raise UserError(
            "optimizer=Muon() needs whole matrices, which --sharded cuts: leave --sharded out, or take "
            "optimizer='Adam(eps=1e-8)'"
        )


def shard_of(tensor: Tensor) -> Tensor:
    """What of ``tensor`` is on this rank: of one that is cut its shard, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
