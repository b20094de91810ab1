"""Axolotl's own entry point, ``axolotl_train.py RUN.yaml``, on a CPU: for one rank it asks for NCCL, unless there is a
process group, and for several it puts the model on GPUs."""

from __future__ import annotations

import runpy

import torch

torch.distributed.init_process_group("gloo")
runpy.run_module("axolotl.cli.train", run_name="__main__", alter_sys=True)
