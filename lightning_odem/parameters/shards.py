"""Parameters that several processes share with FSDP2, cut along their first dimension."""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_odem.parameters.processes import Processes


class Shards:
    """How the processes of a job share parameters: each holds some consecutive rows of every parameter, its shard.

    Rows are entries along the first dimension. Each process has an equal number of rows, rounded up. The last processes
    have what is left, perhaps none.

    Args:
        tensors: The parameters by name, cut in this way over all processes, see :func:`find_shards`.

    Attributes:
        shapes: Shapes of the whole parameters by name.
        local_shapes: Shapes of this process's shards.
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self, tensors: Mapping[str, DTensor]) -> None:
        self._processes = Processes.current()
        self.rank, self.size = self._processes.rank, self._processes.size
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.local_shapes = {name: local(tensor).shape for name, tensor in tensors.items()}
        # The device of the processes' group: sharded parameters may be kept on the CPU between passes.
        self._device = torch.device(next(iter(tensors.values())).device_mesh.device_type)

    def sum_(self, numbers: Tensor) -> None:
        """Sum numbers over the processes in place, with the same bits in each; all processes have to call it."""
        numbers.copy_(self._processes.sum_(numbers.to(self._device)))

    def exchange(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send consecutive pieces of a flat tensor to the processes, see :meth:`Processes.exchange`."""
        return self._processes.exchange(tensor.to(self._device), sent, received).to(tensor.device)

    def share(self, value: Any) -> list[Any]:
        """What each process gives, in their order; plain containers without large tensors. All have to call it."""
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self.sum_(sizes)
        found = torch.zeros(int(sizes.sum()), dtype=torch.uint8)
        pieces = found.split(sizes.tolist())
        pieces[self.rank].copy_(data)
        self.sum_(found)
        return [pickle.loads(piece.numpy().tobytes()) for piece in pieces]

    def bring(self, tensor: Tensor | None, holder: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Bring a tensor that one process holds to the first one. All processes have to call it.

        Returns:
            The tensor on the CPU in the first process, None in the others.
        """
        if holder == 0 or 0 in shape:
            return (torch.empty(tuple(shape), dtype=dtype) if tensor is None else tensor) if self.rank == 0 else None
        if self.rank == holder:
            assert tensor is not None, "held here"
            dist.send(tensor.to(self._device).contiguous(), 0)
        if self.rank != 0:
            return None
        received = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        dist.recv(received, holder)
        return received.cpu()

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This process's shard of a whole parameter, in its memory; any other tensor is returned itself."""
        if tensor.shape != self.shapes.get(name):
            return tensor
        rows = self._rows(name)
        return tensor[self.rank * rows : (self.rank + 1) * rows]

    def whole_shape(self, name: str, tensor: Tensor) -> torch.Size:
        """Shape of the whole parameter if a tensor is this process's shard of it; else the shape of the tensor."""
        return self.shapes[name] if tensor.shape == self.local_shapes.get(name) else tensor.shape

    def gather(self, name: str, tensor: Tensor) -> Tensor | None:
        """Gather the whole tensor of a shard; others are returned themselves. All processes have to call it.

        Returns:
            The tensor on the CPU in the first process, None in the others.
        """
        if name not in self.shapes:
            return tensor if self.rank == 0 else None
        total = self.shapes[name][0]
        padded = tensor.new_zeros(self._rows(name), *tensor.shape[1:], device=self._device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts)
        return None if parts is None else torch.cat(parts)[:total].cpu()

    def first_row(self, name: str) -> int:
        """The row of the whole parameter with which this process's shard begins."""
        return min(self.rank * self._rows(name), self.shapes[name][0])

    def size_of(self, name: str, rank: int) -> int:
        """Number of entries in the shard of a process."""
        total, rows = self.shapes[name][0], self._rows(name)
        return max(min(total - rank * rows, rows), 0) * self.shapes[name][1:].numel()

    def _rows(self, name: str) -> int:
        """Rows of a shard, except the last ones."""
        return -(-self.shapes[name][0] // self.size)


def find_shards(named: Mapping[str, Tensor]) -> Shards | None:
    """Find how the processes share the DTensors among the tensors; None if there are none.

    Raises:
        ValueError: If one of them is not cut along its first dimension over all processes, as ``fully_shard`` cuts on a
            mesh of one dimension. Examples are tensor parallelism and hybrid sharding.
    """
    sharded = {name: tensor for name, tensor in named.items() if isinstance(tensor, DTensor)}
    for name, tensor in sharded.items():
        ranks = tensor.device_mesh.mesh.tolist()
        if tensor.placements != (Shard(0),) or ranks != list(range(dist.get_world_size())):
            raise ValueError(
                f"{name} has the placements {tensor.placements} on the processes {ranks} of {dist.get_world_size()}. "
                "Shards can be merged where fully_shard cuts parameters along their first dimension over a mesh of all "
                "processes, without tensor parallelism (tensor_parallel_size=1) and replicas. Otherwise merge saved "
                "checkpoints."
            )
    return Shards(sharded) if sharded else None


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, in its memory; any other tensor is returned itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def reshard(module: nn.Module) -> None:
    """Make FSDP2 drop whole parameters: after a forward pass without backward a module may still have them.

    They take the place of the shards, so the next pass would not see what was written to the shards.
    """
    if not dist.is_initialized():  # asked for often
        return
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def weights_checkpoint(trainer: L.Trainer) -> dict[str, Any]:
    """Make a checkpoint of the weights without the optimizer. Shared weights are whole in the first process.

    All processes have to call it.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    module = trainer.lightning_module
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        # here, since it brings a hundred modules that only shards need
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        checkpoint["state_dict"] = get_model_state_dict(module, options=options)
    return checkpoint


def divisors(module: nn.Module) -> dict[Tensor, float]:
    """The number by which FSDP2 divides the sum of a parameter's gradients, if it is not the number of processes."""
    groups = [
        group
        for submodule in module.modules()
        if isinstance(submodule, FSDPModule)
        for group in getattr(submodule._get_fsdp_state(), "_fsdp_param_groups", ())
        if group.gradient_divide_factor is not None
    ]
    return {held.sharded_param: group.gradient_divide_factor for group in groups for held in group.fsdp_params}


@torch.no_grad()
def copy_from_first_process(module: nn.Module) -> None:
    """Give every process the same module to the last bit; shards are each process's own.

    Each process has batch-norm statistics of its own after the last step, and its kernels may round differently.
    """
    processes = Processes.current()
    if processes.size > 1:
        reshard(module)
        whole = [parameter for parameter in module.parameters() if local(parameter) is parameter]
        for tensor in (*whole, *module.buffers()):
            # Channels-last weights are not contiguous.
            tensor.copy_(processes.broadcast_(tensor.contiguous()))
