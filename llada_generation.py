"""Generate text with LLaDA and SparseD; `python llada_generation.py --help` lists the flags."""

import sys

from sparsed.commands import llada

if __name__ == "__main__":
    sys.exit(llada())
