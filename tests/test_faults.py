"""What a run of days meets: kills, signals, full disks, dead workers, NaN, other processes.

Each ends in a sentence and loses no checkpoint.
"""
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import train
from test_train import ROOT, command, equal, metrics, world, write_images  # noqa: F401 (a fixture)

# Processes that have torch imported already: hundreds of runs can be started and killed.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["train", "test_faults"])
STEPS = 8
started = []                    # the processes of the test at hand


def rank_process(argv, rank, ranks, port, log, patch):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv[0] = "train.py"
    os.setpgid(0, 0)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    torch.set_num_threads(1)
    # Of the data workers, as in a process that a shell starts.
    multiprocessing.set_start_method("fork", force=True)
    if patch:
        patch(rank)
    common.command(lambda: train.main(argv))


def start(argv, log, ranks=1, patch=None):
    """The processes of a run, one for each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [fork.Process(target=rank_process, args=(argv, rank, ranks, port, log, patch))
                 for rank in range(ranks)]
    for p in processes:
        p.start()
    started.extend(processes)
    return processes


@pytest.fixture(autouse=True)
def nothing_goes_on_after_its_test():
    """A test that fails leaves no rank, which would slow the others and keep pytest from its end."""
    yield
    kill(started)
    started.clear()


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
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def options(world, out, **change):
    return command(world, out, **{"steps": STEPS, "save_every": 2, "batch": 2, "image_every": STEPS} | change)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def uninterrupted(request, world, tmp_path_factory):
    """(number of ranks, the end of a run that nothing happened to)."""
    ranks, out = request.param, tmp_path_factory.mktemp("uninterrupted") / "run"
    log = out.parent / "log"
    assert codes(start(options(world, out), log, ranks)) == [0] * ranks, log.read_text()
    return ranks, out


def assert_same_run(a, b):
    x, y = (train.load_checkpoint(out / "last.pt") for out in (a, b))
    assert all(equal(x[k], y[k]) for k in x if k != "args")
    assert metrics(a) == metrics(b)


def newest(out):
    """The path of the newest checkpoint, or None."""
    return next((out / name for name in ("last.pt", "last-1.pt") if (out / name).exists()), None)


def finish(world, out, ranks, **change):
    again, log = options(world, out, resume=bool(newest(out)), **change), out.parent / "log"
    assert codes(start(again, log, ranks)) == [0] * ranks, log.read_text()


# ------------------------------------------------------------------ kills

def test_a_run_killed_at_random_moments_ends_in_the_same_bits(world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out, rng = tmp_path / "run", random.Random(ranks)
    for _ in range(12):
        processes = start(options(world, out, resume=bool(newest(out))), tmp_path / "log", ranks)
        # From some moment of the start, of a checkpoint's writing or of a step on.
        moments = [lambda: True,
                   (out / "new.pt.tmp").exists,
                   lambda n=steps_logged(out): steps_logged(out) > n]
        wait_for(rng.choice(moments), processes)
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
    assert train.load_checkpoint(kill_at)["step"] in (2, 4, 6)
    finish(world, kill_at.parent, ranks)
    assert_same_run(whole, kill_at.parent)


def test_torchrun_recovers_from_a_killed_rank_alone(world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
             "--max-restarts=3", ROOT / "train.py", *options(world, out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    while not (out / "last.pt").exists():
        assert torchrun.poll() is None, torchrun.stderr.read()
        time.sleep(0.01)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    victims = [pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(victims[-1]), signal.SIGKILL)
    _, err = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, err[-3000:]
    assert_same_run(whole, out)


def started_again(rank):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"              # by torchrun, and then it goes on by itself


def test_what_torchrun_starts_again_goes_on_with_its_own_run_and_takes_over_no_other(world, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    assert codes(start(options(world, out, steps=2), log)) == [0]
    assert codes(start(options(world, out, steps=2), log, patch=started_again)) == [0]
    before = (out / "last.pt").read_bytes()
    assert codes(start(options(world, out, steps=2, seed=1), log, patch=started_again)) == [1]
    assert f"train.py: {out} holds a run already" in log.read_text()
    assert (out / "last.pt").read_bytes() == before


# ------------------------------------------------------------------ signals

def held_at_step_2(rank):
    """The last rank waits there for its signal, which so comes in time on a quick machine."""
    def held(run, *args, report=train.report):
        shown = report(run, *args)
        while run.step == 2 and run.rank == run.world - 1 and not train.signals:
            time.sleep(0.01)
        return shown

    train.report = held


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_one_rank_saves_and_ends_all_of_them(name, world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out, signum = tmp_path / "run", getattr(signal, name)
    words = options(world, out, save_every=1000, workers=2)
    processes = start(words, tmp_path / "log", ranks, patch=held_at_step_2)
    assert wait_for(lambda: steps_logged(out) >= 2, processes)
    os.killpg(processes[-1].pid, signum)                        # its data workers get it, too
    assert codes(processes) == [128 + signum] * ranks, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    step = train.load_checkpoint(out / "last.pt")["step"]
    assert f"stopped by {name} after step {step}, which is in {out}/last.pt: go on with --resume" in said
    assert "Traceback" not in said
    finish(world, out, ranks, save_every=1000)
    assert_same_run(whole, out)


def test_a_signal_to_torchrun_saves(world, tmp_path):
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*launcher, ROOT / "train.py", *options(world, out, steps=10_000, save_every=10_000, workers=1)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(argv, env=environ, stderr=subprocess.PIPE, text=True)
    while steps_logged(out) < 2:
        assert torchrun.poll() is None, torchrun.stderr.read()
        time.sleep(0.01)
    torchrun.send_signal(signal.SIGTERM)
    torchrun.communicate(timeout=300)
    assert train.load_checkpoint(out / "last.pt")["step"] >= 2


def test_a_signal_that_comes_twice_at_once_is_one(world, tmp_path):
    out = tmp_path / "run"
    process, = start(options(world, out, steps=10_000, save_every=10_000), tmp_path / "log")
    assert wait_for(lambda: steps_logged(out) >= 2, [process])
    for _ in range(3):                                          # as `timeout` does, to process and group
        with contextlib.suppress(ProcessLookupError):           # a quick machine has saved and ended by now
            os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.01)
    assert codes([process]) == [128 + signal.SIGTERM]
    assert train.load_checkpoint(out / "last.pt")["step"] >= 2


def test_a_signal_that_ends_the_reader_of_the_log_too_still_saves(world, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, ROOT / "train.py", *options(world, out, steps=10_000, save_every=10_000)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while steps_logged(out) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.stdout.close()                                      # as Ctrl-C ends `| tee log`
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 128 + signal.SIGINT
    assert train.load_checkpoint(out / "last.pt")["step"] >= 2


def test_a_second_signal_ends_a_process_at_once(world, tmp_path):
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "0.png")                    # opening it waits for a writer
    process, = start(options(world, tmp_path / "run", data=tmp_path / "images"), tmp_path / "log")
    assert wait_for((tmp_path / "run" / "metrics.jsonl").exists, [process])
    os.kill(process.pid, signal.SIGINT)
    process.join(3)                                             # a later one counts after a second
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert codes([process]) == [128 + signal.SIGINT]


# ------------------------------------------------------------------ the disk

@pytest.mark.parametrize("name", ["new.pt.tmp", "grid-0000008.png.tmp", "config.json.tmp"])
def test_a_full_disk_is_told_and_the_checkpoints_stay_whole(name, world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out = tmp_path / "run"
    assert codes(start(options(world, out, steps=STEPS), tmp_path / "log", ranks)) == [0] * ranks
    for late in "last.pt", "grid-0000008.png":                  # as if only 6 of the 8 steps had been made
        (out / late).unlink()
    (out / name).symlink_to("/dev/full")
    said = tmp_path / "full.log"
    assert 1 in codes(start(options(world, out, resume=True), said, ranks))
    line, = [line for line in said.read_text().split("\n") if "No space left on device" in line]
    assert line == f"train.py: {out}/{name[:-4]}: No space left on device; what was written is whole"
    assert train.load_checkpoint(newest(out))["step"] == 6 and not list(out.glob("*.tmp"))
    finish(world, out, ranks)
    assert_same_run(whole, out)


@pytest.mark.parametrize("damage", ["cut", "one byte"])
def test_a_damaged_checkpoint_is_told_with_the_one_before_it_as_the_mend(
        damage, world, uninterrupted, tmp_path):
    ranks, whole = uninterrupted
    out = tmp_path / "run"
    finish(world, out, ranks)
    data = bytearray((out / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "last.pt").write_bytes(data[:len(data) // 2] if damage == "cut" else data)
    before = (out / "last-1.pt").read_bytes()
    assert 1 in codes(start(options(world, out, resume=True), tmp_path / "damaged.log", ranks))
    said = (tmp_path / "damaged.log").read_text()
    assert f"train.py: {out}/last.pt is damaged" in said
    assert f"rename {out}/last-1.pt to last.pt" in said
    assert (out / "last-1.pt").read_bytes() == before                       # and it is not touched
    os.replace(out / "last-1.pt", out / "last.pt")
    finish(world, out, ranks)
    assert_same_run(whole, out)


# ------------------------------------------------------------------ other processes

def test_two_processes_do_not_train_into_one_folder_and_a_killed_one_leaves_no_lock(world, tmp_path):
    out = tmp_path / "run"
    first = start(options(world, out, steps=10_000, save_every=1, workers=2), tmp_path / "log")
    assert wait_for(lambda: steps_logged(out) >= 2, first)
    for resume in False, True:
        assert codes(start(options(world, out, resume=resume), tmp_path / "second.log")) == [1]
    said = (tmp_path / "second.log").read_text()
    assert said.count(f"train.py: another process is training into {out}: wait for it") == 2
    kill(first)
    step = train.load_checkpoint(newest(out))["step"]
    assert codes(start(options(world, out, resume=True, steps=step + 2), tmp_path / "third.log")) == [0]


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_launcher_of_several_processes_that_are_no_ranks_is_refused(name, world, tmp_path):
    words = [sys.executable, ROOT / "train.py", *options(world, tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, name: "2"})
    assert done.returncode == 1
    assert f"train.py: {name} is 2" in done.stderr and "torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_that_cannot_reach_each_other_are_told_to_look_at_the_network(world, tmp_path):
    processes = start(options(world, tmp_path / "run"), tmp_path / "log", ranks=2, patch=wrong_interface)
    assert codes(processes) == [1, 1]
    said = (tmp_path / "log").read_text()
    assert "train.py: the ranks cannot reach each other" in said and "GLOO_SOCKET_IFNAME" in said
    assert "Traceback" not in said


def wrong_interface(rank):
    os.environ["GLOO_SOCKET_IFNAME"] = "nonesuch0"


# ------------------------------------------------------------------ data

def test_a_killed_data_worker_is_named(world, tmp_path):
    process, = start(options(world, tmp_path / "run", workers=2, steps=10_000), tmp_path / "log")
    assert wait_for(lambda: steps_logged(tmp_path / "run") >= 2, [process])
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    assert codes([process]) == [1]
    said = (tmp_path / "log").read_text()
    assert "train.py: a data worker has died" in said and "Traceback" not in said


def test_bad_files_met_by_data_workers_stop_all_ranks_in_one_sentence(world, tmp_path):
    write_images(tmp_path / "images", n=200, size=32)
    for i in range(0, 200, 50):
        path = next((tmp_path / "images").rglob(f"{i:03d}.png"))
        path.unlink()
        path.mkdir() if i % 100 else path.write_bytes(b"")      # not to be read, or empty
    change = {"data": tmp_path / "images", "workers": 2, "batch": 10, "steps": 40}
    processes = start(options(world, tmp_path / "run", **change), tmp_path / "log", ranks=2)
    assert codes(processes) == [1, 1]
    said = (tmp_path / "log").read_text()
    assert "train.py: more than 1 % of the" in said and "Traceback" not in said


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_bad_file_whose_name_no_encoding_knows_is_named_and_skipped(encoding, world, tmp_path):
    write_images(tmp_path / "images", n=192, size=32)
    name = b"stra\xdfe.jpg" if encoding == "utf-8" else "stra\u00dfe.jpg".encode()
    with open(os.path.join(os.fsencode(tmp_path / "images" / "a"), name), "wb") as file:
        file.write(b"no image")
    argv = options(world, tmp_path / "run", data=tmp_path / "images", batch=64)
    env = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (rb"stra\udcdfe.jpg" if encoding == "utf-8" else rb"stra\xdfe.jpg") in done.stderr


def no_checkpoints_on_rank_1(rank):
    if rank == 1:
        train.find_checkpoint = lambda run: None


def test_ranks_that_see_different_checkpoints_are_told_to_share_the_folder(world, tmp_path):
    out = tmp_path / "run"
    assert codes(start(options(world, out, steps=2), tmp_path / "log", ranks=2)) == [0, 0]
    again = options(world, out, resume=True)
    processes = start(again, tmp_path / "log", ranks=2, patch=no_checkpoints_on_rank_1)
    assert codes(processes) == [1, 1]
    said = (tmp_path / "log").read_text()
    assert f"train.py: the ranks see checkpoints of different steps in {out}, 0 and 2" in said
    assert "Traceback" not in said


# ------------------------------------------------------------------ numbers

def not_a_number_on_the_last_rank(rank):
    calls, loss, save = [], train.generator_loss, train.save

    def sometimes(fake):
        calls.append(fake)
        last = rank == int(os.environ["WORLD_SIZE"]) - 1
        return loss(fake) * (float("nan") if len(calls) == 3 and last else 1)

    def save_a_copy(run):
        save(run)
        if rank == 0:
            shutil.copy(run.out / "last.pt", run.out / f"step{run.step}.pt")

    train.generator_loss, train.save = sometimes, save_a_copy


def infinite_from_step_5(rank):
    calls, loss = [], train.generator_loss

    def infinite(fake):
        calls.append(fake)
        return loss(fake) * (float("inf") if len(calls) > 4 else 1)

    train.generator_loss, train.MAX_SKIPS = infinite, 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_with_a_nan_on_one_rank_is_skipped_on_all(ranks, world, tmp_path):
    argv = options(world, tmp_path / "run", gan_start=0, save_every=1)
    processes = start(argv, tmp_path / "log", ranks, patch=not_a_number_on_the_last_rank)
    assert codes(processes) == [0] * ranks, (tmp_path / "log").read_text()
    at = {n: train.load_checkpoint(tmp_path / "run" / f"step{n}.pt") for n in (2, 3, 4, STEPS)}
    for part in "model", "ema", "disc":
        assert equal(at[2][part], at[3][part]) and not equal(at[3][part], at[4][part])
    assert equal(at[2]["opt"]["state"], at[3]["opt"]["state"])
    logged = metrics(tmp_path / "run")
    assert [m["skips"] for m in logged] == [0, 0] + [1] * 6
    assert logged[2]["gan"] is None and logged[3]["gan"] is not None
    assert all(torch.isfinite(t).all() for t in at[STEPS]["ema"].values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_too_many_skipped_steps_the_run_ends_and_names_its_checkpoint(ranks, world, tmp_path):
    out = tmp_path / "run"
    argv = options(world, out, gan_start=0, save_every=4, steps=100)
    assert codes(start(argv, tmp_path / "log", ranks, patch=infinite_from_step_5)) == [1] * ranks
    said = (tmp_path / "log").read_text()
    assert "in the last 3 steps, up to step 7: go on from step 4 with --resume" in said
    assert "Traceback" not in said
    assert train.load_checkpoint(out / "last.pt")["step"] == 4
