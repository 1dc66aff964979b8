"""A small real language model to judge by: converted from a package, adapted to masked diffusion, kept as a delta."""
