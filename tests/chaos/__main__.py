"""The kill grid: `python -m tests.chaos [--cells N] [--cluster N] [--seed S]`; ends with one line of JSON.

`--cells` strike processes on this machine, `--cluster` the local Kubernetes, which is brought up for it.
"""

import argparse
import json
import sys
import time

from tests.chaos import grid, kubegrid
from tests.chaos.cells import every_cell, every_cell_on_cluster, sample
from tests.chaos.report import Report


def main() -> int:
    """0 when every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=0, help=f"without a cluster, of {len(every_cell())}")
    parser.add_argument("--cluster", type=int, default=0, help=f"on Kubernetes, of {len(every_cell_on_cluster())}")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    options = parser.parse_args()
    started, report = time.monotonic(), Report()
    print(f"seed {options.seed}, {options.cells} cells and {options.cluster} on Kubernetes", flush=True)
    if options.cluster:
        kubegrid.run(sample(every_cell_on_cluster(), options.cluster, options.seed), report)
    if options.cells:
        grid.run(sample(every_cell(), options.cells, options.seed), report)
    for failure in report.failed:
        print(f"FAILED {failure.splitlines()[0]}")
    print(report.table())
    print(json.dumps(report.line(options.seed, time.monotonic() - started)), flush=True)
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
