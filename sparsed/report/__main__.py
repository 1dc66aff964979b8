"""`python -m sparsed.report`."""

import sys

from ..cli.page import main_report

if __name__ == "__main__":
    sys.exit(main_report())
