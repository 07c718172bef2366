"""Training: state, loss, optimizer, schedule, step, loop, metrics. Knows nothing of serving."""
