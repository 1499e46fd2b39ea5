"""An HTTP server that answers as a script says, and fails as servers do.

from scripted import fault, sequence, serving
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def fault(status, message="", **headers):
    return status, headers, json.dumps({"error": {"message": message}})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(sent) if sent else None
        with self.server.lock:
            self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            number = len(self.server.seen) - 1
        answer = self.server.script(number, body)
        if answer == "drop":
            self.close_connection = True
            self.connection.close()
            return
        status, headers, text = answer
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload) + (50 if headers.get("X-Short") else 0)))
        self.end_headers()
        self.wfile.write(payload)
        self.close_connection = bool(headers.get("X-Short"))

    do_GET = do_POST

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving(script):
    """A server whose ``script(number of the request, body)`` gives (status, headers, text) or "drop"."""
    server = Server(("127.0.0.1", 0), Handler)
    server.script, server.seen, server.lock = script, [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def sequence(*answers):
    return lambda number, body: answers[min(number, len(answers) - 1)]
