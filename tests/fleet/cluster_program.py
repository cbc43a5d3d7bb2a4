"""Two hosts of a Ray cluster on this machine, by Ray's own means for tests.

Says the address, and reads commands: ``lose`` ends the second host. Ends with its standard input.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_gpus": 1, "num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_gpus=1, num_cpus=1)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "lose":
            cluster.remove_node(second, allow_graceful=False)
            print("lost", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
