"""weights.sh against a local server that redirects, breaks connections, refuses and sends wrong bytes.

Oracle: the bytes served.
"""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "weights.sh"
BODY = bytes(i * i % 251 for i in range(200_000))
HUB = "/timm/vit_huge_plus_patch16_dinov3.lvd1689m/resolve/main/model.safetensors"
VGG16 = "/models/vgg16-397923af.pth"
INCEPTION = "/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

TOOLS = shutil.which("curl") and shutil.which("bash")
pytestmark = pytest.mark.skipif(not TOOLS, reason="weights.sh needs bash and curl")


class Server(ThreadingHTTPServer):
    """`files` by path; each fault is an attribute that a test sets.

    `log` holds (path, Range, Authorization) of each request.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log = {}, []
        self.status = {}                    # path -> HTTP status instead of the file
        self.redirect = {}                  # path -> address elsewhere
        self.headers = {}                   # path -> more headers
        self.break_after = []               # the next downloads end after so many bytes, one entry each
        self.no_range = False               # answer 200 with the whole file whatever was asked
        self.slow = False                   # stop after 20 kB
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.log.append((self.path, asked, self.headers.get("Authorization")))
        body = server.files.get(self.path)
        usual = 302 if self.path in server.redirect else 404 if body is None else 200
        code = server.status.get(self.path, usual)
        head, start, end = dict(server.headers.get(self.path, {})), 0, len(body or b"")
        if code == 302:
            head["Location"] = server.redirect[self.path]
        if code == 200 and asked and not server.no_range:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            code, start, end = 206, int(first), min(end, int(last) + 1) if last else end
            head["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            if start >= len(body):
                code, start, end = 416, 0, 0
                head["Content-Range"] = f"bytes */{len(body)}"
        body = body[start:end] if code in (200, 206) else b"no"
        self.send_response(code)
        for name, value in {**head, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if server.break_after and asked != "bytes=0-0" and code in (200, 206):
            self.wfile.write(body[:server.break_after.pop(0)])
            self.close_connection = True
            return
        try:
            for i in range(0, len(body), 20_000):
                self.wfile.write(body[i:i + 20_000])
                while server.slow:
                    time.sleep(0.01)
        except (BrokenPipeError, ConnectionResetError):     # the client has left
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    server.files[HUB] = BODY
    server.headers[HUB] = {"X-Linked-Etag": f'"{hashlib.sha256(BODY).hexdigest()}"'}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, server):
    """Runs a copy of weights.sh in tmp_path with all hosts at the server -> (exit status, what it says)."""
    shutil.copy(SCRIPT, tmp_path)

    def run(*args, **env):
        process = subprocess.run([tmp_path / "weights.sh", *args], env=environment(server, **env),
                                 capture_output=True, text=True)
        assert "curl:" not in process.stderr and "line " not in process.stderr
        return process.returncode, process.stdout + process.stderr
    return run


def environment(server, **env):
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_TOKEN"}
    mirrors = dict.fromkeys(["HF_ENDPOINT", "TORCH_ENDPOINT", "GITHUB_ENDPOINT"], server.url)
    return {**clean, **mirrors, **env}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights" / "dinov3-hplus.safetensors"


def part(file, content):
    file.parent.mkdir(exist_ok=True)
    path = file.with_name(file.name + ".part")
    path.write_bytes(content)
    return path


def downloads(server):
    """The ranges asked for, without the one that asks for the checksum."""
    return [asked for _, asked, _ in server.log if asked != "bytes=0-0"]


# ------------------------------------------------------------------ what goes right

def test_the_default_is_the_h_plus_encoder_of_timm(run, server, file):
    code, said = run("--only", "dinov3")
    assert code == 0 and file.read_bytes() == BODY and os.listdir(file.parent) == [file.name]
    assert "SHA-256 is right" in said and "License" in said


@pytest.mark.parametrize("size, name", [
    ("s", "small"), ("splus", "small_plus"), ("b", "base"), ("l", "large"), ("7b", "7b")])
def test_each_size_is_its_repository_of_timm(run, server, tmp_path, size, name):
    path = HUB.replace("huge_plus", name)
    server.files[path], server.headers[path] = BODY, server.headers[HUB]
    assert run(size, "--only", "dinov3")[0] == 0
    assert (tmp_path / "weights" / f"dinov3-{size}.safetensors").read_bytes() == BODY


def test_a_broken_connection_is_resumed_until_the_file_is_whole(run, server, file):
    server.break_after = [50_000, 0, 70_000, 1000]
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY
    assert downloads(server) == [None, "bytes=50000-", "bytes=50000-", "bytes=120000-", "bytes=121000-"]


def test_a_partial_file_of_an_earlier_run_is_resumed(run, server, file):
    part(file, BODY[:123_456])
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY
    assert downloads(server) == ["bytes=123456-"]


def test_a_partial_file_that_is_already_whole_is_checked_and_taken(run, server, file):
    part(file, BODY)
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY


def test_a_server_without_ranges_starts_over(run, server, file):
    server.no_range = True
    part(file, BODY[:1000])
    server.break_after = [50_000]
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY


def test_a_redirect_keeps_the_hubs_checksum_and_takes_no_token_along(run, server, file):
    """As on the hub: the checksum in the redirect, the bytes at another host, with another hash as tag."""
    storage = Server()
    storage.files["/blob"], storage.headers["/blob"] = BODY, {"ETag": f'"{"0" * 64}"'}
    server.redirect[HUB] = storage.url + "/blob"
    code, said = run("--only", "dinov3", HF_TOKEN="hf_secret")
    storage.shutdown()
    assert code == 0 and file.read_bytes() == BODY and "hf_secret" not in said
    assert all(token == "Bearer hf_secret" for _, _, token in server.log)
    assert all(token is None for _, _, token in storage.log)


def test_the_token_goes_to_the_hub_alone(run, server):
    server.files[VGG16] = b"x"
    run("--only", "vgg16", HF_TOKEN="hf_secret", HF_ENDPOINT="http://127.0.0.1:1")
    assert [token for _, _, token in server.log] == [None]


def test_an_etag_of_64_digits_is_a_checksum_too(run, server, file):
    server.headers[HUB] = {"ETag": f'"{hashlib.sha256(BODY).hexdigest()}"'}
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY


def test_a_linked_etag_counts_before_an_etag_of_64_digits(run, server, file):
    server.headers[HUB] |= {"ETag": f'"{"0" * 64}"'}
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY


def test_another_repository_can_be_named(run, server, file):
    repo = "facebook/dinov3-vith16plus-pretrain-lvd1689m"
    path = f"/{repo}/resolve/main/model.safetensors"
    server.files[path], server.headers[path] = BODY, server.headers[HUB]
    assert run("--only", "dinov3", "--repo", repo)[0] == 0 and file.read_bytes() == BODY
    assert all(asked == path for asked, _, _ in server.log)


def test_a_second_run_downloads_nothing(run, server, file):
    assert run("--only", "dinov3")[0] == 0
    server.log.clear()
    code, said = run("--only", "dinov3")
    assert code == 0 and downloads(server) == [] and "is there, SHA-256 is right" in said


def test_the_name_of_a_pth_holds_the_first_digits_of_its_checksum(run, server, tmp_path):
    """All three files, in a copy of the script whose two names hold the digits of the bytes served here."""
    script, digits = (tmp_path / "weights.sh").read_text(), hashlib.sha256(BODY).hexdigest()[:8]
    assert script.count("vgg16-397923af.pth") >= 2
    assert script.count("pt_inception-2015-12-05-6726825d.pth") >= 2
    (tmp_path / "weights.sh").write_text(script.replace("397923af", digits).replace("6726825d", digits))
    vgg16, inception = VGG16.replace("397923af", digits), INCEPTION.replace("6726825d", digits)
    server.files[vgg16] = server.files[inception] = BODY
    assert run()[0] == 0
    names = ["dinov3-hplus.safetensors", os.path.basename(inception), os.path.basename(vgg16)]
    assert sorted(os.listdir(tmp_path / "weights")) == names
    assert all((tmp_path / "weights" / name).read_bytes() == BODY for name in names)
    server.log.clear()
    assert run()[0] == 0 and downloads(server) == []


# ------------------------------------------------------------------ a file that is there

def test_a_file_that_is_there_is_kept_without_a_network(run, server, file):
    part(file, BODY).rename(file)
    code, said = run("--only", "dinov3", HF_ENDPOINT="http://127.0.0.1:1")
    assert code == 0 and "kept unchecked" in said and file.read_bytes() == BODY


def test_a_file_that_is_there_with_another_checksum_is_an_error_and_stays(run, server, file, tmp_path):
    part(file, b"something else").rename(file)
    code, said = run("--only", "dinov3")
    assert code == 1 and hashlib.sha256(b"something else").hexdigest() in said and "move it away" in said
    assert file.read_bytes() == b"something else"
    vgg = tmp_path / "weights" / "vgg16-397923af.pth"
    vgg.write_bytes(b"no weights")
    code, said = run("--only", "vgg16")
    assert code == 1 and "397923af" in said and vgg.read_bytes() == b"no weights"


# ------------------------------------------------------------------ what goes wrong: one sentence each

def sentence(said):
    """The last line, and the only one that begins with the script's name."""
    problems = [line for line in said.splitlines() if line.startswith("weights.sh: ")]
    assert len(problems) == 1 and said.splitlines()[-1] == problems[0]
    return problems[0]


