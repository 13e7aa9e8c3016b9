"""What the project promises its readers: files to copy alone, and a README that is true."""
import re
import subprocess
import sys

import pytest

from conftest import ROOT

LEAVES = ["model.py", "cue_recovery.py", "teacher.py", "rollout.py", "loss.py", "optimizer.py",
          "checkpoint.py", "plan.py", "grade.py", "benchmarks.py", "metrics.py", "leaks.py",
          "cues.py", "figures.py", "compare.py", "sharding.py", "vision.py", "data/records.py",
          "data/toy.py"]


def test_each_leaf_file_imports_in_an_empty_folder(tmp_path):
    """Someone copies one file into another project: it must not need its siblings."""
    names = []
    for leaf in LEAVES:
        name = leaf.split("/")[-1][:-3]
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text((ROOT / leaf).read_text())
        names.append(name)
    code = "import sys, importlib\n" + "".join(
        f"sys.path.insert(0, {str(tmp_path / name)!r}); importlib.import_module({name!r});"
        f"sys.path.pop(0)\n" for name in names)
    got = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True,
                         text=True)
    assert got.returncode == 0, got.stderr


def test_rollout_needs_torch_only():
    imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / "rollout.py").read_text(), re.M))
    assert imported <= {"__future__", "inspect", "dataclasses", "torch"}


PARTS = {"distill.py": [], "probe.py": [], "evaluate.py": ["report", "compare"],
         "teacher.py": ["write-cues", "audit"],
         "data/toy.py": [], "data/make_tiny.py": [],
         "data/prepare.py": ["easy-vqa", "geometry3k", "vision-r1", "jsonl", "contamination"]}


@pytest.fixture(scope="module")
def helps():
    """What every script of the README says to --help."""
    out = {}
    for script, parts in PARTS.items():
        commands = [[script], *([script, part] for part in parts)]
        for command in commands:
            got = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT,
                                 capture_output=True, text=True)
            assert got.returncode == 0, got.stderr
            out[script] = out.get(script, "") + got.stdout
    return out


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [part for part in parts if part]


def test_every_command_of_the_readme_exists(helps):
    """Prose rots: each script and each flag that the README shows must be there."""
    found = 0
    for command in readme_commands():
        words = command.split()
        if words[0] == "torchrun":          # its own options, then a script like any other
            words = ["python", *words[words.index("distill.py"):]]
        if words[0] != "python" or words[1] == "-m":
            continue
        found += 1
        assert (ROOT / words[1]).is_file(), command
        for flag in (w.split("=")[0] for w in words[2:] if w.startswith("--")):
            assert flag in helps[words[1]], f"{command}: no {flag}"
    assert found >= 5


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"`([\w/]+\.(?:py|txt|md))`", text)):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_ci_runs_the_readme_test_command():
    ci, command = (ROOT / ".ci" / "run").read_text(), "python -m pytest -q"
    assert command in ci and command in "\n".join(readme_commands())
