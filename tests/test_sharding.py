"""sharding.py: two gloo processes with the tiny model give the results of one, and end together.

One torchrun does everything that needs two processes (this file is also its script, see worker()).
It ends when a rank is killed; the tests look at the files it left. The references are runs of one
process.
"""
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT

from scale import checkpoint
import cue_recovery
import distill
import model as qwen
from data import records as record_files
from scale import sharding

# 5 prompts on 2 ranks, some without a picture, one row a micro-batch: nothing is even.
SMALL = ["--batch-size", "5", "--micro-batch-tokens", "1", "--max-new-tokens", "6", "--steps", "3",
         "--temperature", "2", "--eval-limit", "1", "--eval-every", "0", "--save-every", "1",
         "--warmup", "1", "--device", "cpu"]
MIXED = [*SMALL, "--data", "mixed.jsonl", "--teacher", "ema", "--eval-limit", "3",
         "--eval-every", "2", "--keep", "1"]
RUNS = {"mixed": MIXED,
        # rank 1 has no row at all
        "cue": [*SMALL, "--data", "pictures.jsonl", "--batch-size", "1", "--steps", "1",
                "--train", "cue", "--gradient-checkpointing"],
        # a teacher that only scores: the right answers, cut like a step
        "bigger": [*SMALL, "--data", "mixed.jsonl", "--teacher", str(qwen.TINY), "--train", "lora",
                   "--score-privilege", "--steps", "1", "--eval-limit", "3"],
        "text": [*SMALL, "--data", "text.jsonl", "--steps", "1", "--samples-per-prompt", "2"]}


# ---------------------------------------------------------------------------- inside of torchrun

def worker() -> None:
    """What each of the two processes does, in the folder that `launched` prepared."""
    with sharding.peers():
        sharding.start("cpu")
        for name, arguments in RUNS.items():
            keep_tokens(name, lambda: distill.main([*arguments, "--name", name]))
        bfloat16_step()
        # one process did the first step of this run; two do the second, in which one of them is
        # asked to stop; in the third it dies
        one_gets = lambda number: sharding.rank == 1 and os.kill(os.getpid(), number)   # noqa: E731
        distill.run_step = before_step(1, lambda: one_gets(signal.SIGTERM))
        with pytest.raises(SystemExit, match="130"):
            distill.main(["--resume", "runs/begun"])
        distill.run_step = before_step(2, lambda: one_gets(signal.SIGKILL))
        distill.main(["--resume", "runs/begun"])


def before_step(number: int, action):
    """distill.run_step, which calls something first at step `number` (from 0)."""
    original = distill.run_step

    def step(*arguments):
        if arguments[5] == number:
            action()
        return original(*arguments)
    return step


def keep_tokens(name: str, run) -> None:
    """Run, and write the tokens sampled at each step, in row order, to NAME.tokens.jsonl."""
    original, out = distill.sample_responses, Path(f"{name}.tokens.jsonl")

    def sample_responses(*arguments):
        got = original(*arguments)
        rows = [ids[:n].tolist() for ids, n in zip(got.ids, got.lengths)]
        K = arguments[4].samples_per_prompt
        rows = sharding.collect([rows[i:i + K] for i in range(0, len(rows), K)])
        if sharding.is_main():
            checkpoint.append_jsonl(out, {"ids": rows})
        return got
    distill.sample_responses = sample_responses
    try:
        run()
    finally:
        distill.sample_responses = original


