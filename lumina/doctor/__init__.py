"""`lumina doctor`: what is installed, which devices there are, and what would go wrong with a run on these hosts."""
