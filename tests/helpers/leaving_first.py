"""Two processes, of which the one that keeps the store ends as soon as it can; run as a script in each of them."""

import os
import time

import torch.distributed as dist

from lightning_odem.parameters import Processes, processes

if __name__ == "__main__":
    dist.init_process_group("gloo")
    wait = processes._wait
    with Processes.current().together():
        if dist.get_rank() == 0:
            time.sleep(0.5)  # the other one comes to the end first, and looks again late
        else:
            processes._wait = lambda condition, seconds: (time.sleep(2.0), wait(condition, seconds))[1]
    print("left")
    if dist.get_rank() == 0:
        os._exit(0)