def bfloat16_step() -> None:
    """One update in bf16, and the bytes of weights on each rank before, during and after it."""
    config = distill.Config(device="cpu", dtype="bfloat16", max_new_tokens=4, batch_size=2)
    student, teacher, processor = distill.build_models(config)
    weights = distill.choose_weights(student, "all")
    optimizer = distill.Optimizer(weights, lr=1e-3, cue_lr=1e-3, warmup=1, steps=1, final=1, clip=1)
    shards = [sum(p.to_local().untyped_storage().nbytes() for _, p in weights)]
    with sharding.gathered(student):
        whole = sum(p.untyped_storage().nbytes() for p in student.parameters())
    records = record_files.load("pictures.jsonl", ())[:2]
    metrics, _ = distill.run_step(student, teacher, processor, records, config, 0, optimizer,
                                  distill.scale_for(config, student, teacher, processor))
    shards.append(sum(p.to_local().untyped_storage().nbytes() for _, p in weights))
    rounded = all(torch.equal(p.to_local(), master.to_local().bfloat16())
                  for p, master in zip(optimizer.parameters, optimizer.masters))
    tied = student.lm_head.weight is student.model.language_model.embed_tokens.weight
    found = sharding.gather({
        "whole": whole, "of": sum(p.numel() * p.element_size() for _, p in weights),
        "shards": shards, "skipped": metrics["skipped"], "tied": tied, "rounded": rounded,
        "masters": sorted({str(master.dtype) for master in optimizer.masters})})
    if sharding.is_main():
        checkpoint.write_json("bf16.json", found)


# ---------------------------------------------------------------------------- outside

@pytest.fixture(scope="session")
def launching(toy_folder, tmp_path_factory):
    """(folder, the running torchrun). It takes 20 s, so conftest.py starts it before all tests."""
    return launch(toy_folder, tmp_path_factory.mktemp("sharding"))


def test_launch(launching):
    folder, process = launching
    assert process.returncode is None and (folder / "two" / "runs" / "begun" / "state").is_dir()


@pytest.fixture(scope="module")
def launched(launching, toy_folder, tmp_path_factory):
    """(folder, output, code): all runs by one process in FOLDER/one, by two in FOLDER/two.

    Once in some twenty launches, on a loaded machine, a process was aborted from inside of the
    collectives' C++ (SIGABRT), before the test's own SIGKILL. Then it is launched again, once.
    """
    said, code = wait_for(*launching)
    if "SIGABRT" in said:
        print(said)
        launching = launch(toy_folder, tmp_path_factory.mktemp("sharding"))
        said, code = wait_for(*launching)
    folder, here = launching[0], os.getcwd()
    os.chdir(folder / "one")
    try:
        for name, arguments in RUNS.items():
            keep_tokens(name, lambda: distill.main([*arguments, "--name", name]))
    finally:
        os.chdir(here)
    return folder, said, code


def launch(toy_folder, folder):
    rows = [json.loads(line) for line in (toy_folder / "train.jsonl").read_text().splitlines()]
    here, pristine = os.getcwd(), distill.run_step
    try:
        for name in ("one", "two"):
            (folder / name).mkdir()
            write_data(folder / name, rows, toy_folder)
        # one process starts this run, two finish it
        os.chdir(folder / "two")
        distill.run_step = before_step(1, interrupt)
        with pytest.raises(SystemExit, match="130"):         # Ctrl-C
            distill.main([*MIXED, "--name", "begun"])
    finally:
        distill.run_step = pristine
        os.chdir(here)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "said", "w") as said:                 # a pipe that nobody reads fills up
        return folder, subprocess.Popen([sys.executable, str(Path(__file__).resolve())],
                                        cwd=folder / "two", env=environment, stdout=said,
                                        stderr=subprocess.STDOUT)


def wait_for(folder, process) -> tuple[str, int]:
    """What it printed, and its exit code."""
    try:
        process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()             # torchrun then ends its processes
        process.wait(timeout=60)
        pytest.fail("two processes wait for each other:\n" + (folder / "said").read_text()[-4000:])
    return (folder / "said").read_text(), process.returncode


def write_data(folder, rows, source) -> None:
    shutil.copytree(source / "images", folder / "images")
    text = [{**row, "images": []} for row in rows]
    mixed = [t if n % 3 else row for n, (row, t) in enumerate(zip(rows, text))]
    for name, records in (("pictures", rows), ("text", text), ("mixed", mixed)):
        checkpoint.write_jsonl(folder / f"{name}.jsonl", records)
    checkpoint.write_jsonl(folder / "test.jsonl", rows[:3])


