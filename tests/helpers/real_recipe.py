"""What the tests of the real model's recipe share: its tiny text and settings, and how a wrong call ends."""

from demo.real.batches import Recipe

SENTENCES = [
    f"The {one} of the {other} has {count} {thing} that nobody counts."
    for one, other, thing in (("roof", "house", "tiles"), ("ship", "king", "sails"), ("tree", "garden", "leaves"))
    for count in range(40, 60)
]


def refused(capsys, main, words):
    """The line with which a wrong call ends."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "error: " in lines[0]
    return lines[0]


def recipe(**changes):
    values = {"steps": 6, "lr": 1e-2, "warmup": 2, "lengths": {32: 2.0, 64: 1.0}, "batch_tokens": 512, "at_once": 128}
    return Recipe(**{**values, "spans": 0.25, "seed": 0, **changes})
