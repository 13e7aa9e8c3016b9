"""scale/sharding.py - several processes, one student: each holds a slice of every weight (FSDP2).

The idea.  N processes (ranks), one per GPU, run the same script. A step's prompts are dealt out
like cards: rank r takes rows r, r + N, r + 2N, ... Each rank keeps 1/N of every weight, gradient
and optimizer moment. A layer is gathered just before it runs and dropped afterwards; its gradients
are summed over the ranks and cut again. All this is torch's own fully_shard. This file adds what
on-policy distillation needs around it.

    rank 0   rows 0 2 4 --sample alone--> score, micro-batch by micro-batch --.
                                            |  all-gather, reduce-scatter  >-- sum --> 1/N of update
    rank 1   rows 1 3   --sample alone--> score, the same number of them -----'

In:  the environment that torchrun sets (WORLD_SIZE, RANK, LOCAL_RANK).  Out: a few functions.
Without WORLD_SIZE, or with 1, each of them is the identity: nothing is started or sent.

The one equation.  R_r are the rows of rank r, B is the number of rows on all ranks:
    gradient = sum_r  sum_{i in R_r}  (1/B) gradient_i        a sum over ranks, not FSDP's mean

Run
    torchrun --nproc-per-node 8 distill.py --student Qwen/Qwen3-VL-8B-Instruct ...

What would bite
1) Every rank must call the same collectives in the same order, or all wait forever. Ranks differ in
   how many micro-batches they have, and in whether one has a picture in it, which decides if the
   vision tower runs. even_out() adds rows without a response token: no loss, no gradient.
2) Sampling would gather every layer once per token, and ranks stop at different times. Inside
   gathered() the student is held in full, so no rank waits for another.
3) The head is used outside of forward, by the loss. Its weight belongs to the root's group, which
   is whole from last_hidden_state() to the end of backward; a teacher has none: release() it.
4) A hook that uses weights of its own layer must be registered before fully_shard; and those
   weights may not be in that layer's group. cue_recovery's are in the root's.
5) A rank that dies ends the others: gloo's collectives fail at once, and torchrun kills ranks that
   hang in NCCL after 30 s (--shutdown-timeout). peers() turns the failure into one line.
Left out: tensor and pipeline parallelism, offloading to CPU memory. Each GPU must hold a full copy
of the student while it samples.
"""
from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch

rank, world = 0, 1          # set by start(); world is the number of processes
device = mesh = None        # this rank's device; the mesh of all ranks
PATIENCE = timedelta(hours=1)       # rank 0 may evaluate, save or draw data while the others wait


# ---------------------------------------------------------------------------- processes

def start(kind: str = "", threads: int = 0) -> None:
    """Join the other processes if torchrun started several. kind: "cuda", "cpu", "" to find out.

    threads: of the CPU, for this process; 0 for torch's choice, or OMP_NUM_THREADS's.
    """
    global rank, world, device, mesh
    if threads and "OMP_NUM_THREADS" not in os.environ:
        # two threads that share a busy core wait for each other at every product: docs/speed.md
        torch.set_num_threads(threads)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or world > 1:
        return
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} without {sorted(missing)}: "
                         "start several processes with torchrun")
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"--device {kind}: several processes run on cuda or cpu, one device each")
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU, there are "
                         f"{torch.cuda.device_count()}: lower --nproc-per-node")
    device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    # gloo beside NCCL: small values travel over it, and it notices at once that a peer is gone
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                                         timeout=PATIENCE)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh(kind, (world,))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")          # one log; errors (stderr) still show


