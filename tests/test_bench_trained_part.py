"""Benchmarks of partly trained models: every provider computes eager's gradients, and what they keep."""

from __future__ import annotations

import pytest
import torch
from superfine_bench import UnavailableError, fused_modules, prepare
from superfine_bench.train_step import Size
from superfine_bench.trained_part import saved

# As many layers as the selectors name.
TINY = Size(layers=8, hidden=64, heads=4, vocabulary=64, rows=2, tokens=8)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers for what it has renamed
]


def kept_by_providers(case, changes):
    """Checks the gradients of every provider; bytes that each keeps."""
    inputs = case.inputs(torch.device("cpu"))
    if isinstance(inputs, UnavailableError):
        pytest.skip(str(inputs))
    for provider in case.providers:
        call = provider.build(inputs)
        assert case.check(inputs, call) <= 1, provider.name
        assert case.check(inputs, call) <= 1, provider.name
    inputs.expected[0] += 1
    assert case.check(inputs, call) > 1
    return saved(inputs, changes)


@pytest.mark.parametrize("family", prepare.TRAINED)
def test_prepared_models_keep_less_than_transformers_checkpointing(family):
    kept = kept_by_providers(prepare._case(family, TINY), prepare.CHANGES)
    assert kept["superfine, checkpointing"] < kept["transformers checkpointing"]
    assert kept["superfine, checkpointing alone"] < kept["eager"] / 2
    assert kept["superfine"] <= kept["eager"]


@pytest.mark.parametrize(
    ("family", "selection", "share"), [("llama", fused_modules.LORA, 0.65), ("bert", "norms", 0.65)]
)
def test_recomputed_modules_keep_less_than_eager(family, selection, share):
    case = fused_modules._case(family, selection, torch.float32, TINY)
    kept = kept_by_providers(case, fused_modules.CHANGES)
    assert kept["superfine, recompute"] < share * kept["eager"]
    assert kept["superfine"] <= kept["eager"]