def test_wrong_bytes_are_deleted_and_named(run, server, file):
    server.files[HUB] = BODY[:-1] + b"!"
    code, said = run("--only", "dinov3")
    assert code == 1 and hashlib.sha256(server.files[HUB]).hexdigest() in sentence(said)
    assert os.listdir(file.parent) == []


def test_wrong_bytes_of_a_named_checksum_are_deleted_and_named(run, server, tmp_path):
    server.files[VGG16] = b"no weights"
    code, said = run("--only", "vgg16")
    assert code == 1 and "397923af" in sentence(said) and os.listdir(tmp_path / "weights") == []


def test_a_partial_file_of_other_weights_does_not_pass(run, server, file):
    part(file, b"?" * 1000)
    code, said = run("--only", "dinov3")
    assert code == 1 and "SHA-256" in sentence(said) and os.listdir(file.parent) == []
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY


def test_no_network_names_the_host(run, file):
    code, said = run("--only", "vgg16", TORCH_ENDPOINT="http://127.0.0.1:1")
    assert code == 1 and "no connection to 127.0.0.1:1" in sentence(said)
    code, said = run("--only", "dinov3", HF_ENDPOINT="http://nowhere.invalid")
    assert code == 1 and "no connection to nowhere.invalid" in sentence(said) and not file.exists()


