"""Two processes of a group, one of which is killed: run as a script, ``killed_rank.py STORE RANK VICTIM WHERE``."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from lightning_odem.parameters import heartbeat, processes

heartbeat.BEAT, heartbeat.SILENCE, processes.SILENCE = 0.2, 3.0, 3.0


def main(store: str, rank: int, victim: int, where: str) -> None:
    dist.init_process_group("gloo", store, rank=rank, world_size=2)
    group = processes.Processes.current()
    started = time.monotonic()
    try:
        with group.together():
            group.sum_(torch.ones(2))
        if where == "between" and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        with group.together():
            if rank == victim:
                if where == "busy":
                    time.sleep(6.0)  # longer than the silence that is allowed, and alive
                elif where != "stopped":
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
            if where == "sum":
                group.sum_(torch.ones(2))
        print("went on", end="")
    except RuntimeError as error:
        print(f"{type(error).__name__} after {time.monotonic() - started:.0f} s: {error}", end="")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
