"""Flow matching: paths between noise and data, times, losses and solvers."""
