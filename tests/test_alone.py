"""What the project promises its readers: files to copy alone, one-way imports, a README that is true.
"""
import ast
import os
import re
import runpy
import subprocess
import sys

import pytest

from conftest import ROOT

# Each file that says it stands alone, with one call of its main function.
ALONE = {
    "model.py": "fit(100, 200, 32, 1024, 4096 * 4096)",
    "cue_recovery.py": "Block(8, 2, 1e-6)(torch.ones(1, 3, 8), torch.tensor([0]), "
                       "torch.tensor([[True]]), 1, 2)",
    "teacher.py": "hint({'cue': 'a red circle'}, 'cue')",
    "rollout.py": "sample(type('Model', (torch.nn.Module,), {'forward': lambda self, **inputs: "
                  "SimpleNamespace(logits=torch.ones(1, 1, 4), past_key_values=SimpleNamespace("
                  "batch_select_indices=print))})(), {'input_ids': torch.ones(1, 2).long(), "
                  "'attention_mask': torch.ones(1, 2).long(), 'position_ids': torch.zeros(3, 1, 2)"
                  ".long()}, max_new_tokens=1, stop_ids=[0])",
    "loss.py": "distill_loss(*[torch.ones(2, 4)] * 4)",
    "scale/optimizer.py": "Optimizer([('w', torch.nn.Parameter(torch.ones(2)))], lr=1, cue_lr=1, "
                          "warmup=1, steps=1, final=1, clip=1).step(0)",
    "scale/checkpoint.py": "write_json('x.json', 1)",
    "scale/lora.py": "Adapter(nn.Linear(4, 3), 'x', 2, None, SimpleNamespace(off=False, scale=1.0))"
                     ".add(None, [torch.ones(1, 4)], torch.ones(1, 3))",
    "scale/plan.py": "plan(Run(), published('Qwen/Qwen3-VL-2B'))",
    "scale/sharding.py": "gather(1)",
    "scale/vision.py": "read_once([], SimpleNamespace(model=SimpleNamespace(visual="
                       "SimpleNamespace())))",
    "benchmarks/grade.py": "grade('so \\\\boxed{2}', '2')",
    "benchmarks/readers.py": "literal('[1]')",
    "benchmarks/scores.py": "aggregate('mathvista', [{'id': 1, 'group': 1, 'correct': True, "
                            "'meta': {}}])",
    "benchmarks/counting.py": "interval(1, 2)",
    "data/records.py": "load('r.jsonl')",
    "data/toy.py": "write('toy', train=2, test=1)",
}
# Files to be copied in company, the one they need given.
COMPANY = {"data/leaks.py": ("benchmarks/grade.py", "audit('A red circle.', '4')"),
           "scale/decoder.py": ("rollout.py", "fill_gaps([0, 2])"),
           "analysis/figures.py": ("benchmarks/counting.py", "missing('x')")}


