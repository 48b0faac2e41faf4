"""Frozen encoders: captions to features, pixels to latents."""
