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
from .endings import EXIT_WRONG, guarded
from .streams import one_line, settle, tell

# keys in the launcher's store: the first failure of a process, and how many processes have learned of it
FAILURE, LEARNED = "sparsed/failure", "sparsed/learned"
# seconds between two looks there; that the first process gets to report a failure of its own before it repeats another
# one's; that a process waits until the others know of a failure, because the launcher stops them once one has ended
PAUSE, OWN_WORDS, FAREWELL = 0.1, 1.0, 2.5
# in the error of a process that was sending to, or reading from, one that has ended
CONNECTION_LOST = ("closed by peer", "reset by peer", "broken pipe", "remote process exited")


def as_one(work: Callable[[Ranks], None], program: str, *, advice: str, ending: bool) -> int:
    """`guarded` work of a command, in one process or in the WORLD_SIZE processes of `torchrun` or `accelerate launch`.

    With several processes, the LOCAL_RANK-th GPU is the current one, if there are enough GPUs, and only the first
    process prints. If one process fails, all end with its exit code within a few seconds, wherever they are, and the
    first one prints its line.

    Args:
        work: called with the processes that run it.
        program, advice, ending: as for `guarded`.
    """

    def command(ranks: Ranks) -> int:
        return guarded(lambda: work(ranks), program, advice=advice, ending=ending)

    try:
        count = launched()
        ranks = _together(count) if count > 1 else ALONE
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # without PyTorch's stack
        tell(one_line(f"{program}: error: WORLD_SIZE is {os.environ['WORLD_SIZE'] or 'empty'}: {reason}"))
        return EXIT_WRONG
    if count == 1:
        return command(ALONE)
    watch = Watch(ranks)
    with _silent(ranks.index > 0) as said:
        try:
            code = command(ranks)
            if code == 0:
                ranks.gathered(None)  # wait: until all are done, one of them may fail
        except Exception as error:
            code = 1
            if _connection_lost(error):
                watch.await_other()
            traceback.print_exc()
        if code:
            watch.fail(code, said.getvalue())
    watch.stop()
    dist.destroy_process_group()
    return 0


def launched() -> int:
    """How many processes the launcher started, this one included; ValueError if its number is none."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) == 0:
        raise ValueError("must be a whole number from 1")
    return int(given)


def with_launcher(words: list[str], processes: int) -> list[str]:
    """A command as it is when a launcher starts this number of processes of it."""
    if processes == 1:
        return words
    program = words[1:] if words[0] == "python" else ["--no-python", *words]
    return ["torchrun", "--nproc_per_node", str(processes), *program]


def _together(count: int) -> Ranks:
    """All processes, once all are there; ValueError if the launcher has not said where they meet, RuntimeError if they
    cannot."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with_gpus = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if with_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # a process that waits for another one must wait as long as that one works
    patience = timedelta(days=30)
    store, rank, count = next(dist.rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
    dist.init_process_group(backend, store=_of_attempt(store), rank=rank, world_size=count, timeout=patience)
    return Ranks(dist.group.WORLD)


def _of_attempt(store: dist.Store) -> dist.Store:
    """The launcher's store without what earlier attempts left there: `torchrun --max_restarts` may keep it."""
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _connection_lost(error: Exception) -> bool:
    """Whether a call of another process failed because that one has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in CONNECTION_LOST)


def own_device(device: str, ranks: Ranks) -> str:
    """The device of this process, where a flag said `device` to all of them.

    Raises:
        ValueError: the flag names one device for several processes, or there are fewer GPUs than processes.
    """
    if ranks.count == 1:
        return device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"must be auto, cuda or cpu with several processes, got {device!r}")
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu" if device == "auto" else device  # an Apple GPU is one for all of them
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if local >= gpus:
        raise ValueError(
            f"each process needs a GPU of its own, and this process sees {gpus}: use cpu, or fewer processes"
        )
    return f"cuda:{local}"


class Watch:
    """Watches for a failed process while the command runs, and then ends this process."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        # its own connection, so that nothing else waits on it
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = _of_attempt(dist.TCPStore(*address, is_master=False, wait_for_workers=False))
        self._stopped, self._failed, self._learned = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def fail(self, code: int, words: str) -> None:
        """End all processes with this exit code, if none has failed before; does not return.

        Args:
            words: what this process has said on stderr so far.
        """
        self._failed.set()
        with contextlib.suppress(ValueError):  # in a thread that is not the main one
            # the launcher sends it once another process has ended; this one is about to end as well
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):  # if the store is gone, the others end by themselves
            # a traceback, or the last line
            last = words if code == 1 else "".join(words.splitlines()[-1:])
            self._store.compare_set(FAILURE, "", json.dumps((code, last)))
            self._thread.join()
        settle()
        os._exit(code)

    def await_other(self) -> None:
        """Give another process's failure time to become known, or the launcher to stop this one; each ends it."""
        if self._learned.wait(OWN_WORDS):
            self._thread.join()

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
            self._learned.set()
            code, words = json.loads(self._store.get(FAILURE))
            self._say(words)
            self._wait()
        except RuntimeError:  # the store's keeper is gone; if the command was not done, it was killed
            self._learned.set()
            if self._stopped.wait(OWN_WORDS):
                return
        os._exit(code)  # at once: libraries would wait for the other processes

    def _say(self, words: str) -> None:
        """In the first process: print what the failed process said."""
        if self._ranks.index == 0 and not self._failed.wait(OWN_WORDS):
            stderr, sys.stderr = sys.stderr, io.StringIO()  # the command may be using it
            with contextlib.redirect_stderr(stderr):
                tell(words)
        settle()

    def _wait(self) -> None:
        """Wait until all processes know of the failure, but not for long."""
        self._store.add(LEARNED, 1)
        until = time.monotonic() + FAREWELL
        while self._store.add(LEARNED, 0) < self._ranks.count and time.monotonic() < until:
            time.sleep(PAUSE / 10)  # all end at once, before the launcher stops the last ones


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[io.StringIO]:
    """If `silent`, keep what is printed to stderr, and drop what is printed to stdout."""
    said = io.StringIO()
    with contextlib.ExitStack() as until:
        if silent:
            until.enter_context(contextlib.redirect_stdout(io.StringIO()))
            until.enter_context(contextlib.redirect_stderr(said))
        yield said
