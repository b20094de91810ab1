"""The weights of a Trainer's checkpoint, once on disk.

``checkpoint-N`` has them for ``from_pretrained``, and the engine's folder inside it has them for going on. Where both
would be the same tensors under the same names, the engine's file gets a second name (a hard link) and the Trainer
writes none.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, Trainer

from hift_ds.checkpoint.files import ALIGNMENT
from hift_ds.checkpoint.write_plan import saved_tensors
from hift_ds.hf.weight_names import plan_names


def has_the_form_of_a_checkpoint(model: Any) -> bool:
    """Whether ``save_pretrained`` would write the tensors that the engine writes, under the same names and unchanged.

    Not so for models that transformers renames or converts (Mixtral's experts), for adapters, and for tensors of odd
    sizes, between which the engine's file has fillers that ``from_pretrained`` would wonder about.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return False
    plan, tensors = plan_names(model), saved_tensors(model)
    return (
        not plan.sets
        and set(plan.saved) == set(tensors)
        and all(name == saved for name, saved in plan.renamed.items())
        and all(tensor.numel() * tensor.element_size() % ALIGNMENT == 0 for tensor in tensors.values())
    )


class WeightsOnce:
    """Mixin before a Trainer class."""

    _engine_has_weights = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        engine = self.engine
        shared = (
            _internal_call
            and engine is not None
            and not self.args.save_only_model  # else the engine writes nothing
            and getattr(super()._save, "__func__", None) is Trainer._save  # a trainer that writes more, writes all
            and has_the_form_of_a_checkpoint(self.model)
        )
        if engine is not None:
            engine.checkpointer.weights_beside = shared
        self._engine_has_weights = shared
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._engine_has_weights = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict={} if self._engine_has_weights else state_dict)
