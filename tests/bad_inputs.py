"""Bad inputs and the answer that each of them must get: a table of (name, request, status, code, param, words).

`words` have to be in the error's message: the field, and the limit where there is one. A request is a function of an
HTTP client. The models are the shipped ones: `demo` writes, `demo-image` paints.
"""

import base64
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import httpx2

from inferfleet.tasks import names

BODY_LIMIT = 1 << 20
CHAT, RESPONSES, IMAGES, EDITS = "/v1/chat/completions", "/v1/responses", "/v1/images/generations", "/v1/images/edits"
JOBS, FILES, BATCHES, HOOKS = "/v1/jobs", "/v1/files", "/v1/batches", "/v1/webhook_endpoints"
NOBODY = "0" * 32
#: Codes of errors: of most rows, and of what is understood and not served.
BAD, UNSERVED = "invalid_request", "unsupported_feature"

Ask = Callable[[httpx2.Client], httpx2.Response]
Row = tuple[str, Ask, int, str, str | None, tuple[str, ...]]


def raw(path: str, body: bytes, method: str = "POST", **headers: str) -> Ask:
    sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda http: http.request(method, path, content=body, headers=sent)


def send(path: str, values: Any, method: str = "POST", **headers: str) -> Ask:
    return raw(path, json.dumps(values).encode(), method, **headers)


def get(path: str, method: str = "GET", **headers: str) -> Ask:
    return lambda http: http.request(method, path, headers={n.replace("_", "-"): v for n, v in headers.items()})


def chat(**fields: Any) -> Ask:
    return send(CHAT, {"model": "demo", "messages": [{"role": "user", "content": "hi"}]} | fields)


def said(content: Any) -> Ask:
    return chat(messages=[{"role": "user", "content": content}])


def image(**fields: Any) -> Ask:
    return send(IMAGES, {"model": "demo-image", "prompt": "a red circle"} | fields)


def edit(picture: str | bytes, kind: str = "png", **fields: Any) -> Ask:
    url = picture if isinstance(picture, str) else f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    return send(EDITS, {"model": "demo-image", "prompt": "a red circle", "image": url} | fields)


def form(path: str, *parts: bytes, boundary: bytes = b"x") -> Ask:
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
    return raw(path, body, content_type=f"multipart/form-data; boundary={boundary.decode()}")


def field(name: str, value: bytes) -> bytes:
    return f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value


def upload(data: bytes, name: str = "file") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"; filename="a"\r\n\r\n'.encode() + data


