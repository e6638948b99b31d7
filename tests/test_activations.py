"""saved_bytes counts what a forward keeps, by storages."""

import torch
from superfine._activations import saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_a_linear_layer_keeps_its_input_only_where_the_weight_trains():
    layer, x = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=True)
    hidden = lambda: layer(torch.sin(x))  # noqa: E731
    assert saved_bytes(hidden, [x]) == 16 * 8 * 4  # what sin returns; x itself is excluded
    assert saved_bytes(hidden) == 2 * 16 * 8 * 4
    layer.requires_grad_(False)
    assert saved_bytes(hidden, [x]) == 0  # the weight does not count


def test_views_of_one_storage_count_once_and_what_is_not_returned_not_at_all():
    x = torch.randn(16, 8, requires_grad=True)

    def forward():
        torch.exp(x)  # its node is freed at once
        y = torch.exp(x)
        return y[:8].square().sum() + y[8:].square().sum()

    assert saved_bytes(forward) == x.nbytes
    assert saved_bytes(lambda: torch.zeros(0, requires_grad=True).exp()) == 0
    with torch.no_grad():
        assert saved_bytes(forward) == 0


def test_a_checkpoint_counts_with_its_input_and_backward_still_works():
    block = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(4, 8, requires_grad=True)
    outputs = []

    def forward(inner):
        outputs.append(inner(torch.sin(x)).sum())
        return outputs[-1]

    plain = saved_bytes(lambda: forward(block), [x])
    kept = saved_bytes(lambda: forward(lambda y: checkpoint(block, y, use_reentrant=False)), [x])
    assert kept == x.nbytes
    assert plain == x.nbytes + 2 * 4 * 64 * 4
    gradients = [torch.autograd.grad(output, x)[0] for output in outputs]
    assert torch.equal(*gradients)
