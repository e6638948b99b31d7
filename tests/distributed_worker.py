"""One of two processes that train as one does with the whole batch. Run by test_distributed.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import superfine
import torch
import torch.distributed as dist
from prepare_cases import assert_same_gradients, make
from small_models import VOCAB
from superfine.hf import use_fused_loss
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

FOLDER = Path(sys.argv[1])
IDS = torch.randint(2, VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
BERT = ("bert", ("last:1", "head"), {})
SLICES = (
    "bert",
    ("last:1", "head"),
    {"rows": {"word_embeddings": [3, 4, 5]}, "cols": {"*.0.output.dense": 0.3}},
)
LLAMA = (
    "llama",
    ("norms",),
    {"rows": {"embed_tokens": [3, 4, 5], "lm_head": [1, 2]}, "cols": {"*.down_proj": 0.3}},
)


def prepared(case, dtype=torch.float64, **options):
    name, selectors, parts = case
    model = make(name, dtype)
    plan = superfine.select(model, *selectors, **parts)
    return model, plan, superfine.prepare(model, plan, **options)


def loss(model, rows):
    """Of rows of the batch; every token of a language model is a label."""
    labels = LABELS[rows] if "Bert" in type(getattr(model, "module", model)).__name__ else IDS[rows]
    return model(input_ids=IDS[rows], labels=labels).loss


def mine():
    return slice(dist.get_rank(), None, 2)


def trained_alike(plan, other, relative=1e-6):
    pairs = zip(plan.named_parameters(), other.named_parameters(), strict=True)
    for (name, parameter), (_, expected) in pairs:
        if not name.endswith("key.bias"):  # whose gradient is zero but for rounding
            found = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            torch.testing.assert_close(
                found, expected, rtol=relative, atol=relative, msg=lambda t, n=name: f"{n}: {t}"
            )


def a_prepared_model_goes_to_a_process_that_has_prepared_none():
    if dist.get_rank() == 0:
        model, plan, _ = prepared(SLICES, checkpointing=True, recompute=True)
        loss(model, slice(None)).backward()
        box = [model, {name: p.grad for name, p in plan.named_parameters()}]
    else:
        box = [None, None]
    dist.broadcast_object_list(box)
    model, expected = box
    model.zero_grad()
    loss(model, slice(None)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, 1e-9)
    superfine.restore(model)
    assert type(model) is type(make("bert"))


# --- DistributedDataParallel ----------------------------------------------------------------------------------


def gradients_and_steps_are_those_of_one_process():
    for case, fused, options, wrapper, kind in (
        (SLICES, False, {"checkpointing": True, "recompute": True}, {}, "adamw"),
        (LLAMA, True, {}, {"static_graph": True}, "lamb"),
        (LLAMA, False, {"recompute": True}, {"gradient_as_bucket_view": True}, "adamw"),
    ):
        model, plan, _ = prepared(case, **options)
        whole, of_whole, _ = prepared(case, **options)
        if fused:
            use_fused_loss(model)
        parallel = DistributedDataParallel(model, **wrapper)
        optimizer, other = (p.optimizer(kind, lr=1e-2, max_grad_norm=0.1) for p in (plan, of_whole))
        for accumulate in (False, True, False):
            other.zero_grad()
            loss(whole, slice(None)).backward()
            optimizer.zero_grad()
            if accumulate and not wrapper:
                with parallel.no_sync():
                    (loss(parallel, slice(dist.get_rank(), 4, 2)) / 2).backward()
                (loss(parallel, slice(4 + dist.get_rank(), None, 2)) / 2).backward()
            else:
                loss(parallel, mine()).backward()
            found, expected = ({n: p.grad for n, p in q.named_parameters()} for q in (plan, of_whole))
            assert_same_gradients(found, expected, 1e-6)
            optimizer.step()
            other.step()
            assert optimizer.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
            assert optimizer.grad_norm > 0.1
        trained_alike(plan, of_whole, 1e-5)


def a_wrapper_that_averages_something_else_is_an_error():
    for case in (BERT, SLICES):
        model = make(case[0], torch.float32)
        early = DistributedDataParallel(model, find_unused_parameters=True)
        superfine.prepare(model, superfine.select(model, *case[1], **case[2]))
        with pytest.raises(
            ValueError, match=r"averages the gradients of 73 parameters \(.*\), and 2\d train"
        ):
            loss(early, mine())
    model, _, done = prepared(BERT)
    parallel = DistributedDataParallel(model)
    loss(parallel, mine()).backward()
    done.update(superfine.select(model, "last:2", "head"))
    with pytest.raises(ValueError, match=r"gradients of 20 parameters \(.*\), and 36 train .* wrapped after"):
        loss(parallel, mine())
    loss(DistributedDataParallel(model), mine()).backward()


def a_cache_in_one_directory_serves_both_and_one_writes_the_delta():
    model, plan, _ = prepared(BERT, torch.float32)
    plain, of_plain, _ = prepared(BERT, torch.float32)
    data = TensorDataset(IDS, LABELS)
    sampler = DistributedSampler(data)
    steps = [
        (DistributedDataParallel(m), p.optimizer(lr=1e-3, max_grad_norm=1.0))
        for m, p in ((model, plan), (plain, of_plain))
    ]
    cache = superfine.PrefixCache(model, plan, FOLDER / "states", eval_prefix=True)
    with cache:
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for ids, labels in DataLoader(data, batch_size=2, sampler=sampler):
                for each, optimizer in steps:
                    optimizer.zero_grad()
                    each(input_ids=ids, labels=labels).loss.backward()
                    optimizer.step()
            dist.barrier()
    assert cache.hits > 0
    assert cache.hits + cache.misses == 12
    trained_alike(plan, of_plain, 1e-4)
    if dist.get_rank() == 0:
        superfine.save_delta(model, plan, FOLDER / "delta.safetensors")
    dist.barrier()
    fresh = make("bert", torch.float32)
    superfine.load_delta(fresh, FOLDER / "delta.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters(), strict=True))


# --- fully_shard ----------------------------------------------------------------------------------------------


def sharded(case=BERT, dtype=torch.float64, **options):
    model, plan, _ = prepared(case, dtype, **options)
    for block in model.bert.encoder.layer:
        fully_shard(block)
    return fully_shard(model), plan


def sharded_steps_are_those_of_one_process():
    for dtype, options, storage in (
        (torch.float64, {"checkpointing": True, "recompute": True}, {"amsgrad": True, "anchored": True}),
        (torch.bfloat16, {}, {"master_weights": "split"}),
    ):
        model, plan = sharded(BERT, dtype, **options)
        whole, of_whole, _ = prepared(BERT, dtype, **options)
        optimizer, other = (p.optimizer(lr=1e-2, max_grad_norm=0.1, **storage) for p in (plan, of_whole))
        # Of 16 bits, halves of a batch do not add up to the same gradients.
        rows = mine() if dtype == torch.float64 else slice(None)
        for _ in range(3):
            optimizer.zero_grad()
            other.zero_grad()
            loss(model, rows).backward()
            loss(whole, slice(None)).backward()
            optimizer.step()
            other.step()
            assert optimizer.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
        assert optimizer.grad_norm > 0.1
        trained_alike(plan, of_whole, 1e-6 if dtype == torch.float64 else 0.0)


def what_is_not_finite_in_one_process_is_seen_by_both():
    model, plan = sharded()
    optimizer = plan.optimizer(lr=1e-2, max_grad_norm=1.0, zero_grads=True)
    loss(model, mine()).backward()
    weight = model.classifier.weight
    before = weight.to_local().clone()
    if dist.get_rank() == 1:
        weight.grad.to_local().fill_(torch.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that steps are skipped
        optimizer.step()
    assert (optimizer.skipped_steps, optimizer.grad_norm) == (1, torch.inf)
    assert torch.equal(weight.to_local(), before)
    assert not weight.grad.to_local().any()
    loss(model, mine()).backward()
    if dist.get_rank() == 1:
        weight.grad.to_local().fill_(torch.nan)
    optimizer.error_on_nonfinite = True
    with pytest.raises(FloatingPointError, match=r"has 8 elements that are not finite"):
        optimizer.step()


def state_is_gathered_and_spread():
    model, plan = sharded(dtype=torch.float32)
    optimizer, other = (plan.optimizer(lr=1e-2, state_dtype="bf16") for _ in range(2))
    get_optimizer_state_dict(model, optimizer)  # makes state by a step of no length, which is not the first
    loss(model, mine()).backward()
    optimizer.step()
    optimizer.zero_grad()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    box = [get_optimizer_state_dict(model, optimizer, options=whole)]
    dist.broadcast_object_list(box)  # rank 0 alone has it
    spread = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, other, box[0], options=spread)
    for parameter in plan.parameters():
        for name, expected in optimizer.state[parameter].items():
            found = other.state[parameter][name]
            assert (type(found), found.dtype) == (type(expected), expected.dtype)
            assert name == "step" or torch.equal(found.to_local(), expected.to_local())
    found = get_model_state_dict(model, options=whole)
    if dist.get_rank() == 0:
        plain = make("bert", torch.float32)
        plain.load_state_dict(found)
        superfine.save_delta(plain, plan, FOLDER / "gathered.safetensors")
        superfine.load_delta(make("bert", torch.float32), FOLDER / "gathered.safetensors")


def what_would_be_wrong_of_parts_is_refused():
    plain, plan, _ = prepared(SLICES)
    with pytest.raises(ValueError, match=r"columns of .* was installed, and weight is to be split over proc"):
        fully_shard(plain.bert.encoder.layer[0])
    plain, plan, _ = prepared(BERT)
    early = plan.optimizer(lr=1.0)
    fully_shard(plain)
    loss(plain, mine()).backward()
    with pytest.raises(
        ValueError, match=r"\(and 19 others\) is another one than the optimizer has; expected an optim"
    ):
        early.step()
    model, plan = sharded(dtype=torch.float32)
    parameter = plan.names[0]
    place = rf"{next(iter(dict(model.named_parameters())))!r} is a DTensor"
    for call in (
        lambda: superfine.select(model, "head"),
        lambda: superfine.prepare(model, plan),
        lambda: superfine.PrefixCache(model, plan, eval_prefix=True),
        lambda: superfine.save_delta(model, plan, FOLDER / "parts.safetensors"),
    ):
        with pytest.raises(ValueError, match=place):
            call()
    assert "parameters are split over processes" in str(plan)
    before = model.get_parameter(parameter).to_local().clone()
    loss(model, mine()).backward()
    for kind, options, message in (
        (
            "lamb",
            {},
            r"lamb_: parameters are split over processes \(DTensor\), and adapt takes norms of whole",
        ),
        (
            "adamw",
            {"state_dtype": "8bit"},
            r"AdamW: state_dtype is torch.uint8 .* 16 or 32 bits for DTensors",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            plan.optimizer(kind, lr=1.0, **options).step()
    optimizer = plan.optimizer(lr=1.0)
    model.classifier.bias.grad = torch.distributed.tensor.DTensor.from_local(
        torch.zeros(3), model.classifier.bias.device_mesh
    )
    with pytest.raises(ValueError, match=r"adamw_: grads\[.*placed R.*; expected S"):
        optimizer.step()
    assert torch.equal(model.get_parameter(parameter).to_local(), before)


CASES = (
    a_prepared_model_goes_to_a_process_that_has_prepared_none,
    gradients_and_steps_are_those_of_one_process,
    a_wrapper_that_averages_something_else_is_an_error,
    a_cache_in_one_directory_serves_both_and_one_writes_the_delta,
    sharded_steps_are_those_of_one_process,
    what_is_not_finite_in_one_process_is_seen_by_both,
    state_is_gathered_and_spread,
    what_would_be_wrong_of_parts_is_refused,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in CASES:
        case()
        dist.barrier()
    sys.stdout.write(f"rank {dist.get_rank()}: {len(CASES)} cases\n")
    dist.destroy_process_group()
