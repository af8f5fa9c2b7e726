"""RoCoFT on two processes: DDP and FSDP2 train as one process does."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import DECODER, of
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rocoft import RoCoFTConfig

pytestmark = pytest.mark.slow

WORLD = 2
STEPS = 4
CASES = [
    (way, axis)
    for way in ("ddp", "fsdp", "fsdp-checkpointing")
    for axis in ("row", "both")
]


def build(axis, checkpointing=False):
    torch.manual_seed(0)
    model = of("Llama", "ForCausalLM", DECODER)()
    config = RoCoFTConfig(r=3, axis=axis, selection="random", bias="all")
    model = get_peft_model(model, config)
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model.train()


def batches():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 60, (STEPS, 4, 7), generator=generator)


def losses(model, share):
    """Train on this process's share and return the losses over all of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for tokens in batches():
        tokens = tokens[share]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def rocoft(tensors):
    return {k: v.detach().clone() for k, v in tensors.items() if ".rocoft_" in k}


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        for way, axis in CASES:
            found, model, tensors = train(rank, way, axis)
            if rank == 0:
                path = folder / f"{way}-{axis}"
                model.save_pretrained(path, state_dict=tensors)
                torch.save((found, rocoft(tensors)), path / "found.pt")
    finally:
        dist.destroy_process_group()


def train(rank, way, axis):
    """Return the losses over all processes, the model and its whole state."""
    model = build(axis, checkpointing=way == "fsdp-checkpointing")
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    found = losses(wrapped, slice(2 * rank, 2 * rank + 2))
    dist.all_reduce(found)
    if way == "ddp":
        return found / WORLD, model, model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return found / WORLD, model, get_model_state_dict(wrapped, options=options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with what two processes computed of every case."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path_factory.mktemp("distributed")
    # Starting processes takes longer than all cases do.
    mp.spawn(work, (port, path), nprocs=WORLD)
    return path


@pytest.mark.parametrize(("way", "axis"), CASES)
def test_two_processes_train_as_one(way, axis, folder):
    path = folder / f"{way}-{axis}"
    found, tensors = torch.load(path / "found.pt")
    model = build(axis)
    expected = losses(model, slice(None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[-1] < found[0]
    own = rocoft(model.state_dict())
    assert tensors.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=1e-5)
    loaded = PeftModel.from_pretrained(build(axis).unload(), path).eval()
    tokens = batches()[0]
    logits = [m(input_ids=tokens).logits for m in (loaded, model.eval())]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
