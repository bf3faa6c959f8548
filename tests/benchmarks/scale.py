"""What averaging 8 x 70 B costs: a model from measured rates and stated disks and networks, not a measurement.

    python tests/benchmarks/scale.py [--core-read 2.6] [--core-hash 1.8] [--imports 0.3]

The rates of a core are those of `average.py` on the machine at hand: GB of inputs that a core averages in a second,
with hashing and writing the output; GB that it hashes in a second; GB of memory after the imports. Disks and networks
are taken from the command line too. A merge takes as long as the slowest of what goes on at the same time.
"""

from __future__ import annotations

import argparse

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--shard", type=float, default=5.0, help="GB of an ingredient's file")
    parser.add_argument("--cores", type=int, default=32, help="of a machine")
    parser.add_argument("--core-read", type=float, default=2.6, help="GB/s averaged by a core")
    parser.add_argument("--core-hash", type=float, default=1.8, help="GB/s hashed by a core")
    parser.add_argument(
        "--memory-bandwidth", type=float, default=100.0, help="GB/s; about three passes over the inputs"
    )
    parser.add_argument("--disk-read", type=float, default=7.0, help="GB/s of a machine's disk")
    parser.add_argument("--disk-write", type=float, default=4.0, help="GB/s of a machine's disk")
    parser.add_argument("--shared-read", type=float, default=3.0, help="GB/s from the shared file system to a machine")
    parser.add_argument("--shared-write", type=float, default=1.5, help="GB/s from a machine to it")
    parser.add_argument("--network", type=float, default=1.25, help="GB/s from the Hub to a machine")
    parser.add_argument("--imports", type=float, default=0.3, help="GB of memory after the imports")
    options = parser.parse_args()
    model = 2 * options.parameters / GB
    inputs = options.models * model
    compute = min(options.cores * options.core_read, options.memory_bandwidth / 3)
    hashing = min(options.cores / (1 / options.core_read + 1 / options.core_hash), options.memory_bandwidth / 4)
    rows = [
        ("one machine, folders on its disk", 1, inputs, 0.0, inputs + model,
         {"disk, reading": inputs / options.disk_read, "disk, writing": model / options.disk_write,
          "cores and memory, averaging": inputs / compute}),
        ("the same for the first time, hashing the folders", 1, inputs, 0.0, inputs + model,
         {"disk, reading": inputs / options.disk_read, "disk, writing": model / options.disk_write,
          "cores and memory, averaging and hashing": inputs / hashing}),
        ("one machine, from the Hub into the cache", 1, inputs, inputs, inputs + model,
         {"network": inputs / options.network, "disk, writing": (inputs + model) / options.disk_write,
          "disk, reading": inputs / options.disk_read}),
        ("one machine, `--stream`", 1, inputs, inputs, model + options.models * options.shard,
         {"network": inputs / options.network, "disk, writing": (inputs + model) / options.disk_write,
          "disk, reading": inputs / options.disk_read}),
        ("four machines, one shared file system", 4, inputs, 0.0, inputs + model,
         {"file system, reading": inputs / 4 / options.shared_read,
          "file system, writing": model / 4 / options.shared_write,
          "cores and memory, averaging": inputs / 4 / compute}),
    ]  # fmt: skip
    print(
        "| | read, a machine | fetched | written, a machine | sent between processes | disk in all | "
        "memory, a machine | time | bound by |\n|---|---|---|---|---|---|---|---|---|"
    )
    for title, machines, read, fetched, disk, times in rows:
        bound = max(times, key=lambda name: times[name])
        seconds = times[bound]
        shown = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        print(
            f"| {title} | {read / machines:,.0f} GB | {fetched:,.0f} GB | {model / machines:,.0f} GB | "
            f"barriers only | {disk:,.0f} GB | {options.imports + 0.1:.1f} GB | {shown} | {bound} |"
        )


if __name__ == "__main__":
    main()
