"""The real server on a loopback port: driven by gradio_client, and knocked at by strangers."""

import ast
import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import av
import httpx
import pytest

import app
from app.cli import main
from app.config import AppConfig
from app.jobs import Job, State
from app.media import read_settings
from app.params import Params
from app.ui import render
from odvae.runtime.errors import UserError

PROMPT = "a red circle moving left over a striped background"


class Tags(HTMLParser):
    """What a browser would see in a piece of HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def connect(site, tmp_path, **options):
    from gradio_client import Client

    return Client(site.url, verbose=False, download_files=str(tmp_path / "downloads"), **options)


def test_client_submits_follows_and_gets_the_video(start_site, fake, tmp_path, until):
    site = start_site(fake)
    client = connect(site, tmp_path)
    job = client.predict(prompt=PROMPT, seconds=2, steps=3, api_name="/submit")
    status = until(lambda: (s := client.predict(job, api_name="/status"))["state"] == "done" and s, "the job is done")
    assert (
        status["settings"]["frames"] == 17 and status["settings"]["seed"] >= 0 and status["progress"]["fraction"] == 1
    )

    path = Path(client.predict(job, api_name="/result"))
    with av.open(str(path)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 17
    assert read_settings(path)["prompt"] == PROMPT and read_settings(path)["seed"] == status["settings"]["seed"]
    assert path.is_relative_to(tmp_path / "downloads"), "it came over the wire"


def test_client_cancels_and_keeps_what_is_finished(start_site, paced, tmp_path, until):
    site = start_site(paced)
    client = connect(site, tmp_path)
    job = client.predict(prompt=PROMPT, seed=3, api_name="/submit")
    with pytest.raises(Exception, match="not finished"):
        client.predict(job, api_name="/result")
    paced.allow(2)
    until(lambda: client.predict(job, api_name="/status")["progress"]["frames"] == 9, "two groups are made")
    client.predict(job, api_name="/cancel")
    until(lambda: client.predict(job, api_name="/status")["state"] == "cancelled", "the job is cancelled")
    with av.open(client.predict(job, api_name="/result")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9


def test_the_api_refuses_with_a_reason(start_site, fake, tmp_path):
    client = connect(start_site(fake), tmp_path)
    for wrong, told in (({"steps": 0}, "steps: must be at least 1"), ({"seconds": 999}, "seconds: at most 60")):
        with pytest.raises(Exception, match=told):
            client.predict(**{"prompt": PROMPT, **wrong}, api_name="/submit")
    for name in ("/etc/passwd", "../../jobs.sqlite3", "0" * 32):
        for endpoint in ("/result", "/status", "/cancel"):
            with pytest.raises(Exception, match="There is no video"):
                client.predict(name, api_name=endpoint)


def test_strangers_are_kept_out(start_site, fake, tmp_path, until):
    site = start_site(fake)
    job = site.worker.submit({"prompt": PROMPT, "seconds": 1, "steps": 1})
    until(lambda: site.worker.store.get(job.id).state is State.DONE, "the job is done")
    with httpx.Client(base_url=site.url) as web:
        page = web.get("/")
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        assert web.get("/", headers={"Host": "evil.example"}).status_code == 400, "DNS rebinding"
        cross = web.post("/gradio_api/queue/join", json={}, headers={"Origin": "http://evil.example"})
        assert cross.status_code == 403
        video = web.get(f"/media/{job.id}/video.mp4", headers={"Range": "bytes=0-99"})
        assert (video.status_code, len(video.content), video.headers["content-type"]) == (206, 100, "video/mp4")
        assert web.get(f"/media/{job.id}/poster.webp").headers["content-type"] == "image/webp"
        for path in (
            f"/media/{job.id}/latents-0001.safetensors",
            f"/media/{job.id}/..%2f..%2fjobs.sqlite3",
            f"/media/{'0' * 32}/video.mp4",
            f"/gradio_api/file={tmp_path}/data/jobs.sqlite3",
            f"/gradio_api/file={Path(app.__file__)}",
            "/docs",
        ):
            assert web.get(path).status_code in (403, 404), path


def test_a_password_is_asked_for_everything(start_site, fake, tmp_path, until):
    site = start_site(fake, auth="ada:secret:word")
    job = site.worker.submit({"prompt": PROMPT, "seconds": 1, "steps": 1})
    until(lambda: site.worker.store.get(job.id).state is State.DONE, "the job is done")
    for path in ("/", "/config", "/gradio_api/info", f"/media/{job.id}/video.mp4"):
        assert httpx.get(site.url + path).status_code == 401
        assert httpx.get(site.url + path, auth=("ada", "wrong")).status_code == 401
        assert httpx.get(site.url + path, auth=("ada", "secret:word")).status_code == 200
    header = {"Authorization": "Basic " + base64.b64encode(b"ada:secret:word").decode()}
    assert connect(site, tmp_path, headers=header).predict(job.id, api_name="/status")["state"] == "done"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "a password is needed"),
        (["--host", "0.0.0.0", "--auth", "nocolon"], "user:password"),
        (["--port", "99999"], "port"),
        (["prot=1"], "did you mean 'port'"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml"),
    ],
)
def test_the_command_line_tells_mistakes(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("LVDM_APP_AUTH", raising=False)
    assert main([*arguments, "--data-dir", str(tmp_path)]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_port_that_is_taken_is_told(start_site, fake, capsys, tmp_path):
    port = start_site(fake).url.rpartition(":")[2]
    assert main(["--port", port, "--data-dir", str(tmp_path / "other")]) == 2
    assert "in use already" in capsys.readouterr().err


def test_only_with_a_password_open_to_the_network():
    with pytest.raises(UserError):
        AppConfig(host="0.0.0.0").check_exposure()
    AppConfig(host="0.0.0.0", auth="a:b").check_exposure()
    AppConfig().check_exposure()
    assert AppConfig().hosts.count("*") == 0


def test_what_a_user_writes_is_only_text_on_the_page():
    evil = "<img src=x onerror=alert(1)>\"'${alert(1)}{{value}}"
    params = Params(prompt=evil, negative_prompt=evil, seed=1, frames=1, frame_rate=8, steps=1, guidance=1)
    job = Job(id="0" * 32, state=State.FAILED, params=params, created=0, error=evil, advice=evil)
    for html in (render.status(job), render.history([job], None), render.notice(evil)):
        tags = Tags(html)
        assert tags.names.isdisjoint({"img", "script"}) and "onerror" not in tags.attributes
        assert evil in tags.text


def test_gradio_only_where_the_page_is_and_no_torch_at_the_start():
    root = Path(app.__file__).parent
    for path in root.glob("*.py"):
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not any(name.split(".")[0] == "gradio" for name in imported), path
    code = "import sys, app.cli, app.worker, app.server; print([m for m in ('torch', 'gradio') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
