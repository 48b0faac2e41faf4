"""Flag-DiT: one-device maths on a packed token sequence."""
