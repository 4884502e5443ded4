"""Runs that everything happens to, for as long as you like: `make soak SECONDS=3600`.

A round is a scan of small photographs and a second pass over it, started again and again by the same command until both
have ended well; meanwhile, at random, workers and the driver are killed or stopped for a while, the driver is told to
end, the disk is full, the store cannot be written to, images are cut short, emptied, deleted or swapped, their folder
is gone for a while, and memory runs out. Then the store must be, array for array, that of a run that nothing disturbed
over the images that are left, and nothing may be left behind: no process, no temporary file, no shared memory; and
nobody may ever have seen a traceback.

With Ray installed, some runs are those of a cluster of two nodes on this machine, of which one is killed now and then.

It needs Linux; a full disk also the right to mount a tmpfs, and a store that cannot be written to that of `chattr +i`.
Where they are missing, these faults are left out, and it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from maxact.files import leftovers
from maxact.progress import print_table
from maxact.store import Store
from stores import Child, command
from support import write_photographs

IMAGES = 60
ARGUMENTS = (
    *("--top", "5", "--bottom", "2", "--batch", "2", "--shard", "4", "--threads", "1", "--decode-threads", "1"),
)
PROJECT = ("--ranks", "2", "--max-size", "32", "--batch", "4", "--threads", "1")
DEVICES = ("cpu", "cpu:2", "cpu:3", "ray")
LIVES = 60  # of one command: more than any round can need
DISK = 48 << 20  # bytes of the disk that is filled
MEMORY = 80 << 20  # bytes of a node's object store


class Mismatch(Exception):
    """A store that is not what it has to be."""


class Nodes:
    """A Ray cluster of two nodes of one CPU each, and a head that does no work."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._cluster.add_node(num_cpus=0, object_store_memory=MEMORY, include_dashboard=False)
        self._nodes: list[Any] = []
        self.grow()

    def grow(self) -> None:
        """Until there are two."""
        while len(self._nodes) < 2:
            self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY))
        self._cluster.wait_for_nodes()

    def kill(self, draw: random.Random) -> None:
        """One of them, as a loss of power would."""
        if self._nodes:
            self._cluster.remove_node(self._nodes.pop(draw.randrange(len(self._nodes))), allow_graceful=False)

    def options(self) -> tuple[str, ...]:
        """Of a command that is to run there."""
        return "--cluster", self._cluster.address, "--cpus-per-worker", "1"

    def close(self) -> None:
        """Ends it."""
        self._cluster.shutdown()