def interrupt():
    raise KeyboardInterrupt


def metrics(folder, name):
    return checkpoint.read_jsonl(folder / "runs" / name / "metrics.jsonl")


def same_metrics(a, b):
    assert len(a) == len(b) > 0
    for one, two in zip(a, b):
        assert one.keys() == two.keys()
        for key in one:
            if "second" not in key:
                # absolute: the gaps are sums that nearly cancel
                assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-7), key


@pytest.fixture(scope="module")
def start(loaded):
    """The weights that every run starts from."""
    model = copy.deepcopy(loaded[0])
    cue_recovery.attach(model, every=2, seed=0)
    return model.state_dict()


def weights(folder, name, which="checkpoint"):
    model, _ = qwen.load(folder / "runs" / name / which, device="cpu")
    return model.state_dict()


def same_change(start, one, two):
    """Two trained models differ by less than a hundredth of the change made by training.

    Rounding alone would be less. But AdamW's first steps are full steps even for a gradient of
    1e-9, whose sign is noise.
    """
    moved = sum(float((one[n] - start[n]).square().sum()) for n in start) ** 0.5
    apart = sum(float((one[n] - two[n]).square().sum()) for n in one) ** 0.5
    assert moved > 0 and apart < 0.01 * moved, (apart, moved)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_metrics_of_one(launched, name):
    """Uneven rows; a rank without rows or pictures; no pictures at all. All metrics are compared,
    also the gradient norm, which would be halved by a mean over ranks instead of the sum."""
    folder, _, _ = launched
    same_metrics(metrics(folder / "one", name), metrics(folder / "two", name))


@pytest.mark.parametrize("name", RUNS)
def test_tokens_do_not_depend_on_the_number_of_processes(launched, name):
    folder, _, _ = launched
    a, b = (checkpoint.read_jsonl(folder / n / f"{name}.tokens.jsonl") for n in ("one", "two"))
    assert a == b and len(a) > 0


