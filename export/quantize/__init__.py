"""From the float32 artifact to INT8 artifacts: calibration, smoothing, rounding, the command."""
