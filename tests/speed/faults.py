"""tests/speed/faults.py - the table of docs/long_runs.md: break a run in every way, count what is lost.

    OMP_NUM_THREADS=1 python tests/speed/faults.py [kills disks owners cuts lines]

Every fault is tried on the tiny model with the settings of tests/test_long.py. Survived: the run
ended in one line, or went on by itself, and after --resume all that it left equals a run that
nobody disturbed, byte for byte; or the input was refused by name. Lost: anything else. By hand,
since all of it takes about ten minutes.
"""
import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from PIL import Image  # noqa: E402

from data import records, toy  # noqa: E402
from test_long import command, content, forking  # noqa: E402


def went_on(run, folder: Path, wanted: dict) -> bool:
    """--resume ends the run, and it left what it should have."""
    code, said = run(folder.parent.parent, ["--resume", "runs/cut"])
    return code == 0 and content(folder) == wanted


def disturbed(run, data: Path, wanted: dict, orders: list[dict]) -> tuple[int, int]:
    """(tried, survived) of runs that are each disturbed in one of these ways, then resumed."""
    survived = tried = 0
    for order in orders:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "runs" / "cut"
            code, said = run(name, command(data, "cut"), **order)
            if code == 0:
                continue                 # the fault lies behind the end of the run
            tried += 1
            if not (folder / "args.json").exists():           # nothing begun: the command again
                fine = run(name, command(data, "cut"))[0] == 0 and content(folder) == wanted
            else:
                fine = went_on(run, folder, wanted)
            survived += fine and "Traceback" not in said
            if not fine or "Traceback" in said:
                print(f"lost: {order}\n{said[-600:]}", flush=True)
    return tried, survived


def owners(data: Path, pairs: int = 10) -> tuple[int, int]:
    """Two processes of one name at once: one runs, the other is refused in one line."""
    survived = 0
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as name:
            both = [subprocess.Popen([sys.executable, str(ROOT / "distill.py"),
                                      *command(data, "same", "--steps", "1")], cwd=name, text=True,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                    for _ in range(2)]
            said = [process.communicate()[1] for process in both]
            codes = sorted(process.returncode for process in both)
            survived += codes == [0, 1] and sum("in use by" in s or "exists" in s for s in said) == 1
    return pairs, survived


def cuts(data: Path, folder: Path) -> tuple[int, int]:
    """Pictures cut anywhere, of three kinds: named before a run begins, unless no pixel is lost."""
    tried = survived = 0
    picture = Image.open(next((data / "images" / "train").iterdir())).convert("RGB")
    for kind in ("png", "jpeg", "webp"):
        picture.save(folder / f"whole.{kind}")
        whole, path = (folder / f"whole.{kind}").read_bytes(), folder / f"cut.{kind}"
        for size in random.Random(0).sample(range(len(whole) - 1), 100):
            path.write_bytes(whole[:size])
            tried += 1
            try:
                records.check_pictures([{"id": "1", "images": [str(path)]}])
                # no pixel missing: only the mark of the end
                survived += Image.open(path).tobytes() == Image.open(folder / f"whole.{kind}"
                                                                     ).tobytes()
            except ValueError:
                survived += 1
    return tried, survived


def lines(data: Path, folder: Path) -> tuple[int, int]:
    """A record's line cut at every byte, and with every byte exchanged: refused, or still whole."""
    first = (data / "train.jsonl").read_bytes().split(b"\n")[0]
    shutil.copytree(data / "images", folder / "images", dirs_exist_ok=True)
    path, rng, tried, survived = folder / "broken.jsonl", random.Random(0), 0, 0
    for place in range(1, len(first)):
        for broken in (first[:place], first[:place] + bytes([rng.randrange(256)])
                       + first[place + 1:]):
            path.write_bytes(broken)
            tried += 1
            try:
                records.load(path, ("cue",))
                survived += 1                       # a letter for another is a record too
            except ValueError as error:
                survived += f"{path}:1" in str(error) or str(path) in str(error)
    return tried, survived


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", help="of kills, disks, owners, cuts, lines: default all")
    names = parser.parse_args(argv).what
    if unknown := set(names) - {"kills", "disks", "owners", "cuts", "lines"}:
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as name, forking(Path(name) / "log") as run:
        base = Path(name)
        toy.write(base / "toy", train=40, test=16, seed=3)
        code, said = run(base, command(base / "toy", "cut"), die=10**9)
        assert code == 0, said
        wanted, writes = content(base / "runs" / "cut"), said.rsplit("writes: ")[-1].count('["')
        orders = {"kills": [{"die": n} for n in range(1, writes + 1)],
                  "disks": [{"limit": 1 << n} for n in range(4, 25)]}
        for what in names or [*orders, "owners", "cuts", "lines"]:
            if what in orders:
                got = disturbed(run, base / "toy", wanted, orders[what])
            elif what == "owners":
                got = owners(base / "toy")
            else:
                got = {"cuts": cuts, "lines": lines}[what](base / "toy", base)
            print(f"{what}: tried {got[0]}, survived {got[1]}, lost {got[0] - got[1]}", flush=True)


if __name__ == "__main__":
    main()
