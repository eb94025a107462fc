"""The forms: one file per way to write a quantized weight. Targets choose among them (`qgraph.target`)."""
