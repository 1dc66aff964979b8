"""Running Triton kernels without a GPU, in a process of its own with Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREPARED = """
import torch
torch.manual_seed(0)  # as the fixture does in this process
def poisoned(make):
    def empty(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out
    return empty
torch.empty, torch.Tensor.new_empty = map(poisoned, (torch.empty, torch.Tensor.new_empty))
"""
# Triton 3.6 prepares its language again for every call of a function inside a kernel, a third of the time; once for
# every function is enough
PREPARED_ONCE = """
from triton.runtime import interpreter
prepared = set()
def call(function, *args, **kwargs):
    if function.fn not in prepared:
        prepared.add(function.fn)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)
interpreter.InterpretedFunction.__call__ = call
"""


def interpret(code, interpreted=True):
    """Run `code`, in which new memory holds NaN; its assertions are the test's."""
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "PYTHONPATH": paths}
    code = "\n".join([PREPARED, PREPARED_ONCE if interpreted else "", code, "print('done')"])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr[-3000:]