@pytest.mark.parametrize("status, word", [
    (401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "--repo"), (500, "later")])
def test_a_refusal_names_the_status_and_the_mend(run, server, status, word):
    for what, path in ("dinov3", HUB), ("vgg16", VGG16):
        server.status[path] = status
        code, said = run("--only", what)
        assert code == 1 and all(part in sentence(said) for part in (f"HTTP {status}", word, path))


def test_a_server_that_never_gets_further_is_given_up(run, server, file):
    server.break_after = [1000] + [0] * 20
    code, said = run("--only", "dinov3")
    assert code == 1 and "resumes" in sentence(said)
    assert file.with_name(file.name + ".part").read_bytes() == BODY[:1000]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is the full disk")
def test_a_full_disk_is_named(run, server, file):
    file.parent.mkdir()
    os.symlink("/dev/full", file.with_name(file.name + ".part"))
    code, said = run("--only", "dinov3")
    assert code == 1 and "disk is full" in sentence(said) and not file.exists()


def test_a_folder_that_cannot_be_made_is_named(run, file):
    file.parent.write_text("a file where the folder should be")
    code, said = run("--only", "dinov3")
    assert code == 1 and "weights/" in sentence(said)


def test_a_file_without_a_checksum_is_not_downloaded(run, server, file):
    server.headers[HUB] = {"ETag": '"1234"'}
    code, said = run("--only", "dinov3")
    assert code == 1 and "without a SHA-256" in sentence(said) and downloads(server) == []


@pytest.mark.parametrize("args, word", [
    (["xl"], "'xl'"), (["--only", "vgg19"], "'vgg19'"), (["--only"], "--only"), (["--repo", "x"], "'x'"),
    (["--repo", "timm/vit_large_patch16_dinov3.sat493m"], "another mean and std"),
    (["--fast"], "--fast")])
def test_a_wrong_option_is_named(run, server, args, word):
    code, said = run(*args)
    assert code == 1 and word in sentence(said) and server.log == []


def test_an_interrupt_leaves_the_partial_file_for_the_next_run(run, server, file, tmp_path):
    server.slow = True
    process = subprocess.Popen([tmp_path / "weights.sh", "--only", "dinov3"], env=environment(server),
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    unfinished = file.with_name(file.name + ".part")
    while not unfinished.exists() or not unfinished.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)                       # what Ctrl-C does: to the whole group
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "resumes" in said
    size = unfinished.stat().st_size
    assert 0 < size < len(BODY) and not file.exists()
    server.slow = False
    assert run("--only", "dinov3")[0] == 0 and file.read_bytes() == BODY
    assert downloads(server)[-1] == f"bytes={size}-"


def test_help_names_every_mirror_variable_and_size(run):
    code, said = run("--help")
    assert code == 0 and all(word in said for word in (
        "HF_ENDPOINT", "TORCH_ENDPOINT", "GITHUB_ENDPOINT", "HF_TOKEN", "splus", "7b", "licence"))
