"""An all-reduce between machines that are network namespaces of this one, over a shaped link, beside the plan.

    python benchmarks/link.py --machines 2 --rate 1gbit --sizes 4 20 160      # root, `ip` and `tc` are needed

Each namespace has a virtual card at one bridge, whose sending is held to the rate by `tc tbf`. The kernel needs `netem`
for a delay, so none is made. The least of three all-reduces counts.
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
NAME = f"hb{os.getpid() % 10000}"
TIMES = 3


def rank(sizes: list[int]) -> None:
    """What one machine does; the first one prints [[bytes, seconds], ...]."""
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
        found.append([size, min(took)])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


def build(machines: int, rate: str) -> None:
    run("ip", "link", "add", NAME, "type", "bridge")
    run("ip", "link", "set", NAME, "up")
    for n in range(machines):
        space, inner, outer = f"{NAME}-{n}", f"{NAME}i{n}", f"{NAME}o{n}"
        run("ip", "netns", "add", space)
        run("ip", "link", "add", inner, "type", "veth", "peer", "name", outer)
        run("ip", "link", "set", outer, "master", NAME)
        run("ip", "link", "set", outer, "up")
        run("ip", "link", "set", inner, "netns", space)
        inside = ("ip", "netns", "exec", space)
        run(*inside, "ip", "addr", "add", f"10.77.0.{n + 1}/24", "dev", inner)
        run(*inside, "ip", "link", "set", inner, "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(
            *inside,
            "tc",
            "qdisc",
            "add",
            "dev",
            inner,
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "256kb",
            "latency",
            "50ms",
        )


def remove(machines: int) -> None:
    for n in range(machines):
        subprocess.run(["ip", "netns", "del", f"{NAME}-{n}"], check=False)
    subprocess.run(["ip", "link", "del", NAME], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 20, 160], help="MB")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [size * 1_000_000 for size in args.sizes]
    if args.rank:
        return rank(sizes)
    from halfbyte.distributed import scaling

    try:
        build(args.machines, args.rate)
        started = []
        for n in range(args.machines):
            env = os.environ | {
                "RANK": str(n), "WORLD_SIZE": str(args.machines), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29517",
                "GLOO_SOCKET_IFNAME": f"{NAME}i{n}",
            }  # fmt: skip
            inside = ["ip", "netns", "exec", f"{NAME}-{n}", sys.executable, __file__, "--rank", "--sizes"]
            line = [*inside, *map(str, args.sizes)]
            started.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True))
        said = [each.communicate(timeout=400)[0] for each in started]
    finally:
        remove(args.machines)
    link = scaling.link_of(args.rate.replace("gbit", "Gb/s").replace("mbit", "Mb/s"))
    for size, seconds in json.loads(said[0].strip().splitlines()[-1]):
        planned = scaling.reduce_seconds(size, args.machines, link)
        ratio = f"{seconds:.3f} s, {seconds / planned:.2f} of the plan"
        print(f"{args.machines} machines, {args.rate}, {size / 1e6:.0f} MB: {ratio}")
    return None


if __name__ == "__main__":
    main()
