"""nginx: one worker that answers every request with the same bytes. The floor of HTTP itself, no model and no cache.

The bytes are what our edge answers for one row. Access log off, connections kept for ever.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

ANSWER = {
    "model_name": "bench-edge",
    "model_version": "v1",
    "outputs": [
        {
            "name": "scores",
            "datatype": "FP32",
            "shape": [1, 8],
            "data": [0.64512771, -1.37740123, 0.11846525, 2.03561115, -0.89716667, 0.33391532, -0.50120866, 1.28473961],
        }
    ],
}
CONFIG = """
daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ default_type application/json; return 200 '{answer}'; }}
  }}
}}
"""


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="bench-nginx-", dir=os.environ["BENCH_DIR"]))
    config = directory / "nginx.conf"
    config.write_text(CONFIG.format(directory=directory, port=os.environ["BENCH_PORT"], answer=json.dumps(ANSWER)))
    os.execvp("nginx", ["nginx", "-c", str(config), "-p", str(directory), "-e", str(directory / "start.log")])


if __name__ == "__main__":
    main()
