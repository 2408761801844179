"""anyfabric beside NIXL, Mooncake, UCX and bare-metal baselines, on one machine in one run."""
