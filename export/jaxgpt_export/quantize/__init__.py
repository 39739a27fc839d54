"""From the float32 artifact to quantized ones: calibration, smoothing, rounding, choosing, the command."""
