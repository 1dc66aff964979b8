"""How close does it stay to full attention, on any text? `python -m sparsed.evaluation.fidelity --help`."""
