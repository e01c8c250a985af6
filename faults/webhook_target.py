"""A target of forward, as a process that can be killed: it verifies each message with the package standardwebhooks.

python webhook_target.py PORT SECRET FILE: what it takes is a line in FILE. Sometimes it answers 503, with what it has
taken or without, and sometimes not in time.
"""

import http.server
import json
import random
import sys
import time

import standardwebhooks

PORT, SECRET, PATH = int(sys.argv[1]), sys.argv[2], sys.argv[3]
verifier = standardwebhooks.Webhook(SECRET)


class Target(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        verifier.verify(body, dict(self.headers.items()))
        chance = random.random()
        if chance > 0.0005:  # else nothing is taken
            with open(PATH, "a") as file:
                file.write(json.dumps([self.headers["webhook-id"], body.decode()]) + "\n")
        if chance < 0.0002:
            time.sleep(3)
        elif chance < 0.001:
            self.send_error(503)
            return
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Target).serve_forever()
