"""Small real data sets that need no download, one file each."""