class Faults:
    """What can happen to a run, each by its name, and undone in the end."""

    def __init__(
        self, draw: random.Random, images: Path, pristine: Path, store: Path, disk: Path | None, nodes: Nodes | None
    ) -> None:
        self.draw, self.images, self.pristine, self.store, self.disk = draw, images, pristine, store, disk
        self.nodes = nodes
        self.tampered: set[str] = set()
        self.undo: list[tuple[float, Callable[[], None]]] = []
        self.counts: Counter[str] = Counter()

    def possible(self, scanning: bool, on_ray: bool) -> list[str]:
        """The faults that there are, images spoilt only while they are scanned."""
        names = ["kill driver", "kill worker", "stop driver", "stop worker", "end driver", "memory"]
        if self.disk:
            names += ["disk full", "not writable"]
        if on_ray:
            names += ["kill node", "kill node"]
        if (self.store / "images.parquet").exists():  # earlier, it would be another catalog
            names += ["folder away"]
            if scanning:
                names += ["truncate", "empty", "delete", "swap"]
        return names

    def happen(self, name: str, child: Child) -> None:
        """Makes it happen, if it can now."""
        driver = child.process.pid
        workers = _workers(driver)
        with suppress(ProcessLookupError, FileNotFoundError):
            match name:
                case "kill driver":
                    os.kill(driver, signal.SIGKILL)
                case "end driver":
                    os.kill(driver, signal.SIGTERM)
                case "stop driver":
                    self._stop(driver)
                case "kill worker" | "stop worker" if not workers:
                    return
                case "kill worker":
                    os.kill(self.draw.choice(workers), signal.SIGKILL)
                case "kill node":
                    assert self.nodes
                    self.nodes.kill(self.draw)
                    self._later(self.draw.uniform(0.5, 3.0), self.nodes.grow)
                case "stop worker":
                    self._stop(self.draw.choice(workers))
                case "folder away":
                    self._folder_away()
                case "memory":
                    (self.store.parent / "memory").touch()
                case "disk full":
                    self._fill()
                case "not writable":
                    self._seal()
                case _:
                    self._spoil(name)
            self.counts[name] += 1

    def _later(self, seconds: float, undo: Callable[[], None]) -> None:
        self.undo.append((time.monotonic() + seconds, undo))

    def _stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)

        def go_on() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        self._later(self.draw.uniform(0.2, 2.0), go_on)

    def _folder_away(self) -> None:
        folder = self.draw.choice([path for path in self.images.iterdir() if path.is_dir() and path.suffix != ".away"])
        away = folder.with_suffix(".away")
        folder.rename(away)
        self._later(self.draw.uniform(0.2, 3.0), lambda: _put_back(away, folder))

    def _fill(self) -> None:
        assert self.disk
        filler = self.disk / f"filler{len(self.undo)}"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)
        self._later(self.draw.uniform(0.3, 2.0), lambda: filler.unlink(missing_ok=True))

    def _seal(self) -> None:
        sealed = [path for path in (self.store, self.store / "run") if path.is_dir()]
        for path in sealed:
            subprocess.run(["chattr", "+i", path], check=False, capture_output=True)

        def unseal() -> None:
            for path in sealed:
                subprocess.run(["chattr", "-i", path], check=False, capture_output=True)

        self._later(self.draw.uniform(0.3, 2.0), unseal)

    def _spoil(self, how: str) -> None:
        if len(self.tampered) >= 6:  # more bad images than are borne would end the run
            return
        path = self.draw.choice(sorted(path for path in self.images.rglob("*.jpg") if ".away" not in str(path)))
        other = self.draw.choice(sorted(self.pristine.rglob("*.jpg")))
        self.tampered.add(str(path.relative_to(self.images)))
        match how:
            case "truncate":
                os.truncate(path, path.stat().st_size // 2)
            case "empty":
                os.truncate(path, 0)
            case "delete":
                path.unlink()
            case "swap":
                shutil.copy(other, path)

    def settle(self, everything: bool = False) -> None:
        """Undoes what has lasted long enough."""
        now = time.monotonic()
        due = [undo for at, undo in self.undo if everything or at <= now]
        self.undo = [] if everything else [(at, undo) for at, undo in self.undo if at > now]
        for undo in due:
            undo()


def _put_back(away: Path, folder: Path) -> None:
    if away.exists():
        away.rename(folder)


def _workers(driver: int) -> list[int]:
    """The worker processes of a driver, and Ray's."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{driver}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
    found += [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and _is_actor(int(path.name))]
    return [pid for pid in found if _is_worker(pid)]


def _is_worker(pid: int) -> bool:
    return b"maxact" in _cmdline(pid) or _is_actor(pid)


def _is_actor(pid: int) -> bool:
    return _cmdline(pid).startswith(b"ray::Actor")


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def endure(words: list[object], faults: Faults, scanning: bool, devices: list[str]) -> int:
    """Runs a command until it ends well, with things happening to it; says how often it was started."""
    draw = faults.draw
    for life in range(1, LIVES + 1):
        where = draw.choice(devices)
        on_ray = where == "ray"
        options = faults.nodes.options() if on_ray and faults.nodes else ("--devices", where)
        child = command(*words, *options, seconds=draw.choice([0.0, 0.2, 1.0]))
        calm = life > LIVES // 3 or draw.random() < 0.15 * life  # or it would take for ever
        seen: set[int] = set()
        while child.process.exitcode is None:
            seen.update(_workers(child.process.pid))
            faults.settle()
            child.process.join(draw.uniform(0.05, 0.6))
            if not calm and child.process.exitcode is None and draw.random() < 0.5:
                faults.happen(draw.choice(faults.possible(scanning, on_ray)), child)
        code = child.wait()
        faults.settle(everything=True)
        if "Traceback" in child.err:
            raise Mismatch(f"a traceback: {child.err}")
        if code not in (0, 1, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            raise Mismatch(f"exit code {code}: {child.err}")
        end = time.monotonic() + 30
        while alive := [pid for pid in seen if _is_worker(pid)]:
            if time.monotonic() > end:
                raise Mismatch(f"processes stayed behind: {alive}")
            time.sleep(0.05)
        if code == 0:
            return life
    raise Mismatch(f"not done after {LIVES} runs: {child.err}")


def arrays(store: Path) -> dict[str, Any]:
    """Every file of the taps, by its path."""
    taps = set(Store(store))
    found = {}
    for path in store.rglob("*"):
        name = path.relative_to(store)
        if path.is_file() and name.parts[0] in taps:
            found[str(name)] = json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
    return found


def compare(store: Path, reference: Path) -> None:
    """Raises Mismatch where two stores' arrays differ."""
    found, wanted = arrays(store), arrays(reference)
    if found.keys() != wanted.keys():
        raise Mismatch(f"files: {sorted(found.keys() ^ wanted.keys())[:5]}")
    if different := [name for name in found if found[name] != wanted[name]]:
        raise Mismatch(f"different: {different[:5]}")
    if left := leftovers(store.rglob("*")):
        raise Mismatch(f"left behind: {left}")


class Soak:
    """Rounds, and what they share: pristine images, and references."""

    def __init__(self, folder: Path, disk: Path | None, devices: list[str], nodes: Nodes | None) -> None:
        self._folder, self._disk, self._devices, self._nodes = folder, disk, devices, nodes
        self._pristine = folder / "pristine"
        self.faults, self.lives = Counter[str](), 0
        write_photographs(self._pristine, IMAGES)

    def round(self, seed: int) -> None:
        """One round. Raises Mismatch."""
        images, store = self._folder / "images", (self._disk or self._folder) / "store"
        shutil.rmtree(images, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(self._pristine, images)
        draw = random.Random(seed)
        faults = Faults(draw, images, self._pristine, store, self._disk, self._nodes)
        precision = draw.choice(["fp32", "bf16"])
        words = ["scan", "soaked:network", images, store, *ARGUMENTS, "--precision", precision, "--max-bad", "30"]
        try:
            self.lives += endure(words, faults, True, self._devices)
            bad = self._bad(store, faults, images)
            reference = self._reference(bad, precision)
            compare(store, reference)
            for name in faults.tampered:
                shutil.copy2(self._pristine / name, images / name)
            self.lives += endure(["project", store, *PROJECT], faults, False, self._devices)
            self._end_well(["project", reference, *PROJECT])
            compare(store, reference)
        finally:
            faults.settle(everything=True)
            self.faults += faults.counts

    def _bad(self, store: Path, faults: Faults, images: Path) -> frozenset[str]:
        """The images that were bad, by their paths. Raises Mismatch for one that nobody touched."""
        opened = Store(store)
        sources = opened.catalog.table["source"].to_pylist()
        bad = {os.path.relpath(os.fsdecode(sources[image.image]), images) for image in opened.bad_in_scan()}
        if untouched := bad - faults.tampered:
            raise Mismatch(f"bad, and nobody touched them: {sorted(untouched)}: {opened.errors().to_pylist()}")
        return frozenset(bad)

    def _reference(self, bad: frozenset[str], precision: str) -> Path:
        """A store of the images without the bad ones, that nothing disturbed."""
        folder = self._folder / "reference"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._pristine, folder / "images")
        for name in bad:
            (folder / "images" / name).write_bytes(b"no picture")
        words = ("--precision", precision, "--max-bad", "30")
        self._end_well(["scan", "soaked:network", folder / "images", folder / "store", *ARGUMENTS, *words])
        return folder / "store"

    def _end_well(self, words: list[object]) -> None:
        child = command(*words, "--devices", "cpu", seconds=60.0)
        if child.wait(300):
            raise Mismatch(f"the undisturbed run failed: {child.err}")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk that can be filled, or None where it cannot be had."""
    place = folder / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        print("no full disk and no read-only store: a tmpfs cannot be mounted here")
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["chattr", "-R", "-i", place], check=False, capture_output=True)
        subprocess.run(["umount", "-l", place], check=True)


def shared_memory() -> set[str]:
    """The names of what there is of it."""
    return {entry.name for entry in os.scandir("/dev/shm") if entry.is_file() and not entry.name.startswith("plasma")}


def main() -> int:
    """Soaks, and prints rounds, faults by kind and mismatches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rounds", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", default=",".join(DEVICES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end, mismatches, rounds = time.monotonic() + args.seconds, [], 0
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="soak-") as folder,
        small_disk(Path(folder)) as disk,
        ExitStack() as cluster,
    ):
        os.environ["MAXACT_SOAK"] = str(disk or folder)
        devices = args.devices.split(",")
        nodes = cluster.enter_context(closing(Nodes())) if "ray" in devices else None
        before = shared_memory()
        soak = Soak(Path(folder), disk, devices, nodes)
        for number in range(args.rounds):
            if time.monotonic() > end:
                break
            rounds += 1
            try:
                soak.round(args.seed + number)
                if left := shared_memory() - before:
                    raise Mismatch(f"shared memory: {left}")
            except Mismatch as error:
                mismatches.append({"seed": args.seed + number, "what": str(error)})
                print(f"round {args.seed + number}: {error}", flush=True)
            print(f"{rounds} rounds, {sum(soak.faults.values())} faults, {len(mismatches)} mismatches", flush=True)
    print_table(("fault", "times"), sorted(soak.faults.items()))
    print(f"{rounds} rounds, {soak.lives} runs, {sum(soak.faults.values())} faults, {len(mismatches)} mismatches")
    if args.json:
        result = {"rounds": rounds, "runs": soak.lives, "faults": soak.faults, "mismatches": mismatches}
        args.json.write_text(json.dumps(result))
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
