"""Everything that knows more than one process: mesh, engine, randomness."""
