"""What a run of days meets: kills, signals, full disks, dead workers, NaN, stalls. Each ends in one sentence and loses no checkpoint."""
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import train
from test_train import ROOT, command, equal, metrics, world, write_images      # noqa: F401 (world is a fixture)

# Processes that have torch imported already: hundreds of runs can be started and killed.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["train", "test_faults"])
STEPS = 8


def rank_process(argv, rank, ranks, port, log, patch):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.setpgid(0, 0)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)        # of the data workers, as in a process that a shell starts
    if patch:
        patch(rank)
    train.launch(argv)


def start(argv, log, ranks=1, patch=None):
    """The processes of a run, one for each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [fork.Process(target=rank_process, args=(argv, r, ranks, port, log, patch)) for r in range(ranks)]
    for p in processes:
        p.start()
    return processes


def codes(processes):
    for p in processes:
        p.join(120)
        assert p.exitcode is not None, "a rank goes on for ever"
    return [p.exitcode for p in processes]


def kill(processes):
    for p in processes:
        p.kill()
    codes(processes)


def wait_for(condition, processes):
    """Poll until `condition()` or the end of the processes; whether the condition came."""
    while not condition():
        if not any(p.is_alive() for p in processes):
            return condition()
        time.sleep(0.002)
    return True


def steps_logged(out):
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


def options(world, out, **change):
    return command(world, out, **{"steps": STEPS, "save_every": 2, "batch": 2, "image_every": STEPS} | change)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def uninterrupted(request, world, tmp_path_factory):
    """(number of ranks, the end of a run that nothing happened to)."""
    ranks, out = request.param, tmp_path_factory.mktemp("uninterrupted") / "run"
    assert codes(start(options(world, out), out.parent / "log", ranks)) == [0] * ranks, (out.parent / "log").read_text()
    return ranks, out


def assert_same_run(a, b):
    x, y = (train.load_checkpoint(out / "last.pt") for out in (a, b))
    assert all(equal(x[k], y[k]) for k in x if k != "args")
    assert metrics(a) == metrics(b)


def finish(world, out, ranks, **change):
    again = options(world, out, resume=bool(train.checkpoints(out)), **change)
    assert codes(start(again, out.parent / "log", ranks)) == [0] * ranks, (out.parent / "log").read_text()


# ------------------------------------------------------------------ kills

def test_a_run_killed_at_random_moments_ends_in_the_same_bits(world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out, rng = tmp_path / "run", random.Random(ranks)
    for _ in range(12):
        processes = start(options(world, out, resume=bool(train.checkpoints(out))), tmp_path / "log", ranks)
        # From some moment of the start, of a step or of a checkpoint's writing on.
        wait_for(rng.choice([lambda: True, (out / "new.pt.tmp").exists, lambda n=steps_logged(out): steps_logged(out) > n]), processes)
        time.sleep(rng.uniform(0, 0.5) ** 2)
        kill(processes)
    finish(world, out, ranks)
    assert_same_run(whole, out)


def test_a_kill_between_the_renames_of_a_checkpoint_costs_nothing(world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    kill_at = tmp_path / "run" / "last-1.pt"
    processes = start(options(world, kill_at.parent), tmp_path / "log", ranks)
    wait_for(kill_at.exists, processes)
    kill(processes)
    (kill_at.parent / "last.pt").unlink(missing_ok=True)        # as if the second rename had not come
    assert train.load_last(kill_at.parent)["step"] in (2, 4, 6)
    finish(world, kill_at.parent, ranks)
    assert_same_run(whole, kill_at.parent)


def test_torchrun_recovers_from_a_killed_rank_alone(world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out = tmp_path / "run"
    torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--max-restarts=3",
                                 ROOT / "train.py", *options(world, out)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while not (out / "last.pt").exists():
        assert torchrun.poll() is None, torchrun.stderr.read()
        time.sleep(0.01)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    victims = [pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(victims[-1]), signal.SIGKILL)
    _, err = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, err[-3000:]
    assert_same_run(whole, out)


# ------------------------------------------------------------------ signals

@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_one_rank_saves_and_ends_all_of_them(signum, world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out = tmp_path / "run"
    processes = start(options(world, out, save_every=1000, workers=2), tmp_path / "log", ranks)
    assert wait_for(lambda: steps_logged(out) >= 2, processes)
    os.killpg(processes[-1].pid, signum)                        # its data workers get it, too
    assert codes(processes) == [128 + signum] * ranks, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    step = train.load_last(out)["step"]
    assert f"stopped by {signum.name} after step {step}, which is in {out}/last.pt: go on with --resume" in said and "Traceback" not in said
    finish(world, out, ranks, save_every=1000)
    assert_same_run(whole, out)


def test_a_second_signal_ends_a_process_at_once(world, tmp_path):
    os.mkfifo(tmp_path / "0.png")                               # opening it waits for a writer
    process, = start(options(world, tmp_path / "run", data=tmp_path), tmp_path / "log")
    assert wait_for((tmp_path / "run" / "metrics.jsonl").exists, [process])
    os.kill(process.pid, signal.SIGINT)
    process.join(2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert codes([process]) == [128 + signal.SIGINT]


# ------------------------------------------------------------------ the disk

@pytest.mark.parametrize("name", ["new.pt.tmp", "grid-0000008.png", "config.json"])
def test_a_full_disk_is_told_and_the_checkpoints_stay_whole(name, world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out = tmp_path / "run"
    assert codes(start(options(world, out, steps=STEPS), tmp_path / "log", ranks)) == [0] * ranks
    for late in "last.pt", "grid-0000008.png":                  # as if only 6 of the 8 steps had been made
        (out / late).unlink()
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to("/dev/full")
    said = tmp_path / "full.log"
    assert 1 in codes(start(options(world, out, resume=True), said, ranks))
    lines = [line for line in said.read_text().split("\n") if "No space left on device" in line]
    assert len(lines) == 1 and "cannot be written: No space left on device" in lines[0] and "--resume" in lines[0]
    (out / name).unlink(missing_ok=True)
    assert train.load_last(out)["step"] == 6 and not (out / "new.pt.tmp").exists()
    finish(world, out, ranks)
    assert_same_run(whole, out)


@pytest.mark.parametrize("damage", ["cut", "one byte"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, world, uninterrupted, tmp_path, capsys):
    ranks, whole = uninterrupted
    out = tmp_path / "run"
    finish(world, out, ranks, keep=3)
    for name in "last.pt", "last-1.pt":
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data[:len(data) // 2] if damage == "cut" else data)
    assert train.load_last(out)["step"] == 4
    said = capsys.readouterr().err.splitlines()
    assert [f"{out}/{name}" in line and "damaged" in line for name, line in zip(("last.pt", "last-1.pt"), said, strict=True)] == [True, True]
    finish(world, out, ranks, keep=3)
    assert_same_run(whole, out)
    assert (out / "last.pt.damaged").exists() and zipfile.ZipFile(out / "last-2.pt").testzip() is None     # not pushed out by a damaged one
    (out / "last-2.pt").write_bytes(b"")
    for path in train.checkpoints(out):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 3 checkpoints .* is whole"):
        train.load_last(out)


# ------------------------------------------------------------------ data

def test_a_killed_data_worker_is_named(world, tmp_path):
    process, = start(options(world, tmp_path / "run", workers=2, steps=10_000), tmp_path / "log")
    assert wait_for(lambda: steps_logged(tmp_path / "run") >= 2, [process])
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    assert codes([process]) == [1]
    said = (tmp_path / "log").read_text()
    assert "train.py: a data worker of rank 0 has died" in said and "Traceback" not in said


def test_bad_files_met_by_data_workers_stop_all_ranks_in_one_sentence(world, tmp_path):
    write_images(tmp_path / "images", n=200, size=32)
    for i in range(0, 200, 50):
        path = next((tmp_path / "images").rglob(f"{i:03d}.png"))
        path.unlink()
        path.mkdir() if i % 100 else path.write_bytes(b"")      # not to be read, or empty
    processes = start(options(world, tmp_path / "run", data=tmp_path / "images", workers=2, batch=10, steps=40), tmp_path / "log", ranks=2)
    assert codes(processes) == [1, 1]
    said = (tmp_path / "log").read_text()
    assert said.count("train.py: more than 1 % of the") == 1 and "Traceback" not in said


def no_checkpoints_on_rank_1(rank):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"              # after which a run goes on by itself
    if rank == 1:
        train.checkpoints = lambda out: []


def test_ranks_that_see_different_checkpoints_are_told_to_share_the_folder(world, tmp_path):
    out = tmp_path / "run"
    assert codes(start(options(world, out, steps=2), tmp_path / "log", ranks=2)) == [0, 0]
    assert codes(start(options(world, out), tmp_path / "log", ranks=2, patch=no_checkpoints_on_rank_1)) == [1, 1]
    said = (tmp_path / "log").read_text()
    assert said.count(f"train.py: the ranks see checkpoints of different steps in {out}, 0 and 2") == 1 and "Traceback" not in said


# ------------------------------------------------------------------ numbers

def not_a_number_on_the_last_rank(rank):
    calls, loss = [], train.generator_loss

    def sometimes(fake, kind):
        calls.append(fake)
        return loss(fake, kind) * (float("nan") if len(calls) == 3 and rank == int(os.environ["WORLD_SIZE"]) - 1 else 1)
    train.generator_loss = sometimes


def infinite_from_step_5(rank):
    calls, loss = [], train.generator_loss
    train.generator_loss = lambda fake, kind: calls.append(fake) or loss(fake, kind) * (float("inf") if len(calls) > 4 else 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_with_a_nan_on_one_rank_is_skipped_on_all(ranks, world, tmp_path):
    change = {"gan_start": 0, "save_every": 1, "keep": 10}
    processes = start(options(world, tmp_path / "run", **change), tmp_path / "log", ranks, patch=not_a_number_on_the_last_rank)
    assert codes(processes) == [0] * ranks, (tmp_path / "log").read_text()
    at = {c["step"]: c for c in map(train.load_checkpoint, train.checkpoints(tmp_path / "run"))}
    for part in "model", "ema", "disc":
        assert equal(at[2][part], at[3][part]) and not equal(at[3][part], at[4][part])
    assert equal(at[2]["opt"]["state"], at[3]["opt"]["state"])
    logged = metrics(tmp_path / "run")
    assert [m["skips"] for m in logged] == [0, 0] + [1] * 6 and logged[2]["gan"] is None and logged[3]["gan"] is not None
    assert all(torch.isfinite(t).all() for t in at[STEPS]["model"].values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_too_many_skipped_steps_the_run_ends_and_names_its_checkpoint(ranks, world, tmp_path):
    out = tmp_path / "run"
    processes = start(options(world, out, gan_start=0, save_every=4, steps=100, max_skips=3), tmp_path / "log", ranks, patch=infinite_from_step_5)
    assert codes(processes) == [1] * ranks
    said = (tmp_path / "log").read_text()
    assert said.count(f"in the last 3 steps, up to step 7, and they were skipped: go on from {out}/last.pt (step 4)") == 1 and "Traceback" not in said
    assert train.load_last(out)["step"] == 4


# ------------------------------------------------------------------ stalls

def test_a_rank_that_stalls_is_named_and_the_others_end(world, tmp_path):
    processes = start(options(world, tmp_path / "run", steps=10_000, timeout=15), tmp_path / "log", ranks=2)
    assert wait_for(lambda: steps_logged(tmp_path / "run") >= 4, processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(60)
    processes[1].kill()
    assert processes[0].exitcode == 1
    said = (tmp_path / "log").read_text()
    assert "no rank has begun anything new for 15 s; silent: rank 1 (" in said and "Traceback" not in said
    assert train.load_last(tmp_path / "run")["step"] >= 2


def test_a_disk_that_does_not_answer_is_a_stall_of_the_rank_that_reads(world, tmp_path):
    write_images(tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "a" / "fifo.png")           # opening it waits for a writer
    processes = start(options(world, tmp_path / "run", data=tmp_path / "images", timeout=15), tmp_path / "log", ranks=2)
    assert codes(processes) == [1, 1]
    told, = [line for line in (tmp_path / "log").read_text().splitlines() if "no rank has begun anything new" in line]
    assert re.search(r"furthest behind: rank [01] \(images of step \d\); look there", told)
