"""Prepared models beside transformers' checkpointing: the same gradients, and fewer bytes kept."""

from __future__ import annotations

import pytest
import torch
from prepare_cases import fused_modules  # noqa: F401
from superfine_bench import UnavailableError, prepare
from superfine_bench.train_step import Size

# As many layers as the selectors name.
TINY = Size(layers=8, hidden=64, heads=4, vocabulary=64, rows=2, tokens=8)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers for what it has renamed
]


@pytest.mark.parametrize("family", prepare.TRAINED)
def test_every_provider_computes_the_gradients_of_eager_autograd_and_checkpoints_keep_less(family):
    case = prepare._case(family, TINY)
    inputs = case.inputs(torch.device("cpu"))
    if isinstance(inputs, UnavailableError):
        pytest.skip(str(inputs))
    for provider in case.providers:
        call = provider.build(inputs)
        assert case.check(inputs, call) <= 1, provider.name
        assert case.check(inputs, call) <= 1, provider.name
    kept = prepare.saved(family, TINY)
    assert kept["superfine, checkpointing"] < kept["transformers checkpointing"]
    assert kept["superfine, checkpointing alone"] < kept["eager"] / 2
    assert kept["superfine"] <= kept["eager"]
    inputs.expected[0] += 1
    assert case.check(inputs, call) > 1
