"""Images in: files, folders, splits, caches and the data sets of the benchmarks."""
