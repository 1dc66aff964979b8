"""Does it keep the quality? Long-context tasks, SparseD beside other methods: `python -m sparsed.evaluation --help`."""
