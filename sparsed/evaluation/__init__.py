"""Does it keep the quality? SparseD and other methods on long-context tasks: `python -m sparsed.evaluation --help`."""

from .scoring import score, wilson
from .tasks import TASKS, Sample, Task, make_sample, read_samples

__all__ = ["TASKS", "Sample", "Task", "make_sample", "read_samples", "score", "wilson"]
