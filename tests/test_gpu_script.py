"""tests/speed/gpu.py on a CPU: it runs, its differences are small, and it would see a wrong one."""
import json
import sys

import pytest

from conftest import ROOT


@pytest.fixture
def gpu(monkeypatch):
    # behind the root, whose loss.py and rollout.py have namesakes in that folder
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tests" / "speed")])
    import gpu
    return gpu


def run(gpu, capsys, *more) -> dict:
    gpu.main(["--device", "cpu", "--quick", *more])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_parts_run_and_equal_things_are_equal(gpu, capsys):
    result = run(gpu, capsys)
    parts = result["parts"]
    assert result["wrong"] == [] and parts.keys() == gpu.PARTS.keys()
    assert len(parts["equality"]) == 2 * len(gpu.BOUNDS) == 12
    for name, check in parts["equality"].items():
        assert check["bound"] is None or 0 <= check["difference"] <= check["bound"], name
    assert parts["graph"]["other answers float32"] == {"difference": 0, "within": True}
    assert parts["graph"]["2 rows"]["difference"] < 1e-5
    for part in (parts["launches"]["kernels"], parts["step"]["all"]["measured_gb"],
                 parts["losses"]["whole"]["peak_gb"]):
        assert part == "skipped: no CUDA"
    assert {step["length"] for step in parts["step"].values()} == {
        4 * gpu.Bench("cpu", True).T}, "a row has stopped early"


def test_a_wrong_norm_and_a_failing_part_are_recorded_and_the_rest_runs(gpu, capsys, monkeypatch):
    def broken(bench):
        raise RuntimeError("no such\nkernel")
    monkeypatch.setitem(gpu.PARTS, "losses", broken)
    monkeypatch.setattr(gpu, "fused_norm", lambda norm, x: 1.1 * norm(x))
    monkeypatch.setattr(gpu, "BOUNDS", {check: gpu.BOUNDS[check] for check in
                                        (gpu.loss_is_whole, gpu.fused_norm_is_the_class)})
    result = run(gpu, capsys, "--only", "losses", "equality")
    assert result["wrong"] == ["losses", "equality"]
    assert result["parts"]["losses"]["failed"].startswith("RuntimeError: no such kernel (test_gpu")
    beyond = [name for name, check in result["parts"]["equality"].items() if gpu.wrong(check)]
    assert beyond == [f"fused_norm_is_the_class {dtype}" for dtype in ("float32", "bfloat16")]
