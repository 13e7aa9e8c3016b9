"""probe.py: does the probe find what is there, and nothing where nothing is?"""
import pytest
import torch

import cue_recovery
from analysis import baselines, probe
from conftest import ROOT
from scale.checkpoint import write_json


def random_states(n=400, size=16, seed=0):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def test_a_linear_fact_is_found_and_an_absent_one_is_not():
    """Column 0 of Y is linear in X and rare (1 in 6), column 1 is a coin."""
    x, coin = random_states(1200), random_states(1200, 1, seed=1)[:, 0]
    y = torch.stack([(x[:, 3] > 1).float(), (coin > 0).float()], 1) * 2 - 1
    found, absent = probe.probe(x[:800], y[:800], x[800:], y[800:]).tolist()
    assert found > 0.9 and 0.4 < absent < 0.6


def test_a_constant_state_is_at_chance():
    """The first token without a module: the same number for every prompt, up to rounding."""
    x = torch.full((300, 8), 3.0) + 1e-7 * random_states(300, 8)
    y = torch.where(random_states(300, 1, seed=2) > 0.5, 1.0, -1.0)
    assert probe.probe(x[:200], y[:200], x[200:], y[200:]).item() == 0.5


def test_facts_are_words_and_pairs_neither_rare_nor_everywhere():
    records = [{"cue": f"The picture shows a {c} circle."} for c in ("red", "blue") * 20]
    records[0] = {"cue": "A wolf."}
    # "red", "a red" and "red circle" always agree, so the shortest is kept; a wolf is too rare
    facts = probe.choose_facts(records)
    assert facts == ["blue", "red"]
    assert probe.stated(records[1:3], facts).tolist() == [[1, -1], [-1, 1]]


@pytest.mark.parametrize("sink", ["first", "last"])
def test_the_states_are_those_that_the_layers_read(tiny, records, sink):
    """With the module's update in them, in the order of the records, whatever the batches."""
    model, processor = tiny
    cue = cue_recovery.attach(model, every=2, sink=sink)
    plain = probe.sink_states(model, processor, records[:5], sink, batch_size=2)
    torch.nn.init.normal_(cue.blocks["0"].output.weight, std=0.1)
    states = probe.sink_states(model, processor, records[:5], sink, batch_size=2)
    depth = model.config.text_config.num_hidden_layers
    assert [s.shape for s in states] == [(5, 128)] * (depth + 1)
    assert torch.equal(states[0], plain[0]) and not torch.equal(states[1], plain[1])
    if sink == "first":                        # nothing stands before it
        assert plain[-1].std(0).max() < 1e-4 < states[-1].std(0).max()
    one = probe.sink_states(model, processor, records[3:4], sink)
    assert torch.allclose(states[-1][3], one[-1][0], atol=1e-4)
    assert not model.model.language_model.norm._forward_pre_hooks


@pytest.mark.parametrize("sink", ["first", "last"])
def test_blind_queries_look_at_all_tokens_alike(tiny, records, sink):
    """With queries of 0 each token shares its attention evenly; with the model's own it does not."""
    model, processor = tiny
    *own, even = probe.attention_on(model, processor, records[:2], sink, limit=5)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.data.zero_()
    *blind, again = probe.attention_on(model, processor, records[:2], sink, limit=5)
    assert len(own) == len(model.model.language_model.layers)
    assert blind == pytest.approx([again] * len(blind)) and own != pytest.approx([even] * len(own))



def test_a_runs_checkpoint_is_probed_on_the_runs_own_records(tmp_path, monkeypatch):
    """It is not the tiny model's folder, so a world of a real model's size was drawn for it."""
    (tmp_path / "checkpoint").mkdir()
    write_json(tmp_path / "args.json", {"data": "a.jsonl", "eval_data": "b.jsonl", "max_pixels": 9})
    read, loaded = [], {}
    monkeypatch.setattr(probe.record_files, "load", lambda path, _: read.append(str(path)) or [])
    monkeypatch.setattr(probe, "load", lambda *_, **options: loaded.update(options) or (None, None))
    with pytest.raises(SystemExit, match="no word stands"):
        probe.main(["--model", str(tmp_path / "checkpoint")])
    assert read == ["a.jsonl", "b.jsonl"] and loaded == {"min_pixels": None, "max_pixels": 9}


def test_the_grid_is_made_of_flags_that_exist():
    """analysis/grid.sh hands its arms to distill.py; a flag that is gone would fail after an hour."""
    import distill
    lines = (ROOT / "analysis" / "grid.sh").read_text().split('arms="')[1].split('"')[0]
    arms = [line.split() for line in lines.strip().splitlines()]
    assert len(arms) == len({name for name, *_ in arms}) >= 9
    for _, seeds, *flags in arms:
        assert set(seeds.split(",")) <= {"0", "1", "2"}
        flags = flags[flags[0] in baselines.METHODS:]
        config, _ = distill.read_config([*flags, "--seed", "0", "--name", "x", "--eval-every", "0"])
        assert config.eval_every == 0