def png(width: int, height: int, *, rows: bytes = b"", crc: int | None = None) -> bytes:
    def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
        checked = zlib.crc32(kind + data) if crc is None else crc
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checked)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(rows or (b"\0" + bytes(width)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header, crc) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def nested(depth: int) -> bytes:
    """A tool whose schema is nested so deep, written by hand: json.dumps would not."""
    schema = b'{"properties": {"a": ' * depth + b"{}" + b"}}" * depth
    return b'{"model": "demo", "messages": [{"role": "user", "content": "hi"}], "tools": [' + schema + b"]}"


def batch(**fields: Any) -> Ask:
    return send(
        BATCHES,
        {"input_file_id": f"file-{NOBODY}", "endpoint": CHAT, "completion_window": "24h"} | fields,
    )


def hook(**fields: Any) -> Ask:
    return send(HOOKS, {"name": "a", "url": "https://example.com/", "event_types": ["job.completed"]} | fields)


def chunked(path: str, size: int) -> Ask:
    parts = (b"x" * 65536 for _ in range(size // 65536))
    return lambda http: http.post(path, content=parts, headers={"content-type": "application/json"})


def reused_key(http: httpx2.Client) -> httpx2.Response:
    headers = {"Idempotency-Key": "bad-inputs", "Prefer": "respond-async"}
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    assert http.post(CHAT, json=body, headers=headers).status_code == 202
    return http.post(CHAT, json=body | {"seed": 1}, headers=headers)


def cancel_an_ended_job(http: httpx2.Client) -> httpx2.Response:
    body = {"body": {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}}
    job = http.post(JOBS, json=body, headers={"Prefer": "wait=30"}).json()
    assert job["status"] in names.TERMINAL, job
    return http.post(f"{JOBS}/{job['id']}/cancel")


JSON_ROWS: list[Row] = [
    ("brackets", raw(CHAT, b"[" * 100_000), 400, "invalid_json", None, ("64",)),
    ("nan", raw(CHAT, b'{"temperature": NaN}'), 400, "invalid_json", None, ("NaN",)),
    ("infinite", raw(CHAT, b'{"temperature": 1e400}'), 400, "invalid_json", None, ("1e400",)),
    ("surrogate", said("\ud800"), 400, "invalid_json", "messages.0.content", ("messages.0.content", "surrogate")),
    ("utf-16", raw(CHAT, '{"model": "demo"}'.encode("utf-16")), 400, "invalid_json", None, ("UTF-8",)),
    ("bom", raw(CHAT, b"\xef\xbb\xbf{}"), 400, "invalid_json", None, ("byte order mark",)),
    ("bytes", raw(CHAT, b'{"model": "\xff"}'), 400, "invalid_json", None, ("UTF-8", "11")),
    ("nothing", raw(CHAT, b""), 400, "invalid_json", None, ("empty",)),
    ("digits", raw(CHAT, b'{"seed": ' + b"9" * 5000 + b"}"), 400, "invalid_json", None, ("100",)),
    ("a list", raw(CHAT, b"[]"), 422, BAD, None, ("object",)),
    ("text", raw(CHAT, b"{}", content_type="text/plain"), 415, "unsupported_media_type", "Content-Type", ("json",)),
    ("charset", raw(CHAT, b"{}", content_type="application/json; charset=utf-16"), 415, "unsupported_media_type",
     "Content-Type", ("utf-16",)),
    ("gzip", raw(CHAT, b"\x1f\x8b", content_encoding="gzip"), 415, "unsupported_media_type", "Content-Encoding",
     ("compressed",)),
    ("large", raw(CHAT, b" " * (BODY_LIMIT + 1)), 413, "body_too_large", None, (str(BODY_LIMIT), "limit")),
    ("large in chunks", chunked(CHAT, 2 * BODY_LIMIT), 413, "body_too_large", None, (str(BODY_LIMIT),)),
    ("misspelt", chat(temprature=1), 422, BAD, "temprature", ("temprature",)),
    ("doubled key", raw(CHAT, b'{"model": "a", "model": "b"}'), 422, BAD, "model", ("model", "twice")),
    ("nul", said("a\0b"), 422, BAD, "messages.0.content", ("messages.0.content", "NUL")),
]  # fmt: skip

CHAT_ROWS: list[Row] = [
    ("n true", chat(n=True), 422, BAD, "n", ("n",)),
    ("n million", chat(n=1_000_000), 422, BAD, "n", ("8",)),
    ("n negative", chat(n=-1), 422, BAD, "n", ("1",)),
    ("max_tokens 0", chat(max_tokens=0), 422, BAD, "max_tokens", ("1",)),
    ("max_tokens 1e9", chat(max_tokens=10**9), 422, BAD, "max_tokens", ("1048576",)),
    ("max_tokens of context", chat(max_tokens=1_000_000), 422, "context_length_exceeded", "max_tokens", ("4096",)),
    ("no messages", chat(messages=[]), 422, BAD, "messages", ("messages", "empty")),
    ("role", chat(messages=[{"role": "pope", "content": "x"}]), 422, BAD, "messages.0.role", ("role", "user")),
    ("null", said(None), 422, BAD, "messages.0.content", ("messages.0.content",)),
    ("long prompt", said("word " * 5000), 422, "context_length_exceeded", "messages", ("4096",)),
    ("longest prompt", said("a" * 1_000_000), 422, "context_length_exceeded", "messages", ("4096",)),
    ("model path", chat(model="../../etc/passwd"), 404, "model_not_found", "model", ("passwd",)),
    ("model nul", chat(model="demo\0x"), 422, BAD, "model", ("NUL",)),
    ("model unknown", chat(model="gpt-4"), 404, "model_not_found", "model", ("gpt-4",)),
    ("model of images", chat(model="demo-image"), 422, BAD, "model", ("image", IMAGES)),
    ("chat_template", chat(chat_template="{{ 1 }}"), 422, UNSERVED, "chat_template", ("chat_template",)),
    ("template kwargs", chat(chat_template_kwargs={"tokenize": True}), 422, BAD, "chat_template_kwargs.tokenize",
     ("tokenize",)),
    ("logit_bias many", chat(logit_bias={str(i): 1 for i in range(10_000)}), 422, BAD, "logit_bias", ("300",)),
    ("logit_bias id", chat(logit_bias={"1000000": 1}), 422, BAD, "logit_bias", ("below",)),
    ("logit_bias infinite", raw(CHAT, b'{"logit_bias": {"1": Infinity}}'), 400, "invalid_json", None, ("Infinity",)),
    ("stop many", chat(stop=["x"] * 10_000), 422, BAD, "stop", ("8",)),
    ("stop empty", chat(stop=""), 422, BAD, "stop", ("stop", "empty")),
    ("top_logprobs", chat(logprobs=True, top_logprobs=10**6), 422, BAD, "top_logprobs", ("20",)),
    ("prompt_logprobs", chat(prompt_logprobs=True), 422, UNSERVED, "prompt_logprobs", ("prompt_logprobs",)),
    ("seed", chat(seed=2**64), 422, BAD, "seed", (str(2**63 - 1),)),
    ("penalty", chat(frequency_penalty=-3), 422, BAD, "frequency_penalty", ("-2",)),
    ("top_p", chat(top_p=0), 422, BAD, "top_p", ("0",)),
    ("tool nested", raw(CHAT, nested(20_000)), 400, "invalid_json", None, ("64",)),
    ("tool pattern", chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"pattern": "(a)\\1"}}}]),
     422, UNSERVED, "tools", ("tools",)),
    ("tool choice", chat(tool_choice={"type": "function", "function": {"name": "missing"}}), 422, UNSERVED,
     "tool_choice", ("tool_choice",)),
    ("schema ref", chat(response_format={"type": "json_schema", "json_schema": {"$ref": "http://169.254.169.254/"}}),
     422, UNSERVED, "response_format", ("json_schema",)),
    ("schema wide", chat(response_format={"type": "json_schema", "properties": {str(i): {} for i in range(20_000)}}),
     422, UNSERVED, "response_format", ("json_schema",)),
    ("images", said([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}] * 50), 422, UNSERVED,
     "messages.0.content.0", ("image_url",)),
    ("audio", said([{"type": "input_audio", "input_audio": {"data": "I0VYVE0zVQ==", "format": "mp3"}}]), 422, UNSERVED,
     "messages.0.content.0", ("input_audio",)),
    ("video", said([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,"}}]), 422, UNSERVED,
     "messages.0.content.0", ("video_url",)),
    ("parts", said([{"type": "text", "text": "x"}] * 1025), 422, BAD, "messages.0.content", ("1024",)),
    ("response tools", send(RESPONSES, {"model": "demo", "input": "x", "tools": [{"type": "web_search"}]}), 422,
     UNSERVED, "tools", ("tools",)),
    ("response background", send(RESPONSES, {"model": "demo", "input": "x", "background": True, "store": False}), 422,
     BAD, "store", ("store",)),
    ("response long", send(RESPONSES, {"model": "demo", "input": "x" * 500_000}), 422, "context_length_exceeded",
     "input", ("4096",)),
    ("no response", get(f"{RESPONSES}/resp_{NOBODY}"), 404, "response_not_found", "response_id", ()),
]  # fmt: skip

IMAGE_ROWS: list[Row] = [
    *((f"width {side}", image(width=side, height=64), 422, BAD, "width", ("16",)) for side in (0, 17, -64)),
    ("width 100000", image(width=100_000, height=64), 422, BAD, "width", ("4096",)),
    ("pixels", image(size="4096x4096"), 422, BAD, "size", ("4194304",)),
    ("size", image(size="large"), 422, BAD, "size", ("WIDTHxHEIGHT",)),
    ("steps 0", image(num_inference_steps=0), 422, BAD, "num_inference_steps", ("1",)),
    ("steps million", image(num_inference_steps=10**6), 422, BAD, "num_inference_steps", ("100",)),
    ("guidance", raw(IMAGES, b'{"guidance_scale": Infinity}'), 400, "invalid_json", None, ("Infinity",)),
    ("n", image(n=10_000), 422, BAD, "n", ("10",)),
    ("lora", image(loras=[{"name": "../../secret"}]), 422, BAD, "loras", ("secret", "none")),
    ("strength", edit(png(32, 32), strength=2), 422, BAD, "strength", ("1",)),
    ("prompt", image(prompt="x" * 10_001), 422, BAD, "prompt", ("10000",)),
    ("url of loopback", edit("http://127.1/"), 422, BAD, "image", ("data URL",)),
    ("url of metadata", edit("http://169.254.169.254/latest"), 422, BAD, "image", ("data URL",)),
    ("html", edit("data:text/html;base64,PGI+"), 422, BAD, "image", ("data URL",)),
    ("base64", edit("data:image/png;base64,not base64!"), 422, BAD, "image", ("base64",)),
    ("padding", edit("data:image/png;base64,abc"), 422, BAD, "image", ("base64",)),
    ("bomb", edit(png(13_000, 13_000, rows=bytes(13_001))), 422, BAD, "image", ("13000", "8192")),
    ("bigger bomb", edit(png(50_000, 50_000, rows=b"\0")), 422, BAD, "image", ("50000", "8192")),
    ("no bytes", edit(b""), 422, BAD, "image", ("image",)),
    ("text as png", edit(b"hello"), 422, BAD, "image", ("image",)),
    ("svg", edit(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 422, BAD, "image", ("image",)),
    ("eps", edit(b"%!PS-Adobe-3.0 EPSF-3.0"), 422, BAD, "image", ("image",)),
    ("gif", edit(b"GIF89a" + bytes(40)), 422, BAD, "image", ("image",)),
    ("jpeg cut short", edit(b"\xff\xd8\xff\xe0\0\x10JFIF", "jpeg"), 422, BAD, "image", ("image",)),
    ("png without its rows", edit(png(64, 64, rows=b"\0")), 422, BAD, "image", ("image",)),
    ("png with a wrong checksum", edit(png(64, 64, crc=1)), 422, BAD, "image", ("image",)),
    ("model of text", image(model="demo"), 422, BAD, "model", ("text", CHAT)),
    ("form without boundary", raw(EDITS, b"--x--", content_type="multipart/form-data"), 422, BAD, "Content-Type",
     ("boundary",)),
    ("form of many fields", form(EDITS, *[field(f"a{i}", b"") for i in range(65)]), 422, BAD, None, ("64",)),
    ("form of a long field", form(EDITS, field("prompt", b"x" * 70_000)), 413, "body_too_large", "prompt", ("65536",)),
    ("form that ends early", raw(EDITS, b"--x\r\n", content_type="multipart/form-data; boundary=x"), 422, BAD, None,
     ("closing boundary",)),
    ("form with two images", form(EDITS, upload(b"a", "image[]"), upload(b"b", "image[]")), 422, UNSERVED, "image",
     ("2",)),
    ("form with a word as number", form(EDITS, field("n", b"two"), upload(png(16, 16), "image")), 422, BAD, "n",
     ("whole number",)),
    ("no picture", get(f"/v1/outputs/out_{NOBODY}_1_0"), 404, "output_not_found", "output_id", ()),
    ("forged url", get(f"/v1/outputs/out_{NOBODY}_1_0?expires=9999999999&signature=00"), 403, "invalid_signature",
     "signature", ("signature",)),
]  # fmt: skip

QUEUE_ROWS: list[Row] = [
    ("no form", send(FILES, {}), 415, "unsupported_media_type", "Content-Type", ("multipart/form-data",)),
    ("file missing", form(FILES, field("purpose", b"batch")), 422, BAD, "file", ("file",)),
    ("file empty", form(FILES, field("purpose", b"batch"), upload(b"")), 422, BAD, "file", ("empty",)),
    ("file twice", form(FILES, field("purpose", b"batch"), upload(b"a"), upload(b"b")), 422, BAD, "file", ("twice",)),
    ("purpose", form(FILES, field("purpose", b"evals"), upload(b"a")), 422, BAD, "purpose", ("batch",)),
    ("file expires", form(FILES, field("purpose", b"batch"), field("expires_after[anchor]", b"created_at"),
     field("expires_after[seconds]", b"1"), upload(b"a")), 422, BAD, "expires_after.seconds", ("3600",)),
    ("batch of no file", batch(), 404, "file_not_found", "input_file_id", ("file",)),
    ("batch of a path", batch(input_file_id="../../etc/passwd"), 422, BAD, "input_file_id", ("input_file_id",)),
    ("batch window", batch(completion_window="31d"), 422, BAD, "completion_window", ("30d",)),
    ("batch endpoint", batch(endpoint="/v1/embeddings"), 422, BAD, "endpoint", (CHAT,)),
    ("no batch", get(f"{BATCHES}/batch_{NOBODY}"), 404, "batch_not_found", "batch_id", ()),
    ("hook http", hook(url="http://example.com/"), 422, "url_not_allowed", "url", ("https",)),
    ("hook user", hook(url="https://user:pass@example.com/"), 422, BAD, "url", ("user name",)),
    ("hook port", hook(url="https://example.com:22/"), 422, "url_not_allowed", "url", ("22", "443")),
    ("hook loopback", hook(url="https://127.0.0.1/"), 422, "url_not_allowed", "url", ("127.0.0.1",)),
    ("hook mapped", hook(url="https://[::ffff:7f00:1]/"), 422, "url_not_allowed", "url", ("7f00",)),
    ("hook number", hook(url="https://2130706433/"), 422, BAD, "url", ("2130706433",)),
    ("hook long", hook(url="https://example.com/" + "a" * 3000), 422, BAD, "url", ("2048",)),
    ("hook secret", hook(signing_secret="abc"), 422, BAD, "signing_secret", ("signing_secret",)),
    ("hook of a job", chat(webhook="https://10.0.0.1/"), 422, "url_not_allowed", "webhook", ("10.0.0.1",)),
    ("hook unknown", chat(webhook=f"we_{NOBODY}"), 422, BAD, "webhook", (NOBODY,)),
    ("no delivery", get(f"/v1/webhook_deliveries/whd_{NOBODY}/replay", "POST"), 404, "webhook_delivery_not_found",
     "webhook_delivery_id", ()),
    ("long key", send(CHAT, {"model": "demo", "messages": [{"role": "user", "content": "x"}]},
     Idempotency_Key="x" * 10_000), 422, BAD, "Idempotency-Key", ("255",)),
    ("reused key", reused_key, 409, "idempotency_key_reuse", None, ("key",)),
    ("no keys", send(f"{JOBS}/lookup", {"idempotency_keys": []}), 422, BAD, "idempotency_keys", ("empty",)),
    ("keys", send(f"{JOBS}/lookup", {"idempotency_keys": ["k"] * 1001}), 422, BAD, "idempotency_keys", ("1000",)),
    ("key of a newline", send(f"{JOBS}/lookup", {"idempotency_keys": ["k", "k\n"]}), 422, BAD, "idempotency_keys.1",
     ("255", "printable")),
    ("lookup of one", send(f"{JOBS}/lookup", {"idempotency_keys": ["k"]}, "PUT"), 405, "method_not_allowed", None,
     ("POST",)),
    ("no job", get(f"{JOBS}/job_{NOBODY}"), 404, "job_not_found", "job_id", ()),
    ("job of a path", get(f"{JOBS}/..%2f..%2fjob_{NOBODY}"), 404, "not_found", None, ()),
    ("job of nul", get(f"{JOBS}/job_%00"), 404, "job_not_found", "job_id", ()),
    ("put job", send(f"{JOBS}/1", {}, "PUT"), 422, BAD, "job_id", ("32",)),
    ("job url", send(JOBS, {"url": "/v1/embeddings", "body": {}}), 422, BAD, "url", (CHAT,)),
    ("deadline in ms", chat(deadline=1.8e12), 422, BAD, "deadline", ("4102444800",)),
    ("priority", chat(priority=101), 422, BAD, "priority", ("100",)),
    ("metadata", chat(metadata={str(i): "" for i in range(17)}), 422, BAD, "metadata", ("16",)),
    ("wait", get(f"{JOBS}/job_{NOBODY}?wait=61"), 422, BAD, "wait", ("60",)),
    ("prefer", send(JOBS, {"body": {"model": "demo", "messages": [{"role": "user", "content": "x"}]}},
     Prefer="wait=61"), 422, BAD, "Prefer", ("60",)),
    ("limit", get(f"{JOBS}?limit=0"), 422, BAD, "limit", ("1",)),
    ("misspelt filter", get(f"{JOBS}?statuss=failed"), 422, BAD, "statuss", ("statuss",)),
    ("event id", get(f"{JOBS}/job_{NOBODY}/events", Last_Event_ID="x"), 422, BAD, "Last-Event-ID", ("Last-Event-ID",)),
    ("ended job", cancel_an_ended_job, 409, "already_terminal", None, ("completed",)),
    ("no dead letter", get(f"/v1/dead_letters/job_{NOBODY}/replay", "POST"), 404, "job_not_found", "job_id", ()),
    ("no change", send(f"{JOBS}/job_{NOBODY}", {}, "PATCH"), 422, BAD, "priority", ("priority", "deadline")),
    ("unknown key", get("/v1/models", Authorization="Bearer ifk_x"), 401, "unauthorized", "Authorization", ("key",)),
    ("key in the query", get(f"{JOBS}?api_key=ifk_x"), 422, BAD, "api_key", ("api_key",)),
    ("unknown route", get("/v1/admin/config"), 404, "not_found", None, ("/v1/admin/config",)),
    ("wrong method", get(CHAT, "DELETE"), 405, "method_not_allowed", None, ("POST",)),
]  # fmt: skip

ROWS = [*JSON_ROWS, *CHAT_ROWS, *IMAGE_ROWS, *QUEUE_ROWS]
