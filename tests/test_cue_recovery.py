"""cue_recovery.py: the absorbed form against the textbook, and the hooks against the stock model.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_cue_recovery.py

"Awake" is a module whose W_O (and gains) are not what they start as, so that it changes the model.
It has every=2: three blocks, before layers 1, 3 and 5 of the tiny model's six.
"""
import copy
import inspect
import math

import pytest
import torch
import transformers
from safetensors.torch import save_file

import model as qwen
import rollout
from conftest import append_response
from cue_recovery import Block, attach, load, read_settings

PROJECTIONS = ("query", "key", "value", "output")


def awaken(cue):
    """Random W_O, and gains that are not one."""
    for name, parameter in cue.named_parameters():
        if "output" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return cue


@pytest.fixture
def awake(tiny):
    """(model, processor, module): the tiny model with an awake module."""
    model, processor = tiny
    return model, processor, awaken(attach(model, every=2))


@pytest.fixture
def batch(loaded, ragged):
    """Left-padded rows with one, no, two and one picture."""
    return loaded[1].batch(ragged)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def states_entering(model, batch):
    """(layers, B, L, D): what each decoder layer reads, after every hook."""
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
             for layer in model.model.language_model.layers]
    logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def assert_close(found, expected):
    """Equal up to float32 rounding, measured against the largest entry: logits differ in scale."""
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def calls_of(modules):
    """Count the calls of some modules: {index: calls}, filled as they happen."""
    calls = dict.fromkeys(range(len(modules)), 0)
    for n, module in enumerate(modules):
        module.register_forward_hook(lambda *_, n=n: calls.__setitem__(n, calls[n] + 1))
    return calls


def gradients(model, batch):
    """name -> gradient of a loss that depends on every logit of the batch's real tokens."""
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    (logits.log_softmax(-1) ** 2).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------- the mathematics

def textbook(block, x, sink, visual):
    """Eq. 3-5 once more, apart from cue_recovery.py's: row by row, so without a mask.
    x (B, L, D), sink (B,), visual (B, L) bool. Returns new states and attention (B, H, L)."""
    def normed(states, gain):
        return states / (states.pow(2).mean(-1, keepdim=True) + gain.eps).sqrt() * gain.weight

    out, maps = [], x.new_zeros(x.shape[0], block.heads, x.shape[1])
    for row, (states, where) in enumerate(zip(x, visual)):
        column = torch.arange(x.shape[1]) == sink[row]
        if not where.any():
            out.append(states)
            continue
        V = normed(states[where], block.visual_norm)                                  # (N, D)
        q = (normed(states[column], block.sink_norm) @ block.query.weight.T).view(block.heads, -1)
        K, U = ((V @ W.weight.T).view(len(V), block.heads, -1) for W in (block.key, block.value))
        a = (torch.einsum("hd,nhd->hn", q, K) / math.sqrt(q.shape[1])).softmax(-1)
        z = torch.einsum("hn,nhd->hd", a, U).reshape(-1) @ block.output.weight.T
        out.append(states + column[:, None] * z)
        maps[row, :, where] = a
    return torch.stack(out), maps


def random_block(hidden, heads, dtype=torch.float64):
    block = Block(hidden, heads, 1e-6).to(dtype)
    for name in PROJECTIONS:
        torch.nn.init.normal_(getattr(block, name).weight, std=hidden**-0.5)
    return awaken(block)