def in_a_process_of_its_own(folder, module: str, call: str) -> str:
    """Import and call in a fork of this process, which has torch loaded but nothing of ours.

    A new interpreter for each file would take a minute. Returns the error, empty if there is none.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        error = ""
        try:
            os.chdir(folder)
            ours = [name for name, m in sys.modules.items()
                    if str(getattr(m, "__file__", "")).startswith(f"{ROOT}/")]
            for name in ours:
                del sys.modules[name]
            for name in ("data", "benchmarks", "scale", "analysis"):
                sys.modules.pop(name, None)
            sys.path[:] = [str(folder), *(p for p in sys.path
                                          if not (p or ".").startswith((str(ROOT), ".")))]
            names = {}
            exec("import torch\nfrom types import SimpleNamespace\n"
                 f"from {module} import *\nimport {module} as it", names)
            names.update(vars(names["it"]) if "." not in module else {})
            eval(call, names)
        except BaseException as problem:
            error = f"{type(problem).__name__}: {problem}"
        os.write(writing, error.encode()[:4000])
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as said:
        return said.read()


@pytest.mark.parametrize("leaf", ALONE)
def test_a_leaf_works_alone_in_an_empty_folder(leaf, tmp_path):
    """Someone copies one file into another project: it must not need its siblings."""
    name = leaf.split("/")[-1]
    (tmp_path / name).write_text((ROOT / leaf).read_text())
    (tmp_path / "r.jsonl").write_text('{"id": "1", "images": [], "question": "q", "answer": "a"}\n')
    assert in_a_process_of_its_own(tmp_path, name[:-3], ALONE[leaf]) == ""


@pytest.mark.parametrize("leaf", COMPANY)
def test_a_file_works_beside_the_one_it_names(leaf, tmp_path):
    other, call = COMPANY[leaf]
    for name in (leaf, other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    assert in_a_process_of_its_own(tmp_path, leaf[:-3].replace("/", "."), call) == ""


def test_the_check_would_see_a_hidden_sibling(tmp_path):
    """The first version of it ran in one process, where an import inside a function passed."""
    (tmp_path / "hidden.py").write_text("def main():\n    import model\n")
    assert "No module named 'model'" in in_a_process_of_its_own(tmp_path, "hidden", "main()")


# ---------------------------------------------------------------------------- arrows

FIRST_FLOOR = ["cue_recovery.py", "distill.py", "evaluate.py", "loss.py", "model.py", "rollout.py",
               "teacher.py"]
ROOMS = ("data", "benchmarks", "scale", "analysis")
# Every file below may import from the rooms and files before it in this list, and its own room.
FLOORS = [("model", "cue_recovery", "teacher", "rollout", "loss", "benchmarks.counting",
           "benchmarks.grade", "benchmarks.readers", "benchmarks.scores", "data"),
          ("scale",), ("evaluate",), ("distill",),
          ("analysis", "benchmarks.run", "data.cues", "data.make_tiny")]


def ours():
    """Module name -> (path, names of our modules that it imports, at the top and inside functions).
    """
    paths = [*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).glob("*.py"))]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}
    out = {}
    for name, path in names.items():
        top, inner = set(), set()
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            (top if node in tree.body else inner).update(set(found) & names.keys())
        out[name] = path, top, inner
    return out


def test_the_first_floor_is_the_method():
    assert sorted(p.name for p in ROOT.glob("*.py")) == FIRST_FLOOR


def test_imports_run_one_way():
    def floor(name):
        return max(n for n, names in enumerate(FLOORS) for prefix in names
                   if name == prefix or name.startswith(prefix + "."))
    for name, (path, top, inner) in ours().items():
        if name.endswith("__init__"):
            continue
        for other in top | inner:
            assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"


def test_no_circle_and_no_import_hidden_in_a_function():
    graph = {name: top | inner for name, (_, top, inner) in ours().items()}
    done = set()
    while len(done) < len(graph):
        ready = {name for name in graph.keys() - done if graph[name] <= done}
        assert ready, f"a circle among {sorted(graph.keys() - done)}"
        done |= ready
    # model.load attaches a module where there is one: the only import of ours that may come late
    hidden = {name: inner for name, (_, _, inner) in ours().items() if inner}
    assert hidden == {"model": {"cue_recovery"}}


def test_no_file_has_the_name_of_a_standard_module():
    for name, (path, _, _) in ours().items():
        assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, path


# ---------------------------------------------------------------------------- the README

def test_rollout_needs_torch_only():
    imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / "rollout.py").read_text(), re.M))
    assert imported <= {"__future__", "inspect", "dataclasses", "torch"}


PARTS = {"distill.py": [], "evaluate.py": [], "analysis/probe.py": [], "analysis/report.py": [],
         "analysis/compare.py": [], "benchmarks/run.py": [], "data/cues.py": ["write", "audit"],
         "data/toy.py": [], "data/make_tiny.py": [],
         "data/prepare.py": ["easy-vqa", "geometry3k", "nlvr", "tabmwp", "vision-r1", "jsonl",
                             "contamination"]}


@pytest.fixture(scope="module")
def helps():
    """What every script of the README says to --help, each in a fork that has torch loaded."""
    import distill      # noqa: F401  once, before the forks, with all that it imports
    out = {}
    for script, parts in PARTS.items():
        for part in ([], *([part] for part in parts)):
            reading, writing = os.pipe()
            if not (child := os.fork()):
                os.dup2(writing, 1)
                os.dup2(writing, 2)
                os.chdir(ROOT)
                sys.argv = [script, *part, "--help"]
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                code = 1
                try:
                    runpy.run_path(str(ROOT / script), run_name="__main__")
                except SystemExit as end:
                    code = end.code or 0
                sys.stdout.flush()
                os._exit(code)
            os.close(writing)
            with os.fdopen(reading) as said:
                text = said.read()
            assert os.waitpid(child, 0)[1] == 0, text
            out[script] = out.get(script, "") + text
    return out


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_commands():
    text = "\n".join(page.read_text() for page in pages())
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [part for part in parts if part]


def test_every_command_of_the_readme_exists(helps):
    """Prose rots: each script and each flag that README and docs show must be there."""
    found = 0
    for command in shown_commands():
        words = command.split()
        words = words[next((n for n, w in enumerate(words) if "=" not in w), 0):]   # VAR=1 python
        if words[0] == "torchrun":          # its own options, then a script like any other
            words = ["python", *words[words.index("distill.py"):]]
        if words[0] != "python" or words[1] in ("-m", "-c"):
            continue
        found += 1
        assert (ROOT / words[1]).is_file(), command
        for flag in (w.split("=")[0] for w in words[2:] if w.startswith("--")):
            if words[1] in helps:
                assert flag in helps[words[1]], f"{command}: no {flag}"
    assert found >= 5


def test_the_pages_name_files_that_exist():
    for page in pages():
        for name in set(re.findall(r"`([\w/]+\.(?:py|txt|md|sh))`", page.read_text())):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "tests", page.parent)
                       ), f"{page.name}: {name}"


def test_old_commands_name_the_new_ones():
    """Scripts that were sub-commands of evaluate.py and teacher.py before they had files of their own."""
    import evaluate
    for argv, new in ((["report", "runs/x"], "analysis/report.py"),
                      (["compare", "runs/x"], "analysis/compare.py"),
                      (["--model", "m", "--benchmark", "mmmu"], "benchmarks/run.py")):
        with pytest.raises(SystemExit, match=new) as error:
            evaluate.main(argv)
        assert "\n" not in str(error.value)
    got = subprocess.run([sys.executable, "teacher.py", "write-cues"], cwd=ROOT, text=True,
                         capture_output=True)
    assert got.returncode and "data/cues.py" in got.stderr and got.stderr.count("\n") == 1


def test_ci_runs_the_readme_test_command():
    ci, command = (ROOT / ".ci" / "run").read_text(), "python -m pytest -q"
    assert command in ci and command in "\n".join(shown_commands())