@contextmanager
def peers():
    """Wrap the whole script: leaves the group at the end; a lost process becomes one line."""
    global rank, world, device, mesh
    outer = world == 1
    try:
        yield
    except RuntimeError as error:
        if world == 1 or not lost_a_peer(error):
            raise
        reason = str(error).strip().splitlines()[0][:120]
        print(f"rank {rank} of {world} stops: another process is gone (torchrun says below which). "
              f"--resume goes on from the last saved state. [{reason}]",
              file=sys.stderr, flush=True)
        time.sleep(1)        # torchrun blames the first failure that it sees, every 0.1 s
        sys.stdout.flush()
        os._exit(1)          # at once: an orderly end may wait for the dead
    if outer and world > 1:
        torch.distributed.destroy_process_group()
        rank, world, device, mesh = 0, 1, None, None


def lost_a_peer(error: RuntimeError) -> bool:
    """Whether this error is what a collective raises when another process has died."""
    return isinstance(error, torch.distributed.DistError) or any(
        sign in str(error) for sign in ("gloo", "Connection closed by peer", "Connection reset"))


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank == 0


# ---------------------------------------------------------------------------- rows and numbers

def share(rows):
    """This rank's rows of a list or tensor: every N-th, so shares differ by one row at most."""
    return rows[rank::world]


def gather(value) -> list:
    """Every rank's value, in order of rank: any small Python value, or a tensor on the CPU."""
    if world == 1:
        return [value]
    out = [None] * world
    torch.distributed.all_gather_object(out, value)
    return out


def collect(rows):
    """All ranks' rows in one list, in the order they had before share()."""
    if world == 1:
        return rows
    parts = gather(rows)
    out = [None] * sum(map(len, parts))
    for r, part in enumerate(parts):
        out[r::world] = part
    return out


def total(number):
    """The sum over all ranks, the same on each."""
    return sum(gather(number))


def from_main(value):
    """Rank 0's value, on every rank."""
    return gather(value)[0]


def barrier() -> None:
    """Wait until all ranks have reached this line."""
    gather(None)


@contextmanager
def main_first():
    """Rank 0 runs the block first, so that the others find what it wrote."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


# ---------------------------------------------------------------------------- models

def load_options(options: dict) -> dict:
    """What to change in the arguments of model.load: rank 0 reads the weights, into CPU memory.

    The other ranks build shapes only; shard() sends each its slices. So a machine's CPU memory
    holds one copy, not one per GPU.
    """
    if world == 1:
        return options
    return {**options, "device": "cpu" if is_main() else "meta"}


def shard(model):
    """Cut a Qwen3-VL's weights into slices, in place. Each layer is a group; the rest is the root.

    Rank 0's weights are used; the others' may be on the meta device. Parameters become DTensors:
    make the optimizer afterwards.
    """
    if world == 1:
        return
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    # gradients of bf16 weights are added up in float32
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    groups = [*model.model.visual.blocks, *model.model.language_model.layers]
    for module in (*groups, model):
        _receive(module)
        fully_shard(module, reshard_after_forward=module is not model, **options)
        module.set_gradient_divide_factor(1.0)              # a sum: rows know the batch's size
        module.set_force_sum_reduction_for_comms(True)      # gloo has no other
    model.backbone = lambda **batch: model.model(**batch).last_hidden_state
    register_fsdp_forward_method(model, "backbone")
    # torch would find the root in the first forward pass, but a rank may have nothing to sample
    model._get_fsdp_state()._lazy_init()


def _receive(module) -> None:
    """Copy rank 0's weights of this module to every rank; skip weights already in slices."""
    from torch.distributed.tensor import DTensor
    done = {}         # id -> (old, new): a tied weight has two names and must stay one tensor
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is None or isinstance(old, DTensor):
                    continue
                if id(old) not in done:
                    new = (old.detach().to(device) if is_main()
                           else torch.empty_like(old, device=device))
                    torch.distributed.broadcast(new, 0)
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, old.requires_grad)
                    done[id(old)] = old, new
                table[name] = done[id(old)][1]


def last_hidden_state(model, batch: dict) -> torch.Tensor:
    """Of model.model(**batch), in sight of the root: its head stays whole until backward ends."""
    return model.backbone(**batch, use_cache=False)


