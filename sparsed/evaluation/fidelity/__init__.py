"""How near does it keep to full attention, on any text? `python -m sparsed.evaluation.fidelity --help`."""
