"""A plug-in for ms-swift's own slot:

    swift sft ... --external_plugins PATH_OF_THIS_FILE --callbacks hift \
        --deepspeed bf16_host.json

``python -c "import importlib.util as u; print(u.find_spec('hift_ds.integrations.ms_swift').origin)"`` prints it.
"""

from __future__ import annotations

from typing import Any

from swift.callbacks.mapping import callbacks_map

from hift_ds.integrations.callback import HiFTCallback


class SwiftCallback(HiFTCallback):
    """Made by ms-swift with its arguments and trainer."""

    def __init__(self, args: Any = None, trainer: Any = None) -> None:
        super().__init__()


callbacks_map["hift"] = SwiftCallback
