"""Generate text with Dream and SparseD; `python dream_generation.py --help` lists the flags."""

import sys

from sparsed.commands import dream

if __name__ == "__main__":
    sys.exit(dream())
