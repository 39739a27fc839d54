"""Training, all of it JAX: model, step, devices, run, and the commands train, evaluate, sample, plan."""
