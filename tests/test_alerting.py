"""An alert really fires: a real server is scraped by a real Prometheus, and an Alertmanager tells a webhook."""

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from infra.rollout.observer import free_port, start_prometheus, write_targets
from infra.rollout.process import Process, wait_until_answers
from tests.tiny_server import serving, tiny_pipeline

MISSING = [name for name in ("prometheus", "prometheus-alertmanager") if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {MISSING}")
def test_a_server_that_is_gone_reaches_the_webhook_of_an_alertmanager(tmp_path: Path) -> None:
    told: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            told.extend(alert["labels"] for alert in body["alerts"] if alert["status"] == "firing")
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hook = {"name": "hook", "webhook_configs": [{"url": f"http://127.0.0.1:{receiver.server_address[1]}/"}]}
    route = {"receiver": "hook", "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"}
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump({"route": route, "receivers": [hook]}))
    # The shipped rule, with its minutes as seconds: a test waits no quarter of an hour.
    rules = yaml.safe_load((Path(__file__).parent.parent / "monitoring/rules/stiv.yml").read_text())
    (down,) = [rule for group in rules["groups"] for rule in group["rules"] if rule.get("alert") == "ServerDown"]
    quick = {"groups": [{"name": "quick", "interval": "1s", "rules": [{**down, "for": "1s"}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(quick))

    address = f"127.0.0.1:{free_port()}"
    program, log = shutil.which("prometheus-alertmanager") or "", tmp_path / "alertmanager.log"
    command = [program, f"--config.file={tmp_path}/alertmanager.yml", f"--storage.path={tmp_path}/am"]
    command += [f"--web.listen-address={address}", "--cluster.listen-address="]
    alertmanager = Process.spawn(command, log, os.environ)
    try:
        wait_until_answers(f"http://{address}/-/ready", alertmanager, log)
        with serving(tmp_path, tiny_pipeline()) as running:
            target = running.url.removeprefix("http://")
            write_targets(tmp_path / "prometheus", {target: {"track": "stable"}})
            _, prometheus = start_prometheus(
                tmp_path / "prometheus", interval_s=1, rules=tmp_path / "rules.yml", alertmanager=address
            )
            time.sleep(5)
            assert not told, "a server that answers alarms nobody"
        deadline = time.monotonic() + 120  # the server is gone now
        while not told and time.monotonic() < deadline:
            time.sleep(0.2)
        assert told and told[0]["alertname"] == "ServerDown" and told[0]["instance"] == target
        assert told[0]["severity"] == "page"
        prometheus.stop(patience_s=30)
    finally:
        alertmanager.stop(patience_s=30)
        receiver.shutdown()
        receiver.server_close()
