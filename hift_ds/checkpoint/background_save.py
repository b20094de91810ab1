"""An asynchronous save: training goes on while a snapshot is copied group by group and written by a thread.

Only the active group changes in a step. So the main thread copies each group to host memory before its next
update, in the order in which the schedule comes to them, and the thread writes the copies: a snapshot of one
moment, with at most ``GROUPS_IN_MEMORY`` copies at a time. State stores and collectives stay in the main
thread; the thread only touches files.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from torch import Tensor

from hift_ds.checkpoint.writer import CheckpointWriter
from hift_ds.errors import CheckpointError
from hift_ds.optim.group_shard import GroupShard

logger = logging.getLogger(__name__)

GROUPS_IN_MEMORY = 2  # one being written, one waiting: the main thread copies the next while the thread writes
PATIENCE_AT_EXIT_S = 30.0  # for other ranks' files, when a program ends without asking for its checkpoint
_END = None


class BackgroundSave:
    """A save beside training, which starts at once.

    Args:
        writer: open.
        publish: called by the thread when this rank's files are complete; with a function that becomes true
            when it should give up.
        collective: copying takes part in a collective (partitioned weights), so all ranks must copy alike.
    """

    def __init__(
        self, writer: CheckpointWriter, publish: Callable[[Callable[[], bool]], None], collective: bool
    ) -> None:
        self._writer = writer
        self._publish = publish
        self._collective = collective
        self._remaining: deque[GroupShard] = deque(writer.plan.groups)
        self._copies: queue.Queue[list[tuple[str, Tensor]] | None] = queue.Queue()
        self._room = threading.Semaphore(GROUPS_IN_MEMORY)
        self._given_up = threading.Event()
        self._written = threading.Event()  # this rank's files are complete, or have failed
        self.failure: CheckpointError | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()
        self._put_fixed()
        atexit.register(self._finish_at_exit)

    def before_step(self, active: Collection[int]) -> None:
        """Copy the groups that the coming step changes, and one more if the thread has nothing to do."""
        while any(group.index in active for group in self._remaining):
            self._copy_next()
        if self._remaining and (self._collective or self._copies.empty()):
            self._copy_next()

    def finish_files(self) -> None:
        """Copy what is left and wait until this rank's files are complete.

        Raises:
            CheckpointError: they are not.
        """
        while self._remaining:
            self._copy_next()
        self._written.wait()
        self._raise_failure()

    def finish(self) -> Path:
        """Wait until the folder has its name, and return it. Called after every rank's :meth:`finish_files`.

        Raises:
            CheckpointError: it will not get it.
        """
        self._thread.join()
        self._raise_failure()
        return self._writer.shared_folder.final

    def forget(self) -> None:
        """Give up: nobody wants the copies or the other ranks' files any more."""
        self._given_up.set()
        self._remaining.clear()
        self._copies.put(_END)
        self._thread.join()
        atexit.unregister(self._finish_at_exit)

    def discard(self) -> None:
        """Remove what there is of the folder. Called after every rank's :meth:`finish_files`, when one has failed."""
        self.forget()
        if self._writer.shared_folder.leads:
            self._writer.shared_folder.discard()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _finish_at_exit(self) -> None:
        """A program that ends without asking for its last checkpoint gets it, if all ranks end well.

        Not if copying is a collective: a rank that has died, or ends otherwise, would never come.
        """
        if self._collective and self._remaining:
            logger.error(
                "checkpoint %s is not finished: the program ended without wait_for_checkpoint(), which all ranks call "
                "together", self._writer.shared_folder.final,
            )  # fmt: skip
            self._given_up.set()
            return
        while self._remaining:
            self._copy_next()
        self._thread.join(PATIENCE_AT_EXIT_S)

    def _copy_next(self) -> None:
        group = self._remaining.popleft()
        self._put_copies(self._writer.plan.of_group(group))
        if not self._remaining:
            self._copies.put(_END)

    def _put_fixed(self) -> None:
        """Frozen weights never change: they need no copy, unless making them whole made one."""
        plan = self._writer.plan
        if self._collective:
            for item in plan.frozen():
                self._put_copies([item])
        else:
            self._room.acquire()
            self._copies.put(list(plan.frozen()))
        self._put_copies(plan.buffers())

    def _put_copies(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._room.acquire()
        self._copies.put([(file, tensor.detach().to("cpu", copy=True)) for file, tensor in tensors])

    def _write(self) -> None:
        copies: list[tuple[str, Tensor]] | None = []
        try:
            while (copies := self._copies.get()) is not _END:
                self._writer.add(copies)
                copies = []  # let go of them before there is room for more
                self._room.release()
            self._writer.close()
            self._written.set()
            self._publish(self._given_up.is_set)
        except Exception as error:
            if not isinstance(error, CheckpointError):
                error = CheckpointError(f"{type(error).__name__}: {error}")
            self._fail(error)
            while copies is not _END:  # the main thread must not wait for room
                self._room.release()
                copies = self._copies.get()
            self._written.set()

    def _fail(self, error: CheckpointError) -> None:
        self.failure = error
        self._writer.discard()
        shared_folder = self._writer.shared_folder
        if shared_folder.leads:
            shared_folder.discard()
        else:
            shared_folder.write_failure(str(error))
        logger.error("checkpoint %s failed while training went on: %s", shared_folder.final, error)
