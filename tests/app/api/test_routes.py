"""The server from outside: plain HTTP, gradio_client, passwords, and hostile requests."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from safetensors.torch import load
from tiny_adapters import save_adapter
from tiny_open_sora import make_open_sora_pipeline
from waiting import TIMEOUT

from app.config import AppConfig
from app.server import serve
from app.storage.jobs import JobKind
from lvdm.sampling.loading import load_pipeline
from odvae.data.synthetic import write_rendered
from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError

SETTINGS = {"prompt": "a red circle", "seconds": 2, "num_inference_steps": 2, "seed": 3}


def follow(client: httpx.Client, job: str) -> list[dict]:
    """Return the events of a job until it ends."""
    events = []
    with client.stream("GET", f"/api/jobs/{job}/events", timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
    return events


def test_http_api_submits_follows_and_fetches(server, gates, tmp_path):
    client = httpx.Client(base_url=server.url)
    answer = client.post("/api/jobs", json=SETTINGS | {"prompt": "a red circle, waits 2"})
    assert answer.status_code == 202
    job = answer.json()["id"]
    (gates / "2").touch()
    events = follow(client, job)
    assert events[-1]["state"] == "done" and events[-1]["params"]["seed"] == 3 and len(events) > 2
    assert [one["progress"]["fraction"] for one in events] == sorted(one["progress"]["fraction"] for one in events)
    info = client.get("/api/server").json()
    [worker] = info["workers"]
    assert (worker["number"], worker["state"], worker["device"]) == (0, "ready", "cpu") == (
        events[-1]["worker"], "ready", "cpu")
    assert info["model"]["pipeline"] == "" and info["model"]["height"] == 32
    offered = {asset["id"] for asset in client.get("/api/assets?kind=pipeline").json()}
    assert {model["pipeline"] for model in info["models"]} == offered
    video = tmp_path / "fetched.mp4"
    video.write_bytes(client.get(events[-1]["files"]["final.mp4"]).content)
    with VideoReader(video) as read:
        assert sum(len(chunk) for chunk in read.iter_chunks()) == 17
    part = client.get(events[-1]["files"]["final.mp4"], headers={"Range": "bytes=0-9"})
    assert part.status_code == 206 and part.content == video.read_bytes()[:10]

    write_rendered(tmp_path / "clips", 1, frames=9, size=32, seed=1)
    clip = next((tmp_path / "clips").glob("*.mp4"))
    upload = client.post("/api/uploads", params={"name": "my clip.mp4"}, content=clip.read_bytes())
    assert upload.status_code == 201 and upload.json()["name"] == "my clip.mp4" and "path" not in upload.json()
    longer = client.post("/api/jobs", json=SETTINGS | {"upload": upload.json()["id"], "seconds": 3}).json()
    assert follow(client, longer["id"])[-1]["result"]["frames"] == 25
    again = client.post("/api/jobs", json={"kind": "decode", "job": job}).json()
    assert follow(client, again["id"])[-1]["state"] == "done"

    one = client.post("/api/jobs", json=SETTINGS | {"prompt": "waits 1"}).json()["id"]
    two, three = (client.post("/api/jobs", json=SETTINGS | {"prompt": name}).json()["id"] for name in ("two", "three"))
    assert client.post(f"/api/jobs/{three}/earlier").status_code == 200
    assert [job["id"] for job in client.get("/api/queue").json()][-2:] == [three, two]
    assert client.put(f"/api/jobs/{two}", json=SETTINGS | {"prompt": "other"}).json()["title"] == "other"
    assert client.post(f"/api/jobs/{two}/cancel").json()["state"] == "cancelled"
    assert client.delete(f"/api/jobs/{two}").status_code == 200
    assert client.get(f"/api/jobs/{two}").status_code == 404
    (gates / "1").touch()
    assert follow(client, one)[-1]["state"] == follow(client, three)[-1]["state"] == "done"
    found = client.get("/api/jobs", params={"search": "three", "state": "done"}).json()
    assert [job["id"] for job in found] == [three]


def test_the_api_page_needs_no_other_server(server):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    (_, body), = schema["paths"]["/api/jobs"]["post"]["requestBody"]["content"].items()
    assert body["schema"]["$ref"].endswith("JobRequest")
    kinds = schema["components"]["schemas"]["JobRequest"]["oneOf"]
    assert {one["properties"]["kind"]["const"] for one in kinds} == {*JobKind}
    assert "$ref" not in json.dumps(kinds), "there is nothing to look up"
    page = httpx.get(f"{server.url}/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text and "//" not in page.text and "guidance_scale" in page.text
    for wrong, words in (
        ({"kind": "<b>"}, "kind: "),
        ({"num_inference_steps": 10**9}, "num_inference_steps: must be at most 200"),
    ):
        answer = httpx.post(f"{server.url}/api/jobs", json=SETTINGS | wrong)
        assert answer.status_code == 400 and words in answer.json()["error"]
    answer = httpx.get(f"{server.url}/api/jobs", params={"limit": "many"})
    assert answer.status_code == 400
    assert answer.json() == {"error": "limit: must be a whole number, but 'many' was given."}


def test_gradio_client_generates_and_gets_readable_errors(server):
    client = Client(server.url, verbose=False)
    job = client.predict(prompt="a red circle", seconds=2, num_inference_steps=2, api_name="/generate")
    while client.predict(job, api_name="/status")["state"] in ("queued", "running"):
        pass
    with VideoReader(Path(client.predict(job, api_name="/result"))) as video:
        assert sum(len(chunk) for chunk in video.iter_chunks()) == 17
    with pytest.raises(AppError, match="prompt: is empty"):
        client.predict(prompt="", api_name="/generate")
    with pytest.raises(AppError, match="There is no job that name"):
        client.predict("../../etc/passwd", api_name="/result")
    assert client.predict("submit me", "", api_name="/jobs") == []
    again = client.predict("generate", SETTINGS, api_name="/submit")
    assert client.predict(again, "cancel", api_name="/control")["id"] == again


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_loras_over_http_and_gradio_client(server):
    transformer = load_pipeline(server.service.config.pipeline).transformer
    root = server.service.config.folders[0] / "loras"
    for name, model in ("ink", transformer), ("other", make_open_sora_pipeline().transformer):
        save_adapter(model, root, name=f"{name}.safetensors")
    server.service.services.assets.invalidate()
    client, gradio = httpx.Client(base_url=server.url), Client(server.url, verbose=False)
    assets = {asset["name"]: asset for asset in client.get("/api/assets?kind=lora").json()}
    assert gradio.predict(kind="lora", api_name="/assets") == list(assets.values())
    ink, other = ({"id": assets[f"loras/{name}"]["id"], "weight": 0.5} for name in ("ink", "other"))
    answer = client.post("/api/jobs", json=SETTINGS | {"loras": [other]})
    assert answer.status_code == 400 and "loras/other is for another model" in answer.json()["error"]
    for wrong in ({"id": "../../etc"}, "ink", {"id": ink["id"], "weight": "heavy"}, {"path": "/etc/passwd"}):
        answer = client.post("/api/jobs", json=SETTINGS | {"loras": [wrong]})
        assert answer.status_code == 400 and answer.json()["error"].startswith("loras")
    first = client.post("/api/jobs", json=SETTINGS | {"loras": [ink]}).json()["id"]
    second = gradio.predict(**SETTINGS, loras=[ink], api_name="/generate")
    latents = []
    for job in first, second:
        done = follow(client, job)[-1]
        assert done["state"] == "done" and done["params"]["loras"] == [ink | {"name": "loras/ink"}]
        latents.append(load(client.get(done["files"]["final.safetensors"]).content)["latents"])
    assert latents[0].equal(latents[1])


def test_every_path_requires_a_password_and_histories_are_private(start_server):
    server = start_server(auth=("ada:secret", "bob:other:colon"))
    ada, bob = (httpx.Client(base_url=server.url, headers=basic(*who)) for who in (("ada", "secret"),
                                                                                   ("bob", "other:colon")))
    job = ada.post("/api/jobs", json=SETTINGS).json()["id"]
    assert follow(ada, job)[-1]["state"] == "done"
    anonymous = httpx.Client(base_url=server.url)  # one for all requests: each new one loads the certificates
    for path in ("/", "/config", "/api/jobs", f"/media/{job}/final.mp4", "/gradio_api/info", "/api/uploads", "/docs",
                 "/openapi.json"):
        for headers in ({}, basic("ada", "wrong"), basic("eve", "secret"), basic("", ""), basic("ada", ""),
                        {"Authorization": "Basic ???"}, {"Authorization": "Bearer x"}):
            answer = anonymous.get(path, headers=headers)
            assert answer.status_code == 401, (path, headers)
    for path in (f"/media/{job}/final.mp4", f"/api/jobs/{job}", f"/media/{job}/chunks/0", f"/api/jobs/{job}/events"):
        assert bob.get(path).status_code == 404
    assert bob.get("/api/jobs").json() == [] and bob.post(f"/api/jobs/{job}/cancel").status_code == 404
    assert bob.post("/api/jobs", json={"kind": "decode", "job": job}).status_code == 400
    assert bob.post("/api/jobs", json=SETTINGS | {"job": job, "seconds": 4}).status_code == 400
    assert bob.delete(f"/api/jobs/{job}").status_code == 404 and len(ada.get("/api/jobs").json()) == 1
    with pytest.raises((httpx.HTTPError, ValueError)):
        Client(server.url, verbose=False)
    client = Client(server.url, headers=basic("bob", "other:colon"), verbose=False)
    assert client.predict("", "", api_name="/jobs") == []


def test_listening_on_the_network_requires_a_password(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"0\.0\.0\.0 is open to other machines and needs a password"):
        serve(AppConfig(host="0.0.0.0", data_dir=tmp_path))
    for wrong in (("nopassword",), (":",), ("a:b", "a:c")):
        with pytest.raises(UserError, match="auth"):
            serve(AppConfig(host="0.0.0.0", auth=wrong, data_dir=tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="mcp: the package is not installed"):
        serve(AppConfig(mcp=True, data_dir=tmp_path))
    with pytest.raises(UserError, match="it has no model_index"):
        serve(AppConfig(pipeline=tmp_path, data_dir=tmp_path))


def test_other_sites_hosts_and_sockets_are_refused(server):
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 400
    before = server.service.history("api", limit=-1)
    answer = httpx.post(f"{server.url}/api/jobs", json=SETTINGS, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403 and server.service.history("api", limit=-1) == before
    form = httpx.post(f"{server.url}/api/jobs", content=json.dumps(SETTINGS), headers={"Content-Type": "text/plain"})
    assert form.status_code == 415
    page = httpx.get(server.url)
    assert "default-src 'self'" in page.headers["content-security-policy"] and "HttpOnly" in page.headers["set-cookie"]
    assert httpx.post(f"{server.url}/api/jobs", content=b"[" * 10**5, headers={"Content-Type": "application/json"}
                      ).status_code == 400
    assert httpx.post(f"{server.url}/api/jobs", content=b'{"prompt": "' + b"x" * 10**6 + b'"}',
                      headers={"Content-Type": "application/json"}).status_code == 413
    uploads = server.service.job_files.root / "uploads"
    files = set(uploads.glob("*"))
    assert httpx.post(f"{server.url}/api/uploads", content=b"no video").status_code == 400
    assert set(uploads.glob("*")) == files


def test_events_of_the_page_accept_only_uploaded_files(server, tmp_path):
    write_rendered(tmp_path / "private", 1, frames=9, size=32, seed=9)  # other tests upload seed 1
    secret = next((tmp_path / "private").glob("*.mp4"))
    client = httpx.Client(base_url=server.url, timeout=TIMEOUT)
    page = client.get("/config").json()
    files = {one["id"] for one in page["components"] if one["type"] in ("file", "video", "image", "uploadbutton")}
    requests = 0
    for number, event in enumerate(page["dependencies"]):
        if not files & set(event["inputs"]):
            continue
        file = {"path": str(secret), "orig_name": "a.mp4", "meta": {"_type": "gradio.FileData"}}
        data = [file if one in files else None for one in event["inputs"]]
        answer = client.post("/gradio_api/run/predict", json={"data": data, "fn_index": event.get("id", number),
                                                              "session_hash": "x", "trigger_id": None})
        assert answer.status_code == 400 or "upload is incomplete" in answer.text, answer.text
        requests += 1
    assert requests >= 3
    kept = [path.read_bytes() for path in server.service.job_files.root.glob("**/*") if path.is_file()]
    assert secret.read_bytes() not in kept


def plain(character: str) -> bool:
    return character.isascii() and character.isprintable()


def hostile(rng: random.Random, job: str, secret: Path) -> tuple[str, str, dict]:
    """Return a random hostile request."""
    path = str(secret)
    climbs = [path, "..%2f" * 12 + path[1:], "../" * 12 + path[1:], "%2e%2e/" * 12 + path[1:], "....//" * 9 + path[1:],
              f"file://{path}", f"\\\\localhost{path}", path + "\0.mp4", "jobs.sqlite3", "../jobs.sqlite3",
              f"{job}/../../jobs.sqlite3", "params.json", "http://169.254.169.254/latest/meta-data", "CON", "-rf",
              "%00", "a" * 3000, "‮4pm.exe", "<script>alert(1)</script>", "{{7*7}}", "' OR 1=1 --", "0" * 32]
    word = rng.choice(climbs)
    file = {"path": word, "url": word, "orig_name": word, "meta": {"_type": "gradio.FileData"}}
    value = rng.choice([word, [word] * 50, {"a": word}, file, [[file]], None, True, -1, 1e308, 2**63, "", float(2**70)])
    endpoints = ["generate", "submit", "status", "control", "result", "jobs", "nothing", word[:40]]
    return rng.choice([
        lambda: ("GET", f"/media/{word}/final.mp4", {}),
        lambda: ("GET", f"/media/{job}/{word}", {}),
        lambda: ("GET", f"/media/{job}/chunks/{word}", {}),
        lambda: ("GET", f"/gradio_api/file={word}", {}),
        lambda: ("GET", f"/file={word}", {}),
        lambda: ("GET", f"/gradio_api/proxy={word}", {}),
        lambda: ("GET", f"/gradio_api/stream/{word}/x/y/playlist.m3u8", {}),
        lambda: ("GET", f"/static/{word}", {}),
        lambda: ("GET", f"/assets/{word}", {}),
        lambda: ("GET", f"/theme.css?theme={word}", {}),
        lambda: ("GET", f"/api/jobs/{word}", {}),
        lambda: ("GET", "/api/jobs", {"params": {rng.choice(["kind", "search", "limit", "offset", "state"]): word}}),
        lambda: ("GET", "/api/assets", {"params": {"kind": word}}),
        lambda: ("POST", f"/api/jobs/{job}/{word}", {}),
        lambda: ("PUT", f"/api/jobs/{job}", {"json": {rng.choice([*SETTINGS, "job", "upload", word[:50]]): value}}),
        lambda: ("POST", "/api/jobs", {"json": {"kind": rng.choice(["generate", "decode", "compress", "cache", "train",
                                                                    value]),
                                                rng.choice(["prompt", "job", "upload", "pipeline", "source", "cache",
                                                            "name", "vae", "run", "seed", "sections"]): value}}),
        lambda: ("POST", "/api/uploads", {"params": {"name": word}, "content": word.encode() * 9}),
        lambda: ("POST", f"/gradio_api/call/{rng.choice(endpoints)}", {"json": {"data": [value, value]}}),
        lambda: ("POST", "/gradio_api/queue/join", {"json": {"data": [value] * rng.randint(0, 9), "fn_index":
                                                             rng.randint(-5, 90), "session_hash": "x"}}),
        lambda: ("POST", f"/gradio_api/run/{rng.randint(0, 90)}", {"json": {"data": [value]}}),
        lambda: ("POST", "/gradio_api/run/predict", {"json": {"data": [value] * rng.randint(0, 25), "fn_index":
                                                              rng.randint(0, 90), "session_hash": "x"}}),
        lambda: ("POST", "/gradio_api/upload", {"files": {"files": (word[:200].replace("\0", ""), b"x")}}),
        lambda: ("POST", "/gradio_api/component_server", {"json": {"data": value, "component_id": rng.randint(0, 90),
                                                                   "fn_name": word, "session_hash": "x"}}),
        lambda: (rng.choice(["DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD"]), f"/{word}", {}),
        lambda: ("GET", "/", {"headers": {"Cookie": f"lvdm_visitor={word[:100]}", "Range": f"bytes={word[:20]}"}}),
    ])()  # fmt: skip


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_requests_leak_nothing_and_break_nothing(start_server, tmp_path, count, caplog):
    secret = tmp_path / "secret.txt"
    secret.write_text("the password is swordfish")
    server = start_server(max_queued=5)
    client = httpx.Client(base_url=server.url, timeout=TIMEOUT, follow_redirects=False)
    job = client.post("/api/jobs", json=SETTINGS).json()["id"]
    assert follow(client, job)[-1]["state"] == "done"
    rng, codes = random.Random(count), []
    for number in range(count):
        method, path, options = hostile(rng, job, secret)
        path = "".join(c if plain(c) and c != " " else "%00" if c == "\0" else "%E2" for c in path)
        if "headers" in options:
            options["headers"] = {k: "".join(filter(plain, v)) for k, v in options["headers"].items()}
        try:
            with client.stream(method, path, **options) as answer:
                body = b"" if answer.headers.get("content-type", "").startswith("text/event-stream") else answer.read()
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError):
            continue  # not even a request
        codes.append(answer.status_code)
        assert answer.status_code < 500, (number, method, path, options, body[:300])
        assert b"swordfish" not in body and b"SQLite format" not in body, (method, path)
        assert b"swordfish" not in b"".join(p.read_bytes() for p in server.service.job_files.root.glob("uploads/*")
                                            if p.is_file())
    assert len(codes) > count * 0.8 and 200 in codes and 404 in codes
    for waiting in client.get("/api/queue").json():
        client.post(f"/api/jobs/{waiting['id']}/cancel")
    after = client.post("/api/jobs", json=SETTINGS | {"seed": 4}).json()
    assert follow(client, after["id"])[-1]["state"] == "done", "it works on"
    assert httpx.get(server.url).status_code == 200
