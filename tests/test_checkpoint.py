"""checkpoint.py: whenever a run is killed, each of its files is complete, or refused by name."""
import json

import pytest
import torch
from safetensors.torch import save_file

from scale import checkpoint
from scale.checkpoint import append_jsonl, forget_after, load_state, read_jsonl, save_state, write_json

STATE = {"weight/a": torch.rand(3, 4), "exp_avg/a": torch.rand(3, 4).bfloat16(),
         "step/a": torch.tensor(7.0), "view": torch.arange(6).reshape(2, 3).T}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------- the state

def test_state_comes_back_bit_for_bit(tmp_path):
    """Tensors of every type, also 0-dimensional and transposed ones. The folder is created."""
    save_state(tmp_path / "run" / "state", 12, STATE)
    step, tensors = load_state(tmp_path / "run" / "state")
    assert step == 12 and same(tensors, STATE)
    save_state(tmp_path / "run" / "state", 13, {"b": torch.ones(1)})
    step, tensors = load_state(tmp_path / "run" / "state")
    assert step == 13 and same(tensors, {"b": torch.ones(1)})
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("dies_in", ["save_file", "os.fsync", "os.replace"])
def test_a_kill_while_saving_leaves_the_old_state(tmp_path, monkeypatch, dies_in):
    """A run killed in the middle of a save had lost the old state and had half of the new one.
    Here half a file has a temporary name, and the next save overwrites it."""
    save_state(tmp_path, 1, STATE)

    def half_a_file(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        with open(path, "rb+") as file:
            file.truncate(200)
        raise KeyboardInterrupt

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(f"scale.checkpoint.{dies_in}", half_a_file if dies_in == "save_file" else killed)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, 2, {"b": torch.ones(100)})
    step, tensors = load_state(tmp_path)
    assert step == 1 and same(tensors, STATE)
    save_state(tmp_path, 3, {"b": torch.ones(1)})
    assert load_state(tmp_path)[0] == 3


def test_data_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """Otherwise a power cut leaves an empty file under the new name."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(checkpoint.os, name)
        monkeypatch.setattr(checkpoint.os, name,
                            lambda *args, name=name, real=real: (order.append(name), real(*args)))
    save_state(tmp_path, 1, STATE)
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_state_is_refused_by_name(tmp_path, keep):
    save_state(tmp_path, 1, STATE)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state\.safetensors: damaged"):
        load_state(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"other": "1"}, {"step": "many"}])
def test_a_file_that_is_no_state_is_refused_by_name(tmp_path, metadata):
    save_file({"a": torch.ones(1)}, str(tmp_path / "state.safetensors"), metadata=metadata)
    with pytest.raises(ValueError, match=r"state\.safetensors: .*not a saved state"):
        load_state(tmp_path)


def test_missing_state_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors: no saved state"):
        load_state(tmp_path / "nowhere")


# ---------------------------------------------------------------------------- JSON

def test_a_kill_while_writing_json_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"accuracy": 0.5, "name": "Zürich"})
    with pytest.raises(TypeError):
        write_json(path, {"accuracy": torch.ones(1)})

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("scale.checkpoint.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {})
    assert json.loads(path.read_text(encoding="utf-8")) == {"accuracy": 0.5, "name": "Zürich"}
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]


def test_lines_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    rows = [{"step": n, "loss": 0.1 * n, "text": "a\nb\tZürich 圆"} for n in range(3)]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\x85", "\x1e", "\r", "\r\n"], ids=ascii)
def test_an_answer_with_an_exotic_line_break_is_one_line(tmp_path, text):
    """str.splitlines also breaks at U+2028 and U+0085, which JSON leaves as they are. One sampled
    answer with such a character hid all later lines, and the next resume then deleted them from
    the file."""
    path = tmp_path / "rollouts.jsonl"
    rows = [{"step": 1, "response": f"one{text}two"}, {"step": 2, "response": "three"}]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    forget_after(path, 2)
    assert read_jsonl(path) == rows


def test_a_last_line_cut_anywhere_is_left_out(tmp_path):
    """At every byte, also in the middle of a character of several bytes: that one could not even
    be decoded, so a killed run could not be resumed."""
    path = tmp_path / "rollouts.jsonl"
    append_jsonl(path, {"step": 1})
    first = path.stat().st_size
    append_jsonl(path, {"step": 2, "text": "圆"})
    whole = path.read_bytes()
    for size in range(first, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert read_jsonl(path) == [{"step": 1}], size
    path.write_bytes(whole[:-1])                       # only the line's end is missing
    assert len(read_jsonl(path)) == 2


@pytest.mark.parametrize("line", ['{"step": 2', "\0\0", "", "NaN2"])
def test_a_damaged_line_among_others_is_named(tmp_path, line):
    """All behind it was left out, so a table of runs showed one of 50 steps and said nothing."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: damaged"):
        read_jsonl(path)


def test_a_resumed_run_appends_after_a_cut_line(tmp_path):
    """A line appended to half a line would be lost together with it."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_jsonl(path, {"step": step})
    for whole_lines, cut in ((3, '{"step": 4, "lo'), (3, '{"step": 4}')):
        path.write_text("".join(f'{{"step": {n}}}\n' for n in range(1, whole_lines + 1)) + cut)
        forget_after(path, 4)
        append_jsonl(path, {"step": 5})
        assert read_jsonl(path)[-1] == {"step": 5}
        assert [row["step"] for row in read_jsonl(path)][:3] == [1, 2, 3]


def test_forget_after_keeps_the_finished_steps(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    forget_after(path, 3)
    assert not path.exists()
    for step in (1, 2, 3, 4, 5):
        append_jsonl(path, {"step": step, "text": "Zürich"})

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("scale.checkpoint.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            forget_after(path, 3)
    assert len(read_jsonl(path)) == 5, "a kill in between forgets nothing"
    forget_after(path, 3)
    assert read_jsonl(path) == [{"step": step, "text": "Zürich"} for step in (1, 2, 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
