"""Generate text with LLaDA and SparseD; `python llada_generation.py --help` lists the flags."""

import sys

try:
    from sparsed.cli import main_llada
except KeyboardInterrupt:  # Ctrl-C in the seconds that importing PyTorch takes
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main_llada())