def random_case(B, L, hidden, dtype=torch.float64):
    """States of uneven size, sinks in the left quarter, pictures behind, none in the last row."""
    x = torch.randn(B, L, hidden, dtype=dtype) * torch.rand(B, L, 1, dtype=dtype) * 5
    sink = torch.randint(0, max(1, L // 4), (B,))
    visual = torch.rand(B, L) < 0.6
    visual[:, :L // 4 + 1] = visual[:, -1] = False
    if B > 1:
        visual[-1] = False
    visual[0, L // 2:L // 2 + 2] = True      # two at least: over one, the softmax is constant
    return x, sink, visual


def run(block, x, sink, visual):
    """The block on the span that holds all visual tokens; attention put back into L columns."""
    columns = visual.any(0).nonzero()
    lo, hi = int(columns.min()), int(columns.max()) + 1
    out, attention = block(x, sink, visual[:, lo:hi], lo, hi)
    return out, torch.nn.functional.pad(attention, (lo, x.shape[1] - hi))


@pytest.mark.parametrize("form", ["textbook", "absorbed"])
@pytest.mark.parametrize("B, L, hidden, heads", [(1, 8, 16, 1), (2, 12, 16, 4), (4, 40, 24, 3),
                                                 (3, 100, 64, 16)])
def test_absorbed_is_textbook_attention(B, L, hidden, heads, form):
    """Both forms, against the rows above: values, attention, every gradient, in float64."""
    block = random_block(hidden, heads)
    block.absorbed = getattr(block, form)                   # the one that forward() calls
    x, sink, visual = random_case(B, L, hidden)
    inputs = [x.requires_grad_(), *block.parameters()]
    (out, attention), (expected, maps) = (f(block, x, sink, visual) for f in (run, textbook))
    assert (out - x).abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(attention, maps, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(x)
    found, wanted = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, expected))
    assert len(found) == 1 + 6 and all(grad.abs().max() > 0 for grad in wanted)
    for grad, exact in zip(found, wanted):
        torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-10)


def test_bfloat16_is_close_to_textbook():
    """Rounding only: the change of the sink is within 3 % of the exact one, same weights."""
    block = random_block(64, 4, torch.bfloat16)
    x, sink, visual = random_case(4, 60, 64, torch.bfloat16)
    out, attention = run(block, x, sink, visual)
    expected, _ = textbook(block.double(), x.double(), sink, visual)
    error = (out.double() - expected).norm() / (expected - x.double()).norm()
    assert out.dtype == torch.bfloat16 and attention.dtype == torch.float32 and error < 0.03


def test_no_gradient_is_nan_for_a_row_without_a_picture():
    """PITFALLS 9: with -inf for the masked scores such a row gives NaN, and NaN * 0 is NaN. A
    finite fill leaves the row as it is, and its gradient is the one that came in."""
    block = random_block(16, 2)
    x, sink, visual = random_case(3, 20, 16)
    out, attention = run(block, x.requires_grad_(), sink, visual)
    assert torch.equal(out[-1], x[-1]) and not attention[-1].any()
    grads = torch.autograd.grad(out.sum(), [x, *block.parameters()])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.equal(grads[0][-1], torch.ones_like(x[-1]))


def test_the_input_is_not_written_into():
    """PITFALLS 11: an in-place write through a view changes what another layer still holds."""
    block = random_block(16, 2)
    x, sink, visual = random_case(3, 20, 16)
    before = x.clone()
    assert not torch.equal(run(block, x, sink, visual)[0], before) and torch.equal(x, before)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(ValueError, match="30 is not a multiple of 4"):
        Block(30, 4, 1e-6)


# ---------------------------------------------------------------------------- where and when

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 5])
def test_identity_at_the_start(tiny, batch, dtype, every):
    """W_O is zero: bit for bit the base model, in rows with pictures and without."""
    model = tiny[0].to(dtype)
    stock = logits_of(model, batch)
    cue = attach(model, every)
    assert {p.dtype for p in cue.parameters()} == {dtype}
    assert torch.equal(logits_of(model, batch), stock)
    assert logits_of(model, batch).dtype == dtype
    awaken(cue)
    assert not torch.equal(logits_of(model, batch), stock)


