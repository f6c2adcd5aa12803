"""Run by torchrun on two CPU ranks: a sharded student trains and saves. Arguments: a model folder, an output folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from training_helpers import tiny_recipe
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from limbeck import ranks
from limbeck.models import load_tokenizer
from limbeck.training import build, train

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
student = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
assert all(isinstance(parameter, DTensor) for parameter in student.parameters()), "the student is not sharded"
recipe = tiny_recipe(
    output, "kd", student=str(folder), training={"max_steps": 4, "use_cpu": True, "save_only_model": True}
)
parts = build(recipe, student=(student, load_tokenizer(folder)))
output.mkdir(parents=True, exist_ok=True)
trainer, _ = train(recipe, parts, output, quiet=True)
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
if torch.distributed.get_rank() == 0:
    (output / "losses.json").write_text(json.dumps(losses))
ranks.wait()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # of the interpreter's own shutdown torch's threads have once made an abort, after all was written