@pytest.mark.parametrize("name", RUNS)
def test_the_checkpoint_is_that_of_one_process(launched, start, name):
    """The same files, config and tensors, and model.load reads them in one process."""
    folder, _, _ = launched
    one, two = (folder / n / "runs" / name / "checkpoint" for n in ("one", "two"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert (one / "config.json").read_text() == (two / "config.json").read_text()
    same_change(start, weights(folder / "one", name), weights(folder / "two", name))
    if name == "mixed":
        same_change(start, *(weights(folder / n, name, "checkpoints/step-000002")
                             for n in ("one", "two")))
    before = [json.loads((folder / n / "runs" / name / "before.json").read_text())
              for n in ("one", "two")]
    assert before[0] == before[1]


def test_each_rank_holds_its_part_and_bf16_has_float32_masters(launched):
    folder, _, _ = launched
    ranks = json.loads((folder / "two" / "bf16.json").read_text())
    assert len(ranks) == 2
    for found in ranks:
        assert found["whole"] == found["of"]
        assert all(0.49 * found["of"] < held < 0.51 * found["of"] for held in found["shards"])
        assert found["tied"] and found["rounded"] and not found["skipped"]
        assert found["masters"] == ["torch.float32"]


def test_a_killed_rank_ends_the_job_and_the_run_goes_on_with_one(launched, start, monkeypatch):
    """The survivor must not wait forever in a collective. One process does steps 1 and 3, two do
    step 2. There a signal to one of the two stopped both after the same step."""
    folder, said, code = launched
    assert code != 0
    assert re.search(r"rank 0 of 2 stops: another process is gone.*--resume", said), said[-3000:]
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", said), said[-3000:]
    for line in ("resuming runs/begun after step 1", "stopped after step 2", "begun after step 2"):
        assert said.count(line) == 1
    assert [m["step"] for m in metrics(folder / "two", "begun")] == [1, 2]
    monkeypatch.chdir(folder / "two")
    distill.main(["--resume", "runs/begun"])
    same_metrics(metrics(folder / "one", "mixed"), metrics(folder / "two", "begun"))
    same_change(start, weights(folder / "one", "mixed"), weights(folder / "two", "begun"))


def test_one_process_prints(launched):
    _, said, _ = launched
    found = re.findall(r"training records from \S*/mixed.jsonl", said)
    assert len(found) == 4                                   # "mixed", "bigger", "begun" twice


# ---------------------------------------------------------------------------- without processes

def test_alone_nothing_is_started_and_nothing_changes(tiny):
    model, processor = tiny
    sharding.start("cpu")
    assert not torch.distributed.is_initialized() and sharding.is_main()
    rows = torch.arange(3)
    assert torch.equal(sharding.collect(sharding.share(rows)), rows) and sharding.total(7) == 7
    prompts = [qwen.Prompt([5])] * 3
    assert sharding.even_out(processor, [[0, 1], [2]], prompts, prompts, [[]] * 3) == [[0, 1], [2]]
    kind = type(model)
    sharding.shard(model)
    with sharding.gathered(model):
        assert type(model) is kind
    assert sharding.weights(model) is None


@pytest.mark.parametrize("variables, message", [
    ({"WORLD_SIZE": "2"}, "torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
     "tpu")])
def test_a_half_set_environment_is_refused(monkeypatch, variables, message):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        sharding.start("tpu")


def test_micro_batches_are_evened_out(loaded, ragged, monkeypatch):
    """Three ranks: one has a picture, one a video, one no rows. All run the same sequence."""
    _, processor = loaded
    picture, text = ragged[0], ragged[1]
    kinds = [[{"picture"}, set()], [set(), set(), {"video"}], []]
    prompts = {0: [picture, text], 1: [text, text, text], 2: []}
    for rank, ours in prompts.items():
        monkeypatch.setattr(sharding, "world", 3)
        monkeypatch.setattr(sharding, "gather",
                            lambda mine, r=rank: [*kinds[:r], mine, *kinds[r + 1:]])
        n, hinted, responses = len(ours), list(ours), [[7]] * len(ours)
        got = sharding.even_out(processor, [[row] for row in range(n)], ours, hinted, responses)
        assert len(ours) == len(hinted) == len(responses)
        assert [[row for row in rows if row < n] for rows in got] == [
            [row] if row < n else [] for row in range(3)]
        for i, rows in enumerate(got):
            assert len(rows) > 0 and all(responses[row] == [] for row in rows if row >= n)
            seen = [ours[row] for row in rows]
            assert any(p.grids for p in seen) == (i == 0)
            # the video stands in kinds only, so rank 1's own third row is a text
            assert any(p.video_grids for p in seen) == (i == 2 and rank != 1) or rank == 1


def test_a_picture_that_only_the_teacher_sees_is_evened_out(loaded, ragged, monkeypatch):
    """With a view: else one rank's student would wait in its tower for one that has no picture."""
    picture, text = ragged[0], ragged[1]
    monkeypatch.setattr(sharding, "gather", lambda mine: [mine, [set()]])
    ours, hinted = [text], [picture]
    assert sharding.even_out(loaded[1], [[0]], ours, hinted, [[7]]) == [[0, 1]]
    assert ours[1].grids and hinted[1].grids


if __name__ == "__main__":      # torchrun; its processes fork from this one
    import torch._dynamo        # noqa: F401  imported by what is sharded, in each process
    import torch.distributed.fsdp
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    from transformers import Qwen3VLForConditionalGeneration        # noqa: F401
    elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d",
                                rdzv_endpoint="localhost:0", run_id="test", max_restarts=0,
                                start_method="fork"), worker)()
