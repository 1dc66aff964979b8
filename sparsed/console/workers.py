"""Several processes that a launcher started to run one command together: the first one prints, and all end alike."""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from ..ranks import ALONE, Ranks
from .endings import guarded
from .streams import one_line, settle, tell

# in the launcher's store: the first failure of a process, and how many have learned of it
FAILURE, LEARNED = "sparsed/failure", "sparsed/learned"
# seconds between two looks there; that the first process has to fail by itself before it says what another one said;
# and that a process waits for the others to learn of a failure, lest the launcher stops them before
PAUSE, OWN_WORDS, FAREWELL = 0.1, 1.0, 2.5


def as_one(work: Callable[[Ranks], None], program: str, *, advice: str, ending: bool) -> int:
    """`guarded` work of a command, alone or in the WORLD_SIZE processes of `torchrun` or `accelerate launch`.

    Of several processes each has its LOCAL_RANK-th GPU as the current one, where there are enough, and all but the
    first print nothing. If one of them fails, then all end with its exit code within a few seconds, wherever they are,
    and the first one prints its line.

    Args:
        work: called with the processes that run it.
        program, advice, ending: as for `guarded`.
    """

    def command(ranks: Ranks) -> int:
        return guarded(lambda: work(ranks), program, advice=advice, ending=ending)

    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return command(ALONE)
    with_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(
        os.environ.get("LOCAL_WORLD_SIZE", count)
    )
    if with_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        # whoever waits for another one waits for as long as it works
        dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", timeout=timedelta(days=30))
    except ValueError as error:
        tell(one_line(f"error: WORLD_SIZE is {count}: {error}"))
        return 2
    ranks = Ranks(dist.group.WORLD)
    watch = Watch(ranks)
    with _silent(ranks.index > 0) as said:
        try:
            code = command(ranks)
        except Exception:
            code = 1
            traceback.print_exc()
        if code:
            watch.fail(code, said.getvalue())
        ranks.gathered(None)  # until all are done, one of them may fail
    watch.stop()
    dist.destroy_process_group()
    return 0


def own_device(device: str, ranks: Ranks) -> str:
    """The device of this process, where a flag said `device` to all of them.

    Raises:
        ValueError: it names one device for several processes, or there are fewer GPUs than processes.
    """
    if ranks.count == 1:
        return device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"must be auto, cuda or cpu with several processes, got {device!r}")
    if device == "cpu" or not torch.cuda.is_available():
        return device
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if local >= gpus:
        raise ValueError(
            f"each process needs a GPU of its own, and this machine has {gpus}: use cpu, or fewer processes"
        )
    return f"cuda:{local}"


class Watch:
    """Looks out, beside the command, for a process that has failed, and ends this one then."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        # a connection of its own, on which nothing waits
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
        self._stopped, self._failed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def fail(self, code: int, words: str) -> None:
        """End all processes with this exit code, if none has failed before; does not return.

        Args:
            words: what this process would have said so far.
        """
        self._failed.set()
        with contextlib.suppress(ValueError):  # of a thread that is not the main one
            signal.signal(
                signal.SIGTERM, signal.SIG_IGN
            )  # by the launcher, once another process has ended; so has this
        with contextlib.suppress(RuntimeError):  # where the store is gone, the others end by themselves
            # a traceback, or the last line
            last = words if code == 1 else "".join(words.splitlines()[-1:])
            self._store.compare_set(FAILURE, "", json.dumps((code, last)))
            self._thread.join()
        settle()
        os._exit(code)

    def stop(self) -> None:
        """All processes are done."""
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        code, words = 1, ""
        try:
            while not self._store.check([FAILURE]):
                if self._stopped.wait(PAUSE):
                    return
            code, words = json.loads(self._store.get(FAILURE))
            self._say(words)
            self._wait()
        except RuntimeError:  # who kept the store is gone: killed, if the command was not done
            if self._stopped.wait(OWN_WORDS):
                return
        os._exit(code)  # not by way of libraries that would wait for the other processes

    def _say(self, words: str) -> None:
        """In the first process, what the one that failed would have said."""
        if self._ranks.index == 0 and not self._failed.wait(OWN_WORDS):
            stderr, sys.stderr = sys.stderr, io.StringIO()  # which the command may be about to use
            with contextlib.redirect_stderr(stderr):
                tell(words)
        settle()

    def _wait(self) -> None:
        """Until all processes have learned of the failure, but not for long."""
        self._store.add(LEARNED, 1)
        until = time.monotonic() + FAREWELL
        while self._store.add(LEARNED, 0) < self._ranks.count and time.monotonic() < until:
            time.sleep(PAUSE / 10)  # all end at once, lest the launcher stops the last ones


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[io.StringIO]:
    """If so, what is printed to stderr is kept, and what is printed to stdout dropped."""
    said = io.StringIO()
    with contextlib.ExitStack() as until:
        if silent:
            until.enter_context(contextlib.redirect_stdout(io.StringIO()))
            until.enter_context(contextlib.redirect_stderr(said))
        yield said