def test_attach_leaves_the_global_generator_alone(tiny):
    """nn.Linear draws its first weights from torch's global generator, so that attaching shifted
    every later random number: runs with the module and without then differ by more than it."""
    before = torch.get_rng_state()
    first = attach(tiny[0], seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    tiny[0].cue_recovery.detach()
    torch.rand(3)
    again, other = (attach(copy.deepcopy(tiny[0]), seed=seed).state_dict() for seed in (7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.key.weight"], other["blocks.0.key.weight"])


def test_rows_without_pictures_are_untouched(loaded, awake, batch):
    """Beside rows that change, and in a batch of text alone: bit for bit the stock model."""
    model, processor, cue = awake
    stock, changed = logits_of(loaded[0], batch), logits_of(model, batch)
    assert torch.equal(changed[1], stock[1])
    assert not any(torch.equal(changed[row, -1], stock[row, -1]) for row in (0, 2, 3))
    calls = calls_of(list(cue.blocks.values()))
    words = [processor.prompt({"images": [], "question": text}) for text in ("a", "b c d")]
    text = processor.batch(words)
    assert torch.equal(logits_of(model, text), logits_of(loaded[0], text))
    assert set(calls.values()) == {0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_first_real_token_changes(awake, ragged, side):
    """The sink is the first non-padding column of each row, whatever the side of the padding."""
    model, processor, cue = awake
    batch, changes = processor.batch(ragged, side), []
    for block in cue.blocks.values():
        block.register_forward_hook(
            lambda _, args, out: changes.append((out[0] != args[0]).any(-1)))
    logits_of(model, batch)
    first = [row.nonzero()[0].item() for row in batch["attention_mask"]]
    assert len(changes) == 3 and (len(set(first)) > 1) == (side == "left")
    for change in changes:
        where = change.nonzero().tolist()
        assert where == [[row, first[row]] for row in (0, 2, 3)]       # row 1 has no picture


@pytest.fixture
def last(tiny):
    """(model, processor, module) with an awake module whose sink is the prompt's last token."""
    model, processor = tiny
    return model, processor, awaken(attach(model, every=2, sink="last"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_sink_is_the_last_token_of_each_prompt(last, ragged, side):
    """Only that column changes on its way into the second layer, wherever the padding is."""
    model, processor, cue = last
    batch = processor.batch(ragged, side=side)
    columns = torch.arange(batch["input_ids"].shape[1])
    with cue.prompt((batch["attention_mask"] * (columns + 1)).amax(1)):
        after, logits = states_entering(model, batch)[1], logits_of(model, batch)
    with torch.no_grad():       # a prefill finds the same column by itself
        assert torch.equal(model(**batch, use_cache=True).logits, logits)
    cue.detach()
    before = states_entering(model, batch)[1]
    changed = (after != before).any(-1)                                       # (B, L)
    for row, prompt in enumerate(ragged):
        real = batch["attention_mask"][row].nonzero()[:, 0]
        expected = [int(real[-1])] if prompt.grids else []
        assert changed[row].nonzero()[:, 0].tolist() == expected


def test_the_last_sink_is_the_prompts_end_and_not_the_sequences(last, ragged):
    """Cached sampling and one whole forward over prompt and response must see the same student: the
    sink on the response's last token would train a model that nobody ever samples from."""
    model, processor, cue = last
    batch = processor.batch(ragged)
    length = batch["input_ids"].shape[1]
    out = rollout.sample(model, batch, max_new_tokens=6, temperature=0, stop_ids=())
    both = append_response(batch, out.ids, out.lengths)
    with cue.prompt(length), torch.no_grad():
        logits = model(**both, use_cache=False).logits[:, length - 1:-1]
    found = logits.log_softmax(-1).gather(2, out.ids[..., None])[..., 0]
    assert_close(found, out.logprobs)
    with pytest.raises(ValueError, match="say where the prompt ends"):
        model(**both, use_cache=False)
    # and the class's own generate, whose prefill has no prompt() around it
    theirs = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert theirs[:, length:].tolist() == out.ids.tolist()


def test_the_sinks_place_is_saved(last, tiny, tmp_path):
    model, processor, cue = last
    cue.save(tmp_path / "cue.safetensors")
    cue.detach()
    assert load(model, tmp_path / "cue.safetensors").sink == "last"
    with pytest.raises(ValueError, match="sink 'middle', expected first or last"):
        attach(copy.deepcopy(model), sink="middle")


def test_an_unpadded_batch_needs_no_mask(awake, ragged):
    """Without an attention mask the sink is column 0."""
    model, processor, _ = awake
    batch = processor.batch(ragged[:1])
    expected = logits_of(model, batch)
    del batch["attention_mask"]
    assert_close(logits_of(model, batch), expected)


def test_padding_changes_nothing(awake, ragged):
    """Left-padded, right-padded and alone: the same logits at every real token."""
    model, processor, _ = awake
    left, right = (processor.batch(ragged, side) for side in ("left", "right"))
    real = [logits_of(model, b)[b["attention_mask"].bool()] for b in (left, right)]
    assert_close(*real)
    alone = torch.cat([logits_of(model, processor.batch([prompt]))[0] for prompt in ragged])
    assert_close(real[0], alone)


def test_one_row_asks_only_its_own_pictures(awake, records):
    """Other pixels in row 1 leave row 0 as it was, bit for bit, and change row 1."""
    model, processor, _ = awake
    first, second, third = (processor.prompt(r) for r in records[:3])
    third = qwen.Prompt(second.ids, second.pixels.flip(0), second.grids)
    a, b = (logits_of(model, processor.batch([first, other])) for other in (second, third))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1, -1], b[1, -1])


@pytest.mark.parametrize("every, places", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]),
                                           (5, [0]), (100, [0])])
def test_blocks_stand_before_a_layer_that_reads_them(tiny, every, places):
    """The release puts a block after the last layer of the 8B model, where no token can read the
    sink any more. With six layers, the one at 5 (every=1 and 5) is the one left out."""
    cue = attach(tiny[0], every)
    assert cue.settings()["layers"] == places == [int(name) for name in cue.blocks]
    layers = tiny[0].model.language_model.layers
    hooked = [n for n, layer in enumerate(layers) if layer._forward_pre_hooks]
    assert hooked == [place + 1 for place in places]


def test_a_block_sees_what_the_next_layer_reads(loaded, tiny, batch):
    """DeepStack adds picture features to the states *after* layer 0 has returned: a forward hook on
    layer 0 would read them too early. A block sees what the next layer of the stock reads."""
    outputs, seen = [], []
    loaded_layers = loaded[0].model.language_model.layers
    hook = loaded_layers[0].register_forward_hook(lambda _, args, out: outputs.append(out.clone()))
    stock = states_entering(loaded[0], batch)
    hook.remove()
    for block in attach(tiny[0], every=2).blocks.values():
        block.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    logits_of(tiny[0], batch)
    assert torch.equal(torch.stack(seen), stock[[1, 3, 5]])
    added = (stock[1] - outputs[0]).abs().amax(-1) > 1e-6
    assert torch.equal(added, batch["input_ids"] == loaded[0].config.image_token_id)


def test_the_next_layer_reads_the_updated_sink(loaded, awake, batch):
    """h_sink <- h_sink + z with z from the textbook, on the states of the stock model."""
    model, _, cue = awake
    stock, states = states_entering(loaded[0], batch), states_entering(model, batch)
    visual = batch["input_ids"] == model.config.image_token_id
    sink = batch["attention_mask"].argmax(1)
    expected, _ = textbook(cue.blocks["0"].double(), stock[1].double(), sink, visual)
    assert_close(states[1].double(), expected)
    assert (states[1] - stock[1]).abs().max() > 1e-3 * stock[1].abs().max()
    assert torch.equal(states[0], stock[0])


def test_once_in_prefill_and_never_in_decode(awake, batch):
    """rollout.sample and model.generate say the same tokens, and ask the picture once each."""
    model, _, cue = awake
    model.generation_config.eos_token_id = None
    calls = calls_of(list(cue.blocks.values()))
    ours = rollout.sample(model, batch, max_new_tokens=8, temperature=0, stop_ids=[-1])
    assert calls == {0: 1, 1: 1, 2: 1}
    stock_inputs = {name: value for name, value in batch.items() if name != "position_ids"}
    theirs = model.generate(**stock_inputs, max_new_tokens=8, do_sample=False)
    assert calls == {0: 2, 1: 2, 2: 2}
    assert ours.ids.shape == (4, 8) and torch.equal(theirs[:, -8:], ours.ids)


def test_cached_is_uncached(loaded, awake, batch):
    """Scoring the sampled tokens in one pass without a cache gives the sampler's log-probs: the
    sink's new state is in the cache, and nothing more happens to it while decoding."""
    model, processor, _ = awake
    banned = processor.banned_ids
    out = rollout.sample(model, batch, max_new_tokens=8, stop_ids=[-1], banned_ids=banned)
    whole = append_response(batch, out.ids, out.lengths)
    for scorer, same in ((model, True), (loaded[0], False)):
        logits = logits_of(scorer, {**whole, "use_cache": False})[:, -9:-1]
        logits[:, :, banned] = float("-inf")
        scored = logits.log_softmax(-1).gather(2, out.ids[:, :, None])[:, :, 0]
        assert torch.allclose(scored, out.logprobs, atol=1e-4) == same


def test_an_empty_cache_is_a_prefill(awake, batch):
    """generate hands the prefill a cache that is there but empty."""
    model, _, cue = awake
    calls = calls_of(list(cue.blocks.values()))
    name = "cache" if "cache" in inspect.signature(
        type(model).forward).parameters else "past_key_values"
    cache = transformers.DynamicCache()
    with torch.no_grad():
        out = model(**batch, use_cache=True, **{name: cache})
    assert torch.equal(out.logits, logits_of(model, batch)) and set(calls.values()) == {2}


def test_parameters_are_those_of_the_paper(tiny):
    """4 D^2 and two gains a block; 100.7 M for the 2B model (paper, section 3.2), and for the 8B
    model seven blocks, one less than the release, which has one behind the last layer."""
    for block in attach(tiny[0], 2).blocks.values():
        assert sum(p.numel() for p in block.parameters()) == 4 * 128**2 + 2 * 128
    sizes = (28, 2048, 16, 6, 100.7), (36, 4096, 32, 7, 469.8)
    for depth, hidden, heads, blocks, millions in sizes:
        config = copy.deepcopy(tiny[0].config)
        config.text_config.num_hidden_layers = depth
        with torch.device("meta"):
            narrow = transformers.Qwen3VLForConditionalGeneration(config)
        wide = Block(hidden, heads, 1e-6)
        each = sum(p.numel() for p in wide.parameters())
        assert len(attach(narrow).blocks) == blocks and each == 4 * hidden**2 + 2 * hidden
        assert round(blocks * each / 1e6, 1) == millions


# ---------------------------------------------------------------------------- gradients

def test_pitfall_24_gradient_checkpointing_gives_the_same_gradients(awake, batch):
    """Checkpointing runs layers again during backward, and with transformers before 5.23 the hooks
    too: with the masks cleared after the forward, the module silently got no gradient at all."""
    model, _, _ = awake
    model.train()
    expected = gradients(model, batch)
    calls = calls_of([layer.self_attn for layer in model.model.language_model.layers])
    model.gradient_checkpointing_enable()
    found = gradients(model, batch)
    assert set(calls.values()) == {2}                     # once forward, once in backward
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_which_weights_learn(tiny, batch):
    """At the start only W_O has a gradient (of the others, z = U W_O knows nothing yet); after one
    step of it all have. A block after the last layer would fail here: nothing reads its sink."""
    model, _ = tiny
    cue = attach(model, every=1)
    gradients(model, batch)
    learn = {name for name, p in cue.named_parameters() if p.grad.abs().max() > 0}
    assert learn == {f"blocks.{n}.output.weight" for n in range(5)}
    torch.optim.SGD([p for n, p in cue.named_parameters() if "output" in n], lr=1.0).step()
    gradients(model, batch)
    assert all(p.grad.abs().max() > 0 for p in cue.parameters())
    assert len(list(cue.parameters())) == 5 * 6


def test_rows_without_pictures_have_finite_gradients(awake, batch):
    for name, grad in gradients(awake[0], batch).items():
        assert grad is not None and torch.isfinite(grad).all(), name


# ---------------------------------------------------------------------------- attach and detach

def hook_count(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_detach_gives_the_stock_model_back(loaded, awake, batch):
    model, _, cue = awake
    assert hook_count(model) > hook_count(loaded[0])
    cue.detach()
    assert torch.equal(logits_of(model, batch), logits_of(loaded[0], batch))
    assert hook_count(model) == hook_count(loaded[0]) and not hasattr(model, "cue_recovery")
    assert model.state_dict().keys() == loaded[0].state_dict().keys()
    cue.detach()                                                  # twice does no harm
    attach(model)


def test_a_deep_copy_has_its_own_module(awake, loaded, batch):
    """A hook that closes over the module makes a copy of the model use the original's. The teacher
    is such a copy: what is done to it must not reach the student, nor the other way."""
    model, _, cue = awake
    before = logits_of(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, batch), before)
    awaken(twin.cue_recovery)
    twin.cue_recovery.keep_attention = True
    assert not torch.equal(logits_of(twin, batch), before)
    assert torch.equal(logits_of(model, batch), before) and cue.attention == {}
    twin.cue_recovery.detach()
    assert torch.equal(logits_of(twin, batch), logits_of(loaded[0], batch))
    assert torch.equal(logits_of(model, batch), before) and model.cue_recovery is cue


def test_bad_attachments_are_refused(tiny):
    model, _ = tiny
    cue = attach(model)
    with pytest.raises(ValueError, match="already; detach"):
        attach(model)
    cue.detach()
    with pytest.raises(ValueError, match="every=0 with 6"):
        attach(model, every=0)
    del model.model.language_model.layers[1:]
    with pytest.raises(ValueError, match="with 1 decoder layers"):
        attach(model)
    assert not hasattr(model, "cue_recovery") and hook_count(model) == 0
    text_only = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no model.language_model"):
        attach(text_only)


def test_input_embeddings_are_refused(awake, ragged):
    """Without ids nobody knows where the pictures are; silence would be the stock model."""
    model, processor, _ = awake
    batch = processor.batch(ragged[1:2])
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        logits_of(model, {**batch, "inputs_embeds": embeddings})


def test_another_mask_is_refused(awake, batch):
    """A ready-made (B, 1, L, L) mask does not say which tokens are padding."""
    flat = batch["attention_mask"].bool()
    square = flat[:, None, None].expand(-1, 1, flat.shape[1], -1)
    with pytest.raises(ValueError, match=r"\(B, L\) attention mask .* got torch.Size\(\[4, 1,"):
        logits_of(awake[0], {**batch, "attention_mask": square})


def test_off_is_the_stock_model_and_ends(awake, loaded, batch):
    """Also nested, and after an error inside: on again afterwards, as it was."""
    model, _, cue = awake
    on, stock = logits_of(model, batch), logits_of(loaded[0], batch)
    with pytest.raises(KeyError):
        with cue.off():
            with cue.off():
                assert torch.equal(logits_of(model, batch), stock)
            assert torch.equal(logits_of(model, batch), stock)
            raise KeyError
    assert torch.equal(logits_of(model, batch), on) and not torch.equal(on, stock)


# ---------------------------------------------------------------------------- files and maps

def test_save_and_load(awake, loaded, batch, tmp_path):
    model, _, cue = awake
    cue.save(tmp_path / "cue.safetensors")
    settings = {"every": 2, "layers": [0, 2, 4], "hidden": 128, "heads": 4, "sink": "first"}
    assert read_settings(tmp_path / "cue.safetensors") == settings == cue.settings()
    other = copy.deepcopy(loaded[0])
    load(other, tmp_path / "cue.safetensors")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    half = load(copy.deepcopy(loaded[0]).bfloat16(), tmp_path / "cue.safetensors")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_module_of_another_shape_is_refused(awake, tiny, loaded, tmp_path):
    """Both settings are in the message; and a model that load() was called on is left as it was,
    without a module of random weights in it."""
    awake[2].save(tmp_path / "cue.safetensors")
    config = copy.deepcopy(loaded[0].config)
    config.text_config.num_hidden_layers = 3
    shallow = transformers.Qwen3VLForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"saved with .*\[0, 2, 4\].* this module has .*\[0\]"):
        load(shallow, tmp_path / "cue.safetensors")
    assert not hasattr(shallow, "cue_recovery") and hook_count(shallow) == 0
    with pytest.raises(ValueError, match="'every': 2.*'every': 1"):
        attach(shallow, every=1).load(tmp_path / "cue.safetensors")


