"""Training: the step, the loop around it, EMA and metrics."""
