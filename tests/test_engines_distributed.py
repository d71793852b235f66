"""Law 8, distributed half: DDP and FSDP2 train an adapted model as one process would. Two processes on the CPU."""

import copy
import multiprocessing
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_close, attached, refused
from models import mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorakit as lk

WORLD = 2
PRELOADED = ["torch.distributed.fsdp", "torch._dynamo", "torch.nn.parallel", "pytest", "lorakit"]
over_modes = pytest.mark.parametrize("mode", ["auto", "weight"])


def start(rank: int, job, folder: str, args) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    try:
        job(rank, folder, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_processes(job, folder, *args) -> None:
    # A fork server imports torch once and forks from there: seconds less for each process.
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(start, (job, str(folder), args), WORLD, start_method="forkserver")


def whole(tensor):
    """The full value of a tensor that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def prepared(mode):
    """A model with an adapter, the batch, and what one process makes of it: output, gradients, factors after a step."""
    torch.manual_seed(0)
    model, x = attached(mlp(), mode=mode), torch.randn(2 * WORLD, 6)
    single = copy.deepcopy(model)
    y = single(x)
    y.square().mean().backward()
    gradients = [p.grad for p in lk.adapter_parameters(single)]
    torch.optim.SGD(lk.adapter_parameters(single), lr=0.1).step()
    return model, x, y, gradients, single


def trains_as_one(rank, wrapped, mode_and_more):
    x, y, gradients, single = mode_and_more
    mine = slice(2 * rank, 2 * rank + 2)
    got = wrapped(x[mine])
    assert_close(got, y[mine])
    got.square().mean().backward()
    parameters = lk.adapter_parameters(wrapped)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert_close(whole(parameter.grad), gradient)
    torch.optim.SGD(parameters, lr=0.1).step()
    wanted = single(x)[mine]
    assert_close(wrapped(x[mine]), wanted)
    with lk.disabled(wrapped), lk.disabled(single):
        assert_close(wrapped(x[mine]), single(x)[mine])
    assert_close(wrapped(x[mine]), wanted)


def ddp(rank, folder, mode):
    model, x, *expected = prepared(mode)
    trains_as_one(rank, DistributedDataParallel(model), (x, *expected))
    assert lk.adapters(model)["default"].weights == ("0.weight", "2.weight")
    for number in range(8):  # by both at once
        lk.save(model, f"{folder}/saved{number}")
        lk.read(f"{folder}/saved{number}")
    lk.detach(model)
    assert type(model[0]) is nn.Linear


def attach_after_ddp(rank, folder):
    wrapped = DistributedDataParallel(mlp())
    with refused(wrapped, "DistributedDataParallel"):
        lk.attach(wrapped, lk.LoRA(rank=2))


def fsdp(rank, folder, mode):
    model, x, *expected = prepared(mode)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    trains_as_one(rank, model, (x, *expected))


def fsdp_save(rank, folder, mode):
    model = prepared(mode)[0]
    single = copy.deepcopy(model)
    wanted = lk.adapter_state_dict(single)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    for key, tensor in lk.adapter_state_dict(model).items():
        assert torch.equal(whole(tensor), wanted[key])
    for path in ("a directory", "a file.safetensors", "a directory"):  # anew, anew, and in place of what is there
        lk.save(model, f"{folder}/{path}")  # in every process, to one path
        lk.detach(single)
        lk.load(single, f"{folder}/{path}", "default")
        for key, tensor in lk.adapter_state_dict(single).items():
            assert torch.equal(tensor, wanted[key])
    open(f"{folder}/in the way", "w").close()
    with pytest.raises(lk.LorakitError, match="in the way") if rank == 0 else nullcontext():
        lk.save(model, f"{folder}/in the way/adapter")
    dist.barrier()


def flat_ddp(rank, folder, bucket_view, by):
    model, x, *_ = prepared("auto")
    other = copy.deepcopy(model)
    flat = lk.flat_parameter(other)
    wrapped = [DistributedDataParallel(each, gradient_as_bucket_view=bucket_view) for each in (model, other)]
    optimizers = [torch.optim.AdamW(tensors, lr=0.01) for tensors in (lk.adapter_parameters(model), [flat])]
    for _ in range(3):
        for each, optimizer in zip(wrapped, optimizers, strict=True):
            each(x[2 * rank : 2 * rank + 2]).square().mean().backward()
            optimizer.step()
            (each if by == "model" else optimizer).zero_grad()
    for got, wanted in zip(lk.adapter_parameters(other), lk.adapter_parameters(model), strict=True):
        assert torch.equal(got, wanted)


def flat_fsdp(rank, folder):
    model, x, *_ = prepared("auto")
    flat = lk.flat_parameter(model)
    optimizer = torch.optim.SGD([flat], lr=0.1)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    with pytest.raises(lk.LorakitError, match="fully_shard"):
        optimizer.step()
    with pytest.raises(lk.LorakitError, match="DTensor"):
        lk.flat_parameter(model)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("by", ["model", "optimizer"])
def test_a_flat_parameter_trains_under_ddp_as_the_separate_tensors_do(bucket_view, by, tmp_path):
    in_processes(flat_ddp, tmp_path, bucket_view, by)


def test_a_flat_parameter_and_shards_are_refused(tmp_path):
    in_processes(flat_fsdp, tmp_path)


@over_modes
def test_ddp_trains_as_one_process(mode, tmp_path):
    in_processes(ddp, tmp_path, mode)


def test_attaching_to_the_ddp_wrapper_is_refused_as_it_would_sync_no_gradient(tmp_path):
    in_processes(attach_after_ddp, tmp_path)


@over_modes
def test_fsdp2_trains_as_one_process(mode, tmp_path):
    in_processes(fsdp, tmp_path, mode)


def test_an_adapter_is_saved_whole_from_a_sharded_model(tmp_path):
    in_processes(fsdp_save, tmp_path, "auto")