def test_a_foreign_file_is_refused(tiny, tmp_path):
    save_file({"blocks.0.output.weight": torch.zeros(9)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="other.safetensors: not a cue recovery file"):
        load(tiny[0], tmp_path / "other.safetensors")
    assert not hasattr(tiny[0], "cue_recovery")


def test_attention_maps(awake, batch):
    """On request, one map a block: for every head a distribution over the row's visual tokens, and
    zero elsewhere and in rows without a picture. They outlive the decode steps that follow."""
    model, _, cue = awake
    logits_of(model, batch)
    assert cue.attention == {}
    cue.keep_attention = True
    rollout.sample(model, batch, max_new_tokens=3, stop_ids=[-1])
    visual = batch["input_ids"] == model.config.image_token_id
    assert list(cue.attention) == [0, 2, 4]
    for attention in cue.attention.values():
        assert attention.shape == (4, 4, visual.shape[1])
        sums = attention.sum(-1)
        torch.testing.assert_close(sums, visual.any(1, keepdim=True).float().expand_as(sums))
        assert torch.equal(attention > 0, visual[:, None].expand_as(attention))
    gradients(model, batch)
    assert not any(attention.requires_grad for attention in cue.attention.values())
    cue.keep_attention = False
    logits_of(model, batch)
    assert cue.attention == {}
