"""Run by torchrun on two CPU ranks: one optimiser step a method, gradients of rank 0 kept. Arguments: a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from training_helpers import gradients

folder = Path(sys.argv[1])


for name in ("kd", "gkd", "minillm", "minillm-reference", "gkd-reward"):
    found, loss = gradients(folder / f"two-{name}", name, batch=4, accumulation=1)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(loss))
torch.distributed.destroy_process_group()
