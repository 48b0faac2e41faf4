"""Measuring: single operations on this machine, with the bytes or FLOPs that they need beside the time they take."""
