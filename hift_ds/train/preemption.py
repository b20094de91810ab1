"""Ending a run early without losing a step: SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C.

A signal may reach one rank only, or each at another moment. So it is only noted; with each optimizer step the ranks
agree (in the all-reduce of the gradient norm) whether any of them was asked, and all save at the same step. The exit
code is 0: the job did what it was told.

In a Trainer: ``trainer.add_callback(PreemptionCallback(lambda: trainer.engine))``, and after ``train()``
``callback.exit_if_stopped("how to resume")``. In your own training loop::

    with StopRequest(engine.device, engine) as stop:
        for batch in data:
            engine.backward(engine(batch))
            engine.step()
            if stop.agreed():
                engine.save_checkpoint(folder)
                engine.wait_for_checkpoint()
                stop.exit("python train.py --resume " + folder)
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hift_ds.ranks import gather

if TYPE_CHECKING:
    from types import FrameType

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hift_ds.engine.engine import HiFTEngine

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Notes signals while it is entered. Only the main thread gets any: in another one nothing is noted.

    Args:
        device: where a tensor for a collective must be.
        engine: a ``HiFTEngine``, whose steps then ask the other ranks by the way. Without one :meth:`agreed` asks them,
            and waits for the device.
    """

    def __init__(self, device: torch.device, engine: HiFTEngine | None = None) -> None:
        self.device = device
        self._optimizer = getattr(engine, "optimizer", None)
        if not hasattr(self._optimizer, "questions"):
            self._optimizer = None
        self._noted = 0  # signal number
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if self._optimizer is not None:
            for number in SIGNALS:
                self._optimizer.questions[number.name] = functools.partial(self._has_noted, number)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._optimizer is not None:
            for number in SIGNALS:
                self._optimizer.questions.pop(number.name, None)

    def _has_noted(self, number: int) -> bool:
        return self._noted == number

    @property
    def noted(self) -> str | None:
        """The name of a signal that this rank has noted."""
        return signal.Signals(self._noted).name if self._noted else None

    def agreed(self) -> str | None:
        """The name of a signal that any rank has noted, before its last step at the latest. All ranks call this at the
        same step."""
        noted = self._noted
        if dist.is_initialized() and dist.get_world_size() > 1:
            answers = None if self._optimizer is None else self._optimizer.answers
            if answers is not None:
                return next((number.name for number in SIGNALS if answers.get(number.name)), None)
            shared = torch.tensor([noted], dtype=torch.int32, device=self.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            noted = int(shared)
        return signal.Signals(noted).name if noted else None

    def exit(self, how_to_resume: str) -> NoReturn:
        """Leave with code 0 and a line on the first rank, all ranks together."""
        if not dist.is_initialized():
            print(f"stopped and saved; to go on: {how_to_resume}", flush=True)
            sys.exit(0)
        if dist.get_rank() == 0:
            print(f"stopped and saved; to go on: {how_to_resume}", flush=True)
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        if number == signal.SIGINT:
            # The system's own handler from now on: a second Ctrl-C works even while torch waits in a
            # collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if int(os.environ.get("RANK", "0")) == 0:
            again = "; Ctrl-C again to leave at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step{again}\n".encode())


class EvaluationLeft(Exception):
    """A signal came while it ran."""


class LeavesEvaluation:
    """Mixin before a Trainer class: an evaluation inside training ends after the batch in which a signal came, and
    training with it; the weights of the last step are saved."""

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float] | None:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationLeft:
            # Before the first step there is nothing to save: that step comes, and its end stops the training.
            self.control.should_training_stop = self.control.should_save = self.state.global_step > 0
            self.control.should_evaluate = False
            return None

    def _determine_best_metric(self, metrics: dict[str, float] | None, *args: Any, **kwargs: Any) -> bool:
        return True if metrics is None else super()._determine_best_metric(metrics, *args, **kwargs)


class PreemptionCallback(TrainerCallback):
    """Makes a Trainer save and stop after the step in which a signal came.

    Args:
        leaves_evaluation: the Trainer is a :class:`LeavesEvaluation`.

    Attributes:
        stopped_by: the signal's name, once training was stopped by one; the same on all ranks.
    """

    def __init__(self, get_engine: Callable[[], HiFTEngine], leaves_evaluation: bool = False) -> None:
        self._get_engine = get_engine
        self._leaves_evaluation = leaves_evaluation
        self._stop: StopRequest | None = None
        self.stopped_by: str | None = None

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._restore()
        self.stopped_by = None
        self._stop = StopRequest(args.device, self._get_engine()).__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._stop is not None
        self.stopped_by = self._stop.agreed()
        if self.stopped_by is not None:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False  # whoever sent the signal will not wait for it

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Raises EvaluationLeft, on all ranks, once any has noted a signal."""
        if self._stop is None or not self._leaves_evaluation:
            return
        noted = next((name for name in gather(self._stop.noted) if name is not None), None)
        if noted is not None:
            self.stopped_by = noted if state.global_step else None  # else one step comes before there is a checkpoint
            raise EvaluationLeft

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        engine = self._get_engine()
        if hasattr(engine, "wait_for_checkpoint"):
            engine.wait_for_checkpoint()
        self._restore()

    def exit_if_stopped(self, how_to_resume: str) -> None:
        """Leave the program, after ``train()``, with code 0 if a signal ended it, else do nothing."""
        if self.stopped_by is not None:
            StopRequest(torch.device("cpu")).exit(how_to_resume)

    def _restore(self) -> None:
        if self._stop is not None:
            self._stop.__exit__()
            self._stop = None
