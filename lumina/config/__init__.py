"""Settings of a run: the schema, how it is read, and what of it DeepSpeed is told."""
