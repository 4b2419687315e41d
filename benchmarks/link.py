"""An all-reduce between machines that are network namespaces of this one, over a shaped link, beside the plan.

    python benchmarks/link.py --machines 2 --link 1Gb/s,1ms --loss 1      # root and `ip` are needed

The link is benchmarks/relay.py: a rate for each sender, a delay, a share of packets lost. Of the all-reduces of a size
the least and the middle one are told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
TIMES = 5


def rank(sizes: list[int]) -> None:
    """What one machine does; the first one prints [[bytes, seconds, ...], ...]."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = []
    for size in sizes:
        flat, took = torch.zeros(size // 4), []
        for _ in range(TIMES):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(flat)
            took.append(time.perf_counter() - began)
        found.append([size, *sorted(took)])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument(
        "--link", default="1Gb/s,1ms", help="of each machine: what it sends a second, its delay one way"
    )
    parser.add_argument("--loss", type=float, default=0.0, help="%% of packets")
    parser.add_argument("--mtu", type=int, default=65_000, help="bytes of a packet; 1500 up to 100Mb/s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 20, 160], help="MB")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return rank([size * 1_000_000 for size in args.sizes])
    from benchmarks.relay import Link, Machines
    from halfbyte.distributed import scaling

    asked = scaling.link_of(args.link)
    link = Link(asked.bytes_s, asked.delay_s, args.loss / 100, args.mtu)
    with Machines(args.machines, link) as machines:
        started = []
        for n in range(args.machines):
            own = {"RANK": str(n), "WORLD_SIZE": str(args.machines), "MASTER_PORT": "29517"}
            line = [*machines.inside(n), sys.executable, __file__, "--rank", "--sizes", *map(str, args.sizes)]
            env = os.environ | machines.env(n) | own
            started.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True))
        said = [each.communicate(timeout=400)[0] for each in started]
    what = f"{args.machines} machines, {args.link}, {args.loss:g}% lost, packets of {args.mtu}"
    for size, *seconds in json.loads(said[0].strip().splitlines()[-1]):
        planned = scaling.reduce_seconds(size, args.machines, asked)
        least, middle = seconds[0], seconds[len(seconds) // 2]
        ratios = f"{least / planned:.2f} and {middle / planned:.2f} of the plan's {planned:.3f} s"
        print(f"{what}; {size / 1e6:.0f} MB: {least:.3f} s at least, {middle:.3f} in the middle: {ratios}")
    return None


if __name__ == "__main__":
    main()
