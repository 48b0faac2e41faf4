"""From shards on disk to packs of samples: index, order, plan, loader."""
