"""A process that receives webhooks and prints each as a JSON line: `python -m tests.tools.hook_receiver`, its port first.

It answers the first request with 503 and Retry-After, as a receiver does that is just starting, and redirects /moved.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    refused = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/moved":
            self.answer(307, location="/hook")
        elif not Handler.refused:
            Handler.refused = True
            self.answer(503, retry_after="1")
        else:
            print(json.dumps({"headers": dict(self.headers), "body": body.decode(), "path": self.path}), flush=True)
            self.answer(204)

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the lines on stdout are the record."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
