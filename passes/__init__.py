"""The passes: one idea per file. `qgraph passes` lists them, `qgraph.registry` finds them by scanning this package."""
