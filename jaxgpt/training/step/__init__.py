"""The compiled training step: gradients over devices, the optimizer, the guard against bad steps."""
