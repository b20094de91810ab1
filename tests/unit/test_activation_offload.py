"""What the offloading of activations leans on in TRL; that it is right is in test_races.py."""

import inspect

from trl.models.activation_offloading import OffloadActivations


def test_names_of_trl_that_are_not_documented():
    source = inspect.getsource(OffloadActivations)
    for text in ("self.tracker = {}", "self.s1 =", "def s0(self)", "self.param_storages = set()",
                 "self.fwd_stash = {}", "self.bwd_tensor_stash = {}", "self.bwd_ev_stash = {}"):  # fmt: skip
        assert text in source, text
    leaving = inspect.getsource(OffloadActivations.__exit__)
    assert "self.s1.synchronize()" in leaving and "super().__exit__" in leaving  # what we do without, and what we call
