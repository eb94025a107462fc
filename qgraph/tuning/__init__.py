"""Tuning quantized weights against the float model's outputs, with gradients through the whole model."""
