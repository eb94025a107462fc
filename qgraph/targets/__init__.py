"""The targets: one file each, each a value registered with `qgraph.registry.register`."""
