"""A server on the loopback that speaks OpenAI's interface with an engine of ours behind it, healthy, faulty or ill-mannered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from aprlab.inference.session import Session
from aprlab.tracing.comparisons import log_softmax

Ids = list[int]


@dataclass
class Manners:
    """How the server behaves.

    Attributes:
        shape: of log-probabilities: ``new`` (llama-server, with ids), ``bytes`` (new without ids), ``legacy``, ``none``.
        most: log-probabilities that it gives for a token; more are refused.
        takes_ids, has_chat: which requests it knows.
        prompt: what it makes of the ids that it should run.
        figures: what it makes of logits before it gives figures and chooses.
        choose: index of the token that it takes among the likeliest.
        decoded: what it makes of logits while decoding, by step.
        mood: how it breaks; '' for well.
    """

    shape: str = "new"
    most: int = 20
    takes_ids: bool = True
    has_chat: bool = True
    prompt: Callable[[Ids], Ids] = lambda ids: ids
    figures: Callable[[np.ndarray, Ids], np.ndarray] = lambda logits, seen: logits
    choose: int = 0
    decoded: Callable[[np.ndarray, int], np.ndarray] = lambda logits, step: logits
    mood: str = ""
    chat_prompt: Callable[[str], Ids] | None = None
    heard: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


class Loopback(ThreadingHTTPServer):
    """One session, one request at a time."""

    daemon_threads = True

    def __init__(self, session: Session, manners: Manners) -> None:
        super().__init__(("127.0.0.1", 0), _OpenAI)
        self.session, self.manners, self.lock = session, manners, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, ids: Ids, count: int) -> list[tuple[int, np.ndarray]]:
        """Tokens and log-probabilities ``(V,)``."""
        found: list[tuple[int, np.ndarray]] = []
        ids = self.manners.prompt(ids)
        for step in range(count):
            logits = self.session.generate([*ids, *(id for id, _ in found)], max_tokens=1, keep_logits=True).logits
            assert logits is not None
            row = self.manners.figures(logits[0].astype(np.float64), [*ids, *(id for id, _ in found)])
            row = self.manners.decoded(row, step) if step else row
            found.append((int(np.argsort(-row)[self.manners.choose]), log_softmax(row)))
            if found[-1][0] in self.session.tokenizer.eog:
                break
        return found


class _OpenAI(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.say(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        server: Any = self.server
        manners: Manners = server.manners
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        manners.heard.append((self.path, dict(self.headers), body))
        if manners.mood:
            self.misbehave(manners.mood)
            return
        chat = self.path == "/v1/chat/completions"
        if chat and not manners.has_chat:
            self.say(404, {"error": {"message": "no such door"}})
            return
        with server.lock:
            self.complete(server, manners, body, chat)

    def complete(self, server: Loopback, manners: Manners, body: Any, chat: bool) -> None:
        top = body.get("top_logprobs", 0) if chat else body.get("logprobs", 0)
        session = server.session
        if top and top > manners.most:
            self.say(400, {"error": {"message": f"logprobs: at most {manners.most}"}})
            return
        if chat:
            text = body["messages"][-1]["content"]
            ids = manners.chat_prompt(text) if manners.chat_prompt is not None else session.chat_tokens(body["messages"])
        elif isinstance(body["prompt"], list):
            if not manners.takes_ids:
                self.say(400, {"error": {"message": "prompt must be a string"}})
                return
            ids = body["prompt"]
        else:
            ids = session.tokenizer.encode(body["prompt"])
        steps = server.answer(ids, body["max_tokens"])
        text = session.tokenizer.decode([id for id, _ in steps], skip_special=True)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if top and manners.shape != "none":
            choice["logprobs"] = _figures(session, steps, top, manners.shape)
        self.say(200, {"choices": [choice], "usage": {"prompt_tokens": len(manners.prompt(ids))}})

    def say(self, status: int, data: Any, length: int | None = None) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw) if length is None else length))
        self.end_headers()
        self.wfile.write(raw)

    def misbehave(self, mood: str) -> None:
        entry = {"id": 5, "token": "x", "logprob": -0.5, "top_logprobs": [{"id": 5, "token": "x", "logprob": -0.5}]}
        good = {"choices": [{"text": "x", "logprobs": {"content": [entry]}}]}
        match mood:
            case "not json":
                self.say(200, b"<html>\x1b[2Jwelcome")
            case "deep":
                self.say(200, b"[" * 100_000)
            case "list":
                self.say(200, [1, 2])
            case "no choices":
                self.say(200, {"choices": []})
            case "text is a number":
                self.say(200, {"choices": [{"text": 5}]})
            case "logprob is text":
                self.say(200, json.loads(json.dumps(good).replace("-0.5", '"low"')))
            case "logprob is NaN":
                self.say(200, json.dumps(good).replace("-0.5", "NaN").encode())
            case "logprob above 0":
                self.say(200, json.loads(json.dumps(good).replace("-0.5", "0.5")))
            case "id outside":
                self.say(200, json.loads(json.dumps(good).replace('"id": 5', '"id": 999999')))
            case "bytes is a number":
                self.say(200, json.loads(json.dumps(good).replace('"token"', '"bytes": 9999999999999, "token"')))
            case "more than asked":
                self.say(200, {"choices": [{"text": "x", "logprobs": {"content": [entry] * 5000}}]})
            case "500":
                self.say(500, {"error": {"message": f"no key {self.headers.get('Authorization', '')}\x1b[31m"}})
            case "redirect":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:9/steal")
                self.end_headers()
            case "cut off":
                self.say(200, good, length=10_000)
            case "drops":
                self.connection.close()
            case "hangs":
                self.send_response(200)
                self.end_headers()
                time.sleep(5)
            case "drips":  # a byte now and then would hold a reader whose timeout is for each byte
                self.drip()
            case _:
                self.flood()

    def drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    def flood(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(64):
                self.wfile.write(b" " * (1 << 20))
        except OSError:
            pass  # the reader has had enough


def _figures(session: Session, steps: list[tuple[int, np.ndarray]], top: int, shape: str) -> dict[str, Any]:
    def entry(id: int, row: np.ndarray) -> dict[str, Any]:
        piece = b"" if session.tokenizer.is_special(id) else session.tokenizer.token_bytes(id)
        out = {"token": piece.decode(errors="replace"), "bytes": list(piece), "logprob": float(row[id])}
        return out | {"id": id} if shape == "new" else out

    def best(row: np.ndarray) -> list[int]:
        return [int(id) for id in np.argsort(-row)[:top]]

    if shape == "legacy":
        return {
            "tokens": [entry(id, row)["token"] for id, row in steps],
            "token_logprobs": [float(row[id]) for id, row in steps],
            "top_logprobs": [{entry(id, row)["token"]: float(row[id]) for id in best(row)} for _, row in steps],
        }
    return {"content": [entry(id, row) | {"top_logprobs": [entry(i, row) for i in best(row)]} for id, row in steps]}


@contextmanager
def serving(session: Session, manners: Manners | None = None) -> Iterator[Loopback]:
    """The server, running in a thread."""
    server = Loopback(session, manners if manners is not None else Manners())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
