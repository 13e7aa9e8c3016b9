"""Shared fixtures: the shipped tiny checkpoint, toy records, and the project's root on the path."""
import copy
import os
import random
import sys
from pathlib import Path

# Before torch is imported: two threads on a busy two-core machine wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import model as qwen  # noqa: E402
from data import toy  # noqa: E402


def append_response(batch: dict, ids: torch.Tensor, lengths: torch.Tensor) -> dict:
    """Left-padded prompts (B, L) and right-padded responses (B, T) as one batch (B, L + T).

    The response stands in the last T columns of every row, so its logits are those of columns
    L - 1 .. L + T - 2: logit t predicts token t + 1. Pictures are passed through.

    >>> prompt = {"input_ids": torch.tensor([[0, 7, 8], [4, 5, 6]]),
    ...           "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    ...           "position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]]).expand(3, 2, 3)}
    >>> both = append_response(prompt, torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]))
    >>> both["input_ids"].tolist()
    [[0, 7, 8, 1, 2], [4, 5, 6, 3, 0]]
    >>> both["attention_mask"].tolist()
    [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    >>> both["position_ids"][0].tolist()
    [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    """
    T = ids.shape[1]
    steps = torch.arange(T, device=ids.device)
    mask, positions = batch["attention_mask"], batch["position_ids"]
    last = positions.masked_fill(mask == 0, -1).amax(dim=(0, 2))                    # (B,)
    after = (last[:, None] + 1 + steps).expand(3, -1, -1)                           # (3, B, T)
    out = dict(batch)
    out["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    out["attention_mask"] = torch.cat([mask, (steps < lengths[:, None]).to(mask.dtype)], dim=1)
    out["position_ids"] = torch.cat([positions, after], dim=2)
    if "mm_token_type_ids" in out:
        kinds = out["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(ids.shape)], dim=1)
    return out


@pytest.fixture(scope="session")
def loaded():
    """(model, processor) of the shipped checkpoint, loaded once. Do not change it: use `tiny`."""
    return qwen.load(qwen.TINY, device="cpu")


@pytest.fixture
def tiny(loaded):
    """A fresh copy of the tiny model and its processor."""
    model, processor = loaded
    return copy.deepcopy(model), processor


@pytest.fixture(scope="session")
def records():
    """24 toy records with PIL pictures of three sizes, so that every batch is ragged."""
    rng, out = random.Random(5), []
    for n in range(24):
        scene = toy.make_scene(rng, "test")
        record = toy.make_record(scene, toy.make_question(scene, rng), f"t-{n}", "")
        out.append({**record, "images": [toy.draw(scene, rng)]})
    return out


@pytest.fixture(scope="session")
def ragged(loaded, records):
    """Four prompts of different length, with one, no, two and one picture."""
    _, processor = loaded
    two = {"images": records[1]["images"] + records[2]["images"], "question": "Are they alike?"}
    text = {"images": [], "question": "What is behind the door?"}
    return [processor.prompt(record) for record in (records[0], text, two, records[3])]


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A small toy world on disk."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    toy.write(folder, train=40, test=16, seed=3)
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Two processes need 20 s: they are started first, and looked at when their tests come."""
    items.sort(key=lambda item: item.name != "test_launch")
