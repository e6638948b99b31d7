"""PrefixCache: losses and gradients are those without it, nothing stale is used, what cannot be served is said."""

from __future__ import annotations

import copy
import pickle

import pytest
import small_models
import superfine
import torch
import transformers
from superfine._cache_codec import decode, encode
from superfine._swap import _split
from superfine.hf import use_fused_loss
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


#: Model, what trains, and how many of how many blocks are cached.
FAMILIES = {
    "bert": (small_models.bert, ("last:1", "head"), "3 of 4"),
    "bert head": (small_models.bert, ("head",), "4 of 4"),
    "bert mlm": (lambda: small_models.bert("BertForMaskedLM"), ("last:2",), "2 of 4"),
    "roberta": (small_models.roberta, ("last:1", "head"), "2 of 3"),
    "distilbert": (small_models.distilbert, ("last:2", "head"), "1 of 3"),
    "gpt2": (small_models.gpt2, ("last:1",), "2 of 3"),
    "gpt2 classifier": (lambda: small_models.gpt2("GPT2ForSequenceClassification"), ("head",), "3 of 3"),
    "llama": (small_models.llama, ("last:1", "head"), "2 of 3"),
    "t5": (small_models.t5, ("decoder.block.*",), "3 of 3"),
}


def batch(model, side="right", rows=4, tokens=6):
    """Rows of different lengths, and labels that the model's loss takes."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, small_models.VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        keep = tokens - row % 4
        mask[row, keep:] = 0
    if side == "left":
        mask = mask.flip(1)
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    if (
        model.config.architectures is None
        and hasattr(model, "num_labels")
        and "Sequence" in type(model).__name__
    ):
        labels = torch.arange(rows) % model.num_labels
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def made(family="bert", **options):
    model_of, selectors, _ = FAMILIES[family]
    model = model_of().eval()
    plan = superfine.select(model, *selectors)
    return model, plan, superfine.PrefixCache(model, plan, **options)


def outcome(model, plan, inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs.loss.detach(), {
        name: parameter.grad.clone() for name, parameter in plan.named_parameters()
    }


def assert_equal(actual, expected, tolerance=1e-6):
    assert abs(actual[0] - expected[0]) <= tolerance
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).abs().max() <= tolerance * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_without(family, side):
    model, plan, cache = made(family)
    inputs = batch(model, side)
    expected = outcome(model, plan, inputs)
    assert FAMILIES[family][2] in repr(cache)
    calls = []
    for path in cache.place.blocks:  # nothing inside the frozen blocks runs
        inner = next(module for module in model.get_submodule(path).modules() if isinstance(module, nn.LayerNorm)
                     or "Norm" in type(module).__name__)  # fmt: skip
        inner.register_forward_hook(lambda *_: calls.append(1))
    with cache:
        assert_equal(outcome(model, plan, inputs), expected)
        assert (cache.hits, cache.misses, len(calls) > 0) == (0, 4, True)
        calls.clear()
        assert_equal(outcome(model, plan, inputs), expected)
        assert (cache.hits, cache.misses, calls) == (4, 4, [])
    assert_equal(outcome(model, plan, inputs), expected)
    assert calls
    assert cache.hits == 4


def test_samples_are_found_again_in_other_batches():
    """Order, company and the width of padding change from epoch to epoch."""
    model, plan, cache = made()
    inputs = batch(model)
    with cache:
        model(**inputs)
        chosen = torch.tensor([3, 1, 3])  # at most 5 tokens
        narrow = {
            name: value[chosen][..., :5] if value.ndim > 1 else value[chosen]
            for name, value in inputs.items()
        }
        cached = outcome(model, plan, narrow)
        assert (cache.hits, cache.misses) == (3, 4)
    assert_equal(cached, outcome(model, plan, narrow))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "element"), [("bf16", 2e-2, 2), ("fp16", 2e-3, 2), ("int8", 3e-2, 1.5)]
)
def test_smaller_dtypes_are_close_and_smaller(dtype, tolerance, element):
    model, plan, cache = made(dtype=dtype)
    inputs = batch(model)
    expected = outcome(model, plan, inputs)
    with cache:
        first, second = outcome(model, plan, inputs), outcome(model, plan, inputs)
    assert_equal(first, second, 0)  # a step is the same whether states were computed or found
    assert_equal(first, expected, tolerance)
    assert cache.nbytes == 18 * 8 * element  # 18 tokens of width 8; int8 has a scale of 4 bytes


def test_int8_keeps_infinities_and_nans_apart_from_other_tokens():
    states = torch.randn(1, 4, 8)
    states[0, 1, 2], states[0, 2, 0], states[0, 3] = torch.nan, torch.inf, 0
    records = encode(states, [4], "int8")
    again = decode(records, records[0], 4, 8, states.device)[0]
    assert (again[0] - states[0, 0]).abs().max() <= states[0, 0].abs().max() / 250
    assert not again[1].isfinite().any()
    assert not again[2].isfinite().all()
    assert again[3].eq(0).all()


def test_bf16_models_and_autocast_keep_their_own_states():
    model, _, cache = made("llama")
    inputs = batch(model)
    with cache:
        plain = model(**inputs).loss
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**inputs).loss
            assert (cache.hits, cache.misses) == (0, 8)
            assert torch.equal(model(**inputs).loss, mixed)
        assert torch.equal(model(**inputs).loss, plain)
        assert (cache.hits, cache.misses) == (8, 8)
    model = small_models.llama().bfloat16().eval()
    plan = superfine.select(model, "last:1")
    expected = outcome(model, plan, inputs)
    with superfine.PrefixCache(model, plan) as cache:
        outcome(model, plan, inputs)
        assert_equal(outcome(model, plan, inputs), expected, 0)
        assert cache.nbytes == 18 * 8 * 2


CHANGES = {
    "ids": lambda inputs, model: inputs["input_ids"][:, 0].neg_().add_(31),
    "token types": lambda inputs, model: inputs.update(token_type_ids=torch.ones_like(inputs["input_ids"])),
    "positions": lambda inputs, model: inputs.update(position_ids=torch.arange(1, 7).expand(4, 6)),
    "mask": lambda inputs, model: inputs["attention_mask"].index_fill_(1, torch.tensor(1), 0),
    "attention": lambda inputs, model: model.set_attn_implementation("eager"),
    "configuration": lambda inputs, model: setattr(model.config, "layer_norm_eps", 1e-3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_states_changes_the_key(change):
    model, plan, cache = made()
    inputs = batch(model)
    with cache:
        model(**inputs)
        CHANGES[change](inputs, model)
        changed = outcome(model, plan, inputs)
        assert (cache.hits, cache.misses) == (0, 8)
        assert_equal(outcome(model, plan, inputs), changed, 0)
        assert (cache.hits, cache.misses) == (4, 8)
    assert_equal(changed, outcome(model, plan, inputs))


def test_no_mask_is_a_mask_of_ones_and_nothing_but_padding_is_no_sample():
    model, plan, cache = made("gpt2")
    inputs = batch(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with cache:
        model(**inputs)
        del inputs["attention_mask"]
        cached = outcome(model, plan, inputs)
        assert (cache.hits, cache.misses) == (4, 4)
    assert_equal(cached, outcome(model, plan, inputs))
    model, _, cache = made()
    inputs = batch(model)
    inputs["attention_mask"][1:] = 0
    with cache:
        assert model(**inputs).loss.isfinite()
        assert len(cache) == 1
        inputs["attention_mask"][:] = 0
        model(**inputs)
        assert len(cache) == 1


def test_weights_that_change_are_noticed():
    model, plan, cache = made()
    inputs = batch(model)
    weight = model.bert.encoder.layer[0].output.dense.weight
    with cache:
        expected = model(**inputs).loss
        model.load_state_dict(model.state_dict())  # the same values
        assert torch.equal(model(**inputs).loss, expected)
        with torch.no_grad():
            weight[0, 0] += 1
        with pytest.raises(
            ValueError, match=r"'bert.encoder.layer.0.output.dense.weight' has changed since .* make a new"
        ):
            model(**inputs)
    with pytest.raises(ValueError, match="has changed since the cache was made"):
        cache.attach()
    cache = superfine.PrefixCache(model, plan)
    weight.data[0, 0] += 1  # seen when it is attached
    with pytest.raises(ValueError, match=r"a frozen tensor or setting has changed|dense.weight' has changed"):
        cache.attach()
    cache = superfine.PrefixCache(model, plan)
    with cache:
        model(**inputs)
        model.bert.encoder.layer[1].output.dense.weight = nn.Parameter(
            torch.zeros(8, 16), requires_grad=False
        )
        with pytest.raises(ValueError, match=r"'bert.encoder.layer.1.output.dense.weight' has changed"):
            model(**inputs)
    with superfine.PrefixCache(model, plan):
        superfine.select(model, "all")
        with pytest.raises(ValueError, match=r"'bert.embeddings.word_embeddings.weight' requires a gradient"):
            model(**inputs)


def test_training_moves_the_suffix_alone_and_epochs_agree():
    torch.manual_seed(0)
    base = small_models.bert()
    runs = []
    for cached in (False, True):
        model = copy.deepcopy(base).eval()
        plan = superfine.select(model, "last:1", "head")
        optimizer = plan.optimizer("adamw", lr=1e-2)
        cache = superfine.PrefixCache(model, plan)
        if cached:
            cache.attach()
        losses = []
        for _ in range(5):
            loss = model(**batch(model)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)
    assert runs[1][4] < runs[1][0]


def test_dropout_in_the_prefix_is_refused_unless_agreed():
    model, plan, cache = made()
    inputs = batch(model)
    model.train()
    with (
        cache,
        pytest.raises(ValueError, match=r"'bert.embeddings.dropout' is in train mode.* expected eval_prefix"),
    ):
        model(**inputs)
    for module in (model.bert.embeddings, model.bert.encoder.layer[:3]):
        module.eval()
    with cache:
        model(**inputs)  # as superfine.prepare leaves a prefix
    model.train()
    with superfine.PrefixCache(model, plan, eval_prefix=True) as agreed:
        model(**inputs)
        states = [record.payload for record in agreed._store.get(agreed._samples(inputs).keys)]
        assert all(module.training for module in model.modules())
        assert len({model(**inputs).loss.item() for _ in range(3)}) == 3  # dropout after the prefix goes on
        assert (agreed.hits, agreed.misses) == (12, 4)
    model.eval()
    for kept, plain in zip(states, cache._store.get(cache._samples(inputs).keys), strict=True):
        assert (kept == plain.payload).all()


REFUSED = {
    "packed positions": ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 4)}, "start anew within a row"),
    "4-D mask": ({"attention_mask": torch.ones(4, 1, 6, 6)}, r"attention_mask has the shape \(4, 1, 6, 6\)"),
    "weights as a mask": ({"attention_mask": torch.full((4, 6), 0.5)}, "other values than 0 and 1"),
    "packed sequences": (
        {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
        "cu_seq_lens_q is given; expected one document",
    ),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states is set; expected not"),
    "attentions": ({"output_attentions": True}, "output_attentions is set"),
    "something unknown": ({"langs": torch.zeros(4, 6)}, "langs is given; expected none beside input_ids"),
    "embeddings": (
        {"input_ids": None, "inputs_embeds": torch.zeros(4, 6, 8)},
        "inputs_embeds is given; expected inp",
    ),
    "positions of another shape": (
        {"position_ids": torch.zeros(3, 4, 6, dtype=torch.long)},
        "position_ids has the",
    ),
    "floats as ids": (
        {"input_ids": torch.zeros(4, 6)},
        "input_ids is torch.float32; expected a tensor of integers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_cannot_be_served_are_refused(case):
    model, _, cache = made("llama")
    changes, message = REFUSED[case]
    inputs = {key: value for key, value in (batch(model) | changes).items() if value is not None}
    with cache, pytest.raises(ValueError, match=f"PrefixCache: .*{message}"):
        model(**inputs)
    assert len(cache) == 0


def test_models_that_cannot_be_served_are_refused():
    model = small_models.bert()
    with pytest.raises(
        ValueError, match=r"'bert.embeddings.word_embeddings.weight' trains; expected a frozen prefix"
    ):
        superfine.PrefixCache(model, superfine.select(model, "all"))
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.0.attention.self.query.weight' trains"):
        superfine.PrefixCache(model, superfine.select(model, "*query*"))
    plan = superfine.select(model, "head")
    with pytest.raises(ValueError, match="dtype is 'int4'; expected one of fp32, bf16, fp16, int8"):
        superfine.PrefixCache(model, plan, dtype="int4")
    with pytest.raises(ValueError, match="max_bytes is 0; expected a positive number"):
        superfine.PrefixCache(model, plan, max_bytes=0)
    with pytest.raises(ValueError, match="plan is another model's"):
        superfine.PrefixCache(small_models.bert(), plan)
    with pytest.raises(TypeError, match="plan is str"):
        superfine.PrefixCache(model, "last:1")
    with (
        superfine.PrefixCache(model, plan),
        pytest.raises(ValueError, match="has a cache attached; expected none"),
    ):
        superfine.PrefixCache(model, plan)
    tied = small_models.gpt2()
    with pytest.raises(ValueError, match=r"'transformer.wte.weight' trains; expected a frozen prefix"):
        superfine.PrefixCache(tied, superfine.select(tied, "transformer.wte.weight", "lm_head.weight"))
    plain = small_models.mlp()
    with pytest.raises(ValueError, match=r"nothing around .* takes input_ids; expected a model of token ids"):
        superfine.PrefixCache(plain, superfine.select(plain, "4.*"))
    partly = small_models.t5()
    with pytest.raises(
        ValueError, match="hands more to the next block than hidden states; expected all 3 blocks"
    ):
        superfine.PrefixCache(partly, superfine.select(partly, "encoder.block.2.*"))


def test_generation_runs_uncached():
    model, _, cache = made("gpt2")
    prompt = batch(model)["input_ids"][:, :3]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    with cache:
        assert torch.equal(model.generate(prompt, **options), expected)
        with torch.no_grad():
            assert model(prompt, use_cache=True).past_key_values.get_seq_length() == 3
        assert len(cache) == 0
        assert model(prompt).past_key_values is None
        assert len(cache) == 4


def test_copies_and_pickles_have_no_cache():
    model, _, cache = made()
    inputs = batch(model)
    with cache:
        expected = model(**inputs).loss
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**inputs).loss, expected)
            plan = superfine.select(other, "last:1", "head")
            with superfine.PrefixCache(other, plan) as own:
                assert torch.equal(other(**inputs).loss, expected)
                assert own.misses == 4
        assert (cache.hits, cache.misses) == (0, 4)
    assert not any(_split(module)[1] for module in model.modules())
    assert not any("_superfine_prefix_cache" in vars(module) for module in model.modules())


def test_memory_is_bounded_by_what_was_used_last():
    model, plan, _ = made()
    inputs = batch(model)
    cache = superfine.PrefixCache(
        model, plan, max_bytes=13 * 8 * 4
    )  # tokens of the three shortest: 5 + 4 + 3, and 1
    with cache:
        expected = model(**inputs).loss
        assert cache.nbytes <= 13 * 8 * 4
        assert len(cache) == 3
        assert torch.equal(model(**inputs).loss, expected)  # states in use are not lost
        assert (cache.hits, cache.misses) == (3, 5)


def test_fill_and_a_directory_that_outlives_the_process(tmp_path):
    model, plan, cache = made(directory=tmp_path / "states")
    inputs = batch(model)
    loader = torch.utils.data.DataLoader(range(4), batch_size=3, num_workers=1, collate_fn=lambda rows: {
        name: value[rows] for name, value in inputs.items()})  # fmt: skip
    assert cache.fill(loader) == 4
    with pytest.raises(TypeError, match="a batch is Tensor; expected a mapping"):
        cache.fill([inputs["input_ids"]])
    assert cache.fill((({**inputs}, None) for _ in range(2)), progress=False) == 0
    assert (len(cache), cache.hits, cache.misses) == (4, 0, 0)
    expected = outcome(model, plan, inputs)
    again = superfine.PrefixCache(model, plan, tmp_path / "states")
    with again:
        assert_equal(outcome(model, plan, inputs), expected)
        assert (again.hits, again.misses) == (4, 0)
    with pytest.raises(
        ValueError, match="with dtype 'fp32'; expected 'int8': pass another directory, or delete"
    ):
        superfine.PrefixCache(model, plan, tmp_path / "states", dtype="int8")
    with pytest.raises(ValueError, match="another model or plan, with blocks '3 of 4'; expected '2 of 4'"):
        superfine.PrefixCache(model, superfine.select(model, "last:2"), tmp_path / "states")
    other = small_models.bert()
    with pytest.raises(ValueError, match=r"another model or plan, with prefix '.*'; expected '.*'"):
        superfine.PrefixCache(other, superfine.select(other, "last:1"), tmp_path / "states")


def test_fused_loss_and_checkpointing():
    model, plan, _ = made("gpt2")
    inputs = batch(model)
    expected = outcome(model, plan, inputs)
    use_fused_loss(model, logits=False)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    with superfine.PrefixCache(model, plan, eval_prefix=True):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        for _ in range(2):
            assert_equal(outcome(model, plan, inputs), expected, 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo, where a graph ends
def test_under_torch_compile():
    """With graph breaks around the look-up."""
    model, plan, cache = made("llama")
    inputs = batch(model)
    expected = outcome(model, plan, inputs)
    compiled = torch.compile(model, backend="eager")
    with cache:
        for _ in range(2):
            model.zero_grad()
            loss = compiled(**inputs).loss
            loss.backward()
            assert abs(loss.detach() - expected[0]) <= 1e-6
        assert (cache.hits, cache.misses) == (4, 4)
    for name, parameter in plan.named_parameters():
        assert (parameter.grad - expected[1][name]).abs().max() <= 1e-6
    torch.compiler.reset()


@pytest.mark.filterwarnings("default")  # Trainer and accelerate give warnings of their own
def test_under_transformers_trainer(tmp_path):
    """Which passes arguments of its own, trains for epochs in other orders, and validates."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    model, plan, _ = made("gpt2")
    inputs = batch(model)
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=2,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    before = model.transformer.h[2].mlp.c_fc.weight.detach().clone()
    with superfine.PrefixCache(model, plan, eval_prefix=True) as cache:
        transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows).train()
        assert (cache.misses, cache.hits) == (4, 3 * 4 + 3 * 4 - 4)
    assert not torch.equal(model.transformer.h[2].mlp.c_fc.weight, before)