@contextmanager
def gathered(model):
    """Every rank holds the full model: forward passes need no collective. Not for backward."""
    if world == 1:
        yield
        return
    groups = _groups(model)
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in groups:
            module.set_reshard_after_forward(module is not model, recurse=False)
        release(model)


def release(model) -> None:
    """Back to slices, after forward passes without a backward pass."""
    if world > 1:
        for module in _groups(model):
            module.reshard()
        model.reset_iter_state()        # the recorded order of layers was for a backward pass


def _groups(model) -> list:
    from torch.distributed.fsdp import FSDPModule
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def even_out(processor, groups: list[list[int]], prompts, hinted, responses) -> list[list[int]]:
    """This rank's micro-batches (rows of the three lists) such that all ranks run alike.

    1) As many as the rank with the most; those that a rank lacks have blank rows only.
    2) If one rank's micro-batch has a picture, or a video, each rank's has: the tower runs on all.
    A blank row is a prompt without a response, so that it has a part in no sum. It is appended to
    the lists, whose rows keep their numbers.
    """
    def kinds(side) -> list[set]:
        return [{kind for row in rows for kind, found in (("picture", side[row].grids),
                                                          ("video", side[row].video_grids))
                 if found} for rows in groups]

    asked, taught = kinds(prompts), kinds(hinted)        # with a view their pictures are others
    everyone = gather([a | b for a, b in zip(asked, taught)])
    out = []
    for i in range(max(map(len, everyone))):
        mine = asked[i] & taught[i] if i < len(groups) else set()
        wanted = set().union(*(theirs[i] for theirs in everyone if i < len(theirs)))
        rows = list(groups[i]) if i < len(groups) else []
        for kind in sorted(wanted - mine) or ([] if rows else ["text"]):
            rows.append(len(prompts))
            for side, added in ((prompts, _blank(kind, processor)),
                                (hinted, _blank(kind, processor)), (responses, [])):
                side.append(added)
        out.append(rows)
    return out


def _blank(kind: str, processor):
    from PIL import Image
    nothing = Image.new("RGB", (32, 32))
    return processor.prompt({"id": "blank", "question": "",
                             "images": [nothing] if kind == "picture" else [],
                             **({"video": [nothing] * 2, "fps": 1.0} if kind == "video" else {})})


# ---------------------------------------------------------------------------- files

def weights(model) -> dict | None:
    """Full weights in rank 0's CPU memory, for saving; None in one process."""
    return None if world == 1 else whole(model.state_dict(keep_vars=True))


def whole(tensors: dict) -> dict:
    """Gather slices, one tensor at a time, into rank 0's CPU memory; other ranks get {}.

    All ranks must call it with the same names. A file has the same format for any number of ranks.
    """
    if world == 1:
        return tensors
    out, done = {}, {}
    for name, tensor in tensors.items():
        if id(tensor) not in done:          # tied weights are one tensor, and saved as one
            full = tensor.detach()
            full = full.full_tensor() if hasattr(full, "full_tensor") else full
            done[id(tensor)] = tensor, full.cpu() if is_main() else None
        out[name] = done[id(tensor)][1]
    return out if is_main() else {}


def cut(tensors: dict) -> dict:
    """The inverse of whole(): cut rank 0's tensors into slices on all ranks."""
    if world == 1:
        return tensors
    from torch.distributed.tensor import Shard, distribute_tensor
    # single numbers (a step count) are sent as they are; the rest as shapes first, then slices
    heads = from_main({name: tensor if tensor.dim() == 0 else tensor.to("meta")
                       for name, tensor in tensors.items()})
    out = {}
    for name, head in heads.items():
        if head.dim():
            full = tensors[name].to(device) if is_main() else torch.empty_like(head, device=device)
            head = distribute_tensor(full, mesh, [Shard(0)])
        out[name] = head
    return out
