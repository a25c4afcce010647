"""Four ranks in torch's own two ways, up to their first all-reduce.

torchrun --nproc-per-node 4 first_reduce.py     prints, on each rank, the time at which it had the sum
python first_reduce.py spawn FILE               the same under mp.spawn; FILE is made for the ranks to meet
"""

import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def first_reduce(rank: int | None = None, ranks: int | None = None, file: str = "") -> None:
    """Join the group, by a file or as torchrun says, and print when the first sum is there."""
    if rank is None:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    dist.all_reduce(torch.ones(1))
    sys.stdout.write(f"at {time.perf_counter()}\n")  # in one piece: four ranks share the pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["spawn"]:
        print("from", time.perf_counter(), flush=True)
        mp.spawn(first_reduce, (4, sys.argv[2]), nprocs=4)
    else:
        first_reduce()
