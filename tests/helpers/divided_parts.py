"""What the processes of a job do in tests of the parts of a model and of a state that they hold."""

import torch
from fsdp_job import Net
from torch.distributed.fsdp import fully_shard

from lightning_odem.parameters.divided_state import DividedState
from lightning_odem.parameters.owners import Owners
from lightning_odem.parameters.vector import ParameterVector


def exchange():
    """Whether vectors come back as they were, and which whole parameters the processes own."""
    net = Net(1)
    reference = dict(net.named_parameters())
    reference = {name: tensor.detach().clone() for name, tensor in reference.items()}
    fully_shard(net)
    vector = ParameterVector(net)
    found = {}
    for case, held in {"": (), "held": [{"scale"}, {"embed.weight", "scale"}]}.items():
        owners = Owners(vector.shards, vector.names, held)
        owned = owners.collect(vector.read())
        expected = [reference[name].flatten() for name in owners.mine]
        found[case] = {
            "mine": owners.mine,
            "length": len(owned),
            "whole": torch.equal(owned, torch.cat(expected)),
            "back": torch.equal(owners.distribute(owned), vector.read()),
        }
    return found


def join():
    """What each process has of a state whose parts differ, what it keeps, and what the first one gathers."""
    net = Net(1)
    whole = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    fully_shard(net)
    shards = ParameterVector(net).shards
    rank, last = shards.rank, shards.size - 1
    own = {
        "shards": {name: shards.part(name, tensor) for name, tensor in whole.items()},
        "loaded": dict(whole),
        "factors": [{f"matrix:{rank}": (torch.full((2, 1), float(rank)), torch.ones(0))}, {}],
        "sum": torch.tensor(2.5),
        "scale": 0.25,  # a parameter is called so
        "shares": [0.5, 0.5],
        "name": "rule",
    }
    if rank == 0:
        own["half"] = torch.ones(2, dtype=torch.bfloat16)
    if rank == last:
        own = {**own, "moments": {"a/embed.weight": torch.arange(3.0)}, "count": 3}
    state = DividedState(shards, own)
    empty = DividedState(shards, own if rank == last else {})
    return {
        "whole": whole,
        "keys": state.keys,
        "gathered": state.gather(),
        "mine": state.own(lambda key: key == f"matrix:{rank}"),
        "first lacks all": empty.own(lambda key: True),
    }
