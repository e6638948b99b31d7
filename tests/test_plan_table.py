"""The table of a plan: predicted costs beside measured ones, what it says where they are unknown, its warnings."""

from __future__ import annotations

import copy
import re

import pytest
import superfine
import torch
import transformers
from small_models import bert, gpt2, llama, mlp, t5
from superfine.plan_table import plan_costs
from superfine.select import select
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROWS, LENGTH = 2, 16


def saved_bytes(model, inputs):
    """What autograd holds after a forward: storages once, without parameters, buffers and inputs."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values())
           if isinstance(t, torch.Tensor)}  # fmt: skip
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert loss.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def measured(model, inputs):
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return saved_bytes(model, inputs), counter.get_total_flops()


def inputs_of(model):
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 30
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # a batch with padding: without any, attention takes a shorter way
    classifier = "SequenceClassification" in type(model).__name__
    labels = torch.zeros(ROWS, dtype=torch.long) if classifier else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def eager(build, **arguments):
    model = build(**arguments)
    model.set_attn_implementation("eager")  # torch counts no FLOPs of the CPU's attention kernel
    return model


@pytest.mark.parametrize(
    ("build", "selectors"),
    [
        (bert, ("all",)),
        (bert, ("last:2", "head")),
        (bert, ("biases",)),
        (gpt2, ("layers:1",)),
        (gpt2, ("last:1", "norms")),
        (llama, ("norms",)),
        (llama, ("last:1", "head")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_predicted_costs_are_the_measured_ones(build, selectors):
    model = eager(build).train()
    plan = select(model, *selectors)
    costs = plan_costs(plan, tokens=ROWS * LENGTH, rows=ROWS)
    inputs = inputs_of(model)
    if build is bert:
        inputs.pop("use_cache")
    saved, flops = measured(model, inputs)
    assert costs.plan.activations.total() == pytest.approx(saved, rel=0.03)
    assert costs.plan.flops.total() == pytest.approx(flops, rel=0.01)
    assert costs.plan.uncounted == ()


@pytest.mark.parametrize("build", [bert, llama])
def test_activations_with_the_attention_kernel_of_the_cpu(build):
    model = build().train()
    plan = select(model, "last:1", "norms")
    costs = plan_costs(plan, tokens=ROWS * LENGTH, rows=ROWS)
    inputs = inputs_of(model)
    if build is bert:
        inputs.pop("use_cache")
    assert costs.plan.activations.total() == pytest.approx(saved_bytes(model, inputs), rel=0.1)


def test_costs_lie_where_they_arise():
    model = eager(gpt2)
    costs = plan_costs(select(model, "last:1"), tokens=ROWS * LENGTH, rows=ROWS)
    blocks = [f"transformer.h.{n}" for n in range(3)]
    assert [costs.plan.activations[block] > 0 for block in blocks] == [False, False, True]
    forward = costs.plan.flops[blocks[0]]
    assert costs.plan.flops[blocks[1]] == forward
    assert costs.full.flops[blocks[1]] == 3 * forward  # forward, gradients of inputs, of weights
    assert costs.plan.flops[blocks[2]] == 3 * forward  # its first norm trains, before its first product
    assert costs.plan.flops["lm_head"] == 2 * 2 * ROWS * LENGTH * 32 * 8  # no gradient of its weight


def test_a_prediction_changes_nothing_and_draws_nothing():
    model = bert()
    model.config.problem_type = None
    plan = select(model.eval(), "last:1")
    model.bert.encoder.layer[0].train()
    parameters = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    print(plan)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad == (n in plan.names) for n, p in model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())
    assert model.config.problem_type is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_fused_loss_saves_no_logits_and_its_products_count():
    from superfine.hf import use_fused_loss

    model = eager(llama)
    plan = select(model, "last:1", "head")
    before = plan_costs(plan, tokens=ROWS * LENGTH, rows=ROWS)
    use_fused_loss(model, logits=False)
    after = plan_costs(plan, tokens=ROWS * LENGTH, rows=ROWS)
    assert after.plan.uncounted == ()
    assert after.plan.activations.total() < before.plan.activations.total()
    # So few logits fit into one tile and are kept; more of them would be made again in backward.
    assert after.plan.flops.total() == before.plan.flops.total()


def test_encoder_decoder_plain_module_and_meta_device():
    assert plan_costs(select(t5(), "last:1")).plan.flops["decoder.block.1"] > 0
    costs = plan_costs(select(mlp(), "last:1"), tokens=8, rows=2)
    assert costs.plan.flops.total() == 2 * 8 * (16 + 16 + 8) + 2 * 8 * 8
    assert costs.plan.activations.total() == 8 * 4 * 4  # the input of the last linear
    with torch.device("meta"):
        model = mlp()
    assert plan_costs(select(model, "last:1"), tokens=8, rows=2).plan == costs.plan


def test_inputs_given_and_inputs_unknown():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    plan = select(model, "head")
    assert "unknown: no inputs are known for a Sequential: plan.table(inputs=...)" in str(plan)
    total = next(line for line in str(plan).splitlines() if line.startswith("total"))
    assert total.split().count("?") == 2
    text = plan.table(inputs=(torch.zeros(5, 3, 4, 4),))
    assert "the inputs given, of shapes (5, 3, 4, 4)" in text
    assert "?" not in text
    wrong = plan.table(inputs=(torch.zeros(5, 3, 9, 9),))
    assert "unknown: RuntimeError" in wrong
    assert plan.table(inputs={"input": torch.zeros(5, 3, 4, 4)}).splitlines()[:4] == text.splitlines()[:4]


def test_a_model_that_looks_at_values_is_unknown_and_says_so():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if bool(x.sum() > 0) else x

    assert "GFLOPs and activations are unknown: DataDependentOutputException" in str(select(Looks(), "all"))


@pytest.mark.parametrize(
    ("build", "selection"),
    [
        (bert, {"selectors": ("last:1", "head")}),
        (llama, {"selectors": ("last:1",), "rows": {"embed_tokens": [1, 2]}, "cols": {"*.down_proj": 0.25}}),
        (gpt2, {"selectors": ("last:1",), "rows": {"lm_head": [3]}, "tied": "head"}),
    ],
)
def test_full_fine_tuning_of_a_prepared_model_costs_what_it_did_before(build, selection):
    model = build()
    chosen = dict(selection)
    plan = select(model, *chosen.pop("selectors"), **chosen)
    before = plan_costs(plan, tokens=32, rows=2)
    prepared = superfine.prepare(model, plan)
    with torch.no_grad():
        for parameter in plan.parameters():
            parameter.add_(1)
    model.train()  # which writes slices into their weights
    kept = {name: p.clone() for name, p in model.named_parameters()}
    versions = {name: (p._version, p.requires_grad) for name, p in model.named_parameters()}
    parts = {name: type(module) for name, module in model.named_modules()}
    after = plan_costs(plan, tokens=32, rows=2)
    assert (after.full.flops, after.full.activations) == (before.full.flops, before.full.activations)
    assert after.plan.activations.total() < before.full.activations.total()
    text = plan.table(tokens=32, rows=2)
    assert "?" not in text
    assert "as it was prepared; full fine-tuning of the model before that" in text
    assert {name: (p._version, p.requires_grad) for name, p in model.named_parameters()} == versions
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert {name: type(module) for name, module in model.named_modules()} == parts
    assert vars(model)["_superfine_prepared"] is prepared

    model.odd = [torch.ones(1, requires_grad=True) * 2]  # no leaf: deepcopy refuses it
    text = plan.table(tokens=32, rows=2)
    line = next(line for line in text.splitlines() if line.startswith("full"))
    assert line.split().count("?") == 2
    assert "full fine-tuning is unknown: RuntimeError: Only Tensors created explicitly" in text


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (4, 8), (4, 0), (1.5, 1)])
def test_bad_sizes(tokens, rows):
    with pytest.raises(ValueError, match="expected 1 <= rows <= tokens"):
        select(mlp(), "all").table(tokens=tokens, rows=rows)


@pytest.mark.parametrize(
    ("build", "selectors", "warning"),
    [
        (bert, ("layers:1", "head"), "flow through 2 frozen blocks above block 1, .*cheaper: 'last:1'"),
        (bert, ("first:2",), "flow through 2 frozen blocks above block 0, .*cheaper: 'last:2'"),
        (bert, ("layers:0,3",), "flow through 2 frozen blocks above block 0, .*cheaper: 'last:2'"),
        (bert, ("biases",), "only vectors train: .*cheaper: 'biases&last:2'"),
        (llama, ("norms",), "only vectors train: .*% of full fine-tuning's .*cheaper: 'norms&last:2'"),
        (bert, ("embeddings", "head"), "embeddings.weight comes first: .* all 4 blocks, .*cheaper: 'last:1'"),
        (
            gpt2,
            ("head", "embeddings", "last:1"),
            "lm_head.weight is tied to transformer.wte.weight, .*'last:1'",
        ),
        (bert, ("last:2", "head"), None),
        (bert, ("all",), None),
        (bert, ("norms&last:2",), None),
    ],
)
def test_what_is_needlessly_dear_is_said_with_what_is_cheaper(build, selectors, warning):
    text = select(build(), *selectors).table(tokens=32, rows=2)
    last = text.splitlines()[-1]
    if warning is None:
        assert not last.startswith("!")
    else:
        assert re.match(f"! .*{warning}", last), last


def test_lines_totals_and_bytes():
    model = gpt2()
    text = select(model, "last:1").table(tokens=16, rows=1)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    layer = sum(p.numel() for p in model.transformer.h[0].parameters())
    assert lines["transformer.h.0-1"].split()[1:3] == ["-", f"{2 * layer:,}"]
    assert lines["transformer.h.2"].split()[-4:] == [
        f"{4 * layer / 1e3:.1f}",
        "kB",
        f"{8 * layer / 1e3:.1f}",
        "kB",
    ]
    assert lines["lm_head"].split()[1] == "tied"
    assert text.splitlines()[-1].endswith("forward and backward of 16 tokens in sequences of 16")


def test_low_precision_counts_its_own_bytes():
    model = llama()
    wide = plan_costs(select(model, "last:1"), tokens=32, rows=2).plan.activations["model.layers.2"]
    narrow = plan_costs(select(model.bfloat16(), "last:1"), tokens=32, rows=2).plan.activations[
        "model.layers.2"
    ]
    assert wide / 2 < narrow < wide  # HF's RMSNorm keeps float32


def test_bare_encoder_has_no_loss_and_its_output_is_summed():
    model = transformers.BertModel(bert().config)
    assert plan_costs(select(model, "last:1")).plan.flops["encoder.layer.3"] > 0
