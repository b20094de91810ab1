"""What one optimizer step did: the record that logs, plots and tests read."""

from __future__ import annotations

from dataclasses import dataclass, field

# What a step may wait for, in words that say what to do about it.
CAUSES = {
    "states_in": 'states to arrive (more "hift.state.slots", a compact "hift.state.codec", more tokens a step)',
    "states_out": 'states to leave (more "hift.state.slots", a compact "hift.state.codec", more tokens a step)',
    "disk": 'states on disk ("hift.state.residency": "host", a compact "hift.state.codec", more tokens a step)',
    "host_update": 'gradients and weights of a host update ("hift.state.step_on": "device", more tokens a step)',
    "gradients_on_host": "gradients that rest in host memory (fewer micro-batches, or no exact norm)",
    "reduction": 'gradients and weights between ranks (more micro-batches, "communication_data_type": "bf16")',
    "gather": "weights of other ranks or from host memory (ZeRO-3: more tokens a micro-batch)",
    "synchronized": "somebody who synchronized the device (a timer, a profiler, a callback)",
    "between_steps": "what comes between steps (data loading, logging)",
}


@dataclass
class StepReport:
    """One attempted optimizer step."""

    step: int  # optimizer steps attempted before this one, skipped ones included (DeepSpeed's global_steps)
    cycle: int  # completed cycles before this step
    position: int  # place in the cycle's order
    group: int  # index of the active group, bottom to top
    group_name: str
    lr: float  # used for the update, of the first param_group
    grad_norm: float  # 2-norm over the active group and all ranks, before clipping
    loss_scale: float
    skipped: bool  # fp16 overflow: nothing moved, the group is retried
    state_bytes_in: int  # state brought to the update device, this rank
    state_bytes_out: int
    grad_numel_sent: int  # gradient elements this rank handed to collectives
    transfer_s: float  # seconds that state transfers took
    stalled_s: float  # of which the step waited
    # Highest allocation on the accelerator in this step, from its first forward on (host memory on a CPU-only machine).
    peak_bytes: int
    grad_bytes_out: int = 0  # gradients (and weights kept in case of an undo) sent to host memory, this rank
    grad_bytes_in: int = 0  # of those, brought back
    tried: bool = False  # updated before the norm was known, as if nothing were clipped
    undone: bool = False  # and taken back, and made again, since the norm said otherwise
    undone_s: float = 0.0  # seconds that this took
    checkpoint_s: float = 0.0  # seconds that training waited for checkpoints since the last step
    # What peak_bytes was expected to be at most, if that has been worked out.
    forecast_bytes: int | None = None
    # Seconds, by cause (CAUSES), that the step stood still; stalled_s is what was for states.
    waits: dict[str, float] = field(default_factory=dict)
