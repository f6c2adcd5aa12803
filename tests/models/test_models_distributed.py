"""The forward of training under DDP and FSDP2 with two processes: the gradients of one process with the whole batch."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_families import tiny
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from limbeck.models import completion_hidden
from limbeck.ops.chunked import head_logits

TOKENS = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(7))


def loss(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    batch = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "learnt": tokens_BT % 2 == 0}
    hidden_NH, tokens_N, head = completion_hidden(model, batch)
    return nn.functional.cross_entropy(head_logits(hidden_NH, head), tokens_N, reduction="sum")


def rank_gradients(rank: int, wrapper: str, family: str, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, whole = tiny(family).train(), tiny(family).train()
    loss(whole, TOKENS).backward()
    if wrapper == "ddp":
        wrapped: Any = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    loss(wrapped, TOKENS[2 * rank : 2 * rank + 2]).backward()
    for name, expected in whole.named_parameters():
        found = model.get_parameter(name).grad
        assert found is not None and expected.grad is not None, name
        full = found.full_tensor() if isinstance(found, DTensor) else found
        # Both wrappers average over the ranks.
        torch.testing.assert_close(2 * full, expected.grad, atol=1e-5 * float(expected.grad.abs().max() + 1), rtol=1e-4)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # an untied and a tied head
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_ranks_have_the_gradients_of_one(wrapper: str, family: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(rank_gradients, (wrapper, family, port), nprocs=2)  # raises where a rank does
