"""Every metric of the project, and the two ways out: an exporter of its own and a rendered page.

It owns names, labels and buckets; it does not know who measures. A constant is its metric's name in capitals without
the `stiv_`. Metrics stand in five registries, one a kind of process, so that a server never shows a training loss
of 0: TRAINING (rank 0 of a stage), PIPELINE (promotion, export, release), SERVING, ROUTING and
PROBING. No id is a label.
"""

import threading
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)

# A `_created` series beside each counter and histogram would double the page, and nothing reads it.
disable_created_metrics()

TRAINING = CollectorRegistry()
PIPELINE = CollectorRegistry()
SERVING = CollectorRegistry()
ROUTING = CollectorRegistry()
PROBING = CollectorRegistry()

# Edges in seconds. Steps run from milliseconds (tiny, one GPU call) to a minute (CPU, large); a video, a checkpoint
# and an export take from seconds to an hour.
_STEP_EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MINUTES_EDGES = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)
# A video's own time is compared between releases, so no edge is more than twice the one before.
_JOB_EDGES = (
    *(0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0),
    *(60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 450.0, 600.0, 900.0, 1200.0, 1800.0, 3600.0),
)
_ROW_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_SHARE_EDGES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_STRETCH_EDGES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)

TRAINING_STAGE_INFO = Gauge(
    "stiv_training_stage_info",
    "1, with the stage this process trains, its task and the number of ranks.",
    ["stage", "task", "world_size"],
    registry=TRAINING,
)
TRAINING_LOSS = Gauge(
    "stiv_training_loss", "Flow-matching loss of the last optimizer step, mean over ranks.", registry=TRAINING
)
TRAINING_GRAD_NORM = Gauge(
    "stiv_training_grad_norm", "Norm of the last gradient before it was clipped.", registry=TRAINING
)
TRAINING_LEARNING_RATE = Gauge(
    "stiv_training_learning_rate", "Learning rate of the last optimizer step.", registry=TRAINING
)
TRAINING_STEPS_TOTAL = Counter("stiv_training_steps_total", "Optimizer steps done by this process.", registry=TRAINING)
TRAINING_SAMPLES_TOTAL = Counter(
    "stiv_training_samples_total", "Clips trained on by all ranks while this process ran.", registry=TRAINING
)
TRAINING_TOKENS_TOTAL = Counter(
    "stiv_training_tokens_total",
    "Tokens of the clips trained on by all ranks while this process ran; masked ones count.",
    registry=TRAINING,
)
TRAINING_CORRUPT_SAMPLES_TOTAL = Counter(
    "stiv_training_corrupt_samples_total",
    "Different samples that rank 0 found unreadable and replaced by others.",
    registry=TRAINING,
)
TRAINING_STEP_SECONDS = Histogram(
    "stiv_training_step_seconds",
    "Wall time of one optimizer step, its data included.",
    buckets=_STEP_EDGES,
    registry=TRAINING,
)
TRAINING_CHECKPOINT_SECONDS = Histogram(
    "stiv_training_checkpoint_seconds",
    "Wall time to write one checkpoint until it is durable.",
    buckets=_MINUTES_EDGES,
    registry=TRAINING,
)
TRAINING_LAST_CHECKPOINT_TIMESTAMP_SECONDS = Gauge(
    "stiv_training_last_checkpoint_timestamp_seconds",
    "Unix time of the last durable checkpoint; 0 while there is none.",
    registry=TRAINING,
)
TRAINING_TIME_SECONDS_TOTAL = Counter(
    "stiv_training_time_seconds_total",
    "Time of the run that this process booked, by account; what came before its first line is in it.",
    ["account"],
    registry=TRAINING,
)
TRAINING_GOODPUT_RATIO = Gauge(
    "stiv_training_goodput_ratio",
    "Share of the run's time, restarts and pauses included, that went into optimizer steps that count.",
    registry=TRAINING,
)
TRAINING_MFU_RATIO = Gauge(
    "stiv_training_mfu_ratio",
    "Model FLOPs of the last logged steps over what the ranks' hardware could do; NaN where its peak is unknown.",
    registry=TRAINING,
)
TRAINING_HFU_RATIO = Gauge(
    "stiv_training_hfu_ratio",
    "The same with the FLOPs that are computed again in backward; NaN where the hardware's peak is unknown.",
    registry=TRAINING,
)
TRAINING_STRAGGLER_RATIO = Gauge(
    "stiv_training_straggler_ratio",
    "Own time of the slowest rank over the median rank's in the last logged steps; NaN of a single rank.",
    registry=TRAINING,
)

STAGE_INCIDENTS_TOTAL = Counter(
    "stiv_stage_incidents_total",
    "Ends of a stage's ranks that nobody asked for, by kind: killed, stopped, hung or crashed.",
    ["stage", "kind"],
    registry=PIPELINE,
)
PROMOTIONS_TOTAL = Counter(
    "stiv_promotions_total",
    "Checkpoints that came to their gate, by stage and outcome: promoted or refused.",
    ["stage", "outcome"],
    registry=PIPELINE,
)
EXPORT_SECONDS = Histogram(
    "stiv_export_seconds",
    "Wall time of one export, its parity check included.",
    buckets=_MINUTES_EDGES,
    registry=PIPELINE,
)
PARITY_MAX_ABS_ERROR = Gauge(
    "stiv_parity_max_abs_error",
    "Largest difference between the exported engine and PyTorch in the last parity check.",
    registry=PIPELINE,
)
RELEASES_TOTAL = Counter(
    "stiv_releases_total",
    "Releases that came to their end, by decision: promote or abort.",
    ["decision"],
    registry=PIPELINE,
)

ENGINE_INFO = Gauge(
    "stiv_engine_info",
    "1, with the engine that serves: its kind, its stage and the start of its digest.",
    ["engine", "stage", "digest"],
    registry=SERVING,
)
JOBS_TOTAL = Counter(
    "stiv_jobs_total",
    "Jobs that ended here, by outcome: completed, failed, cancelled, or handed_over (by a canary, to stable).",
    ["outcome"],
    registry=SERVING,
)
JOB_FAILURES_TOTAL = Counter(
    "stiv_job_failures_total",
    "Jobs that failed or were handed over, by the code that the client is told.",
    ["code"],
    registry=SERVING,
)
FRAMES_TOTAL = Counter("stiv_frames_total", "Frames of delivered videos.", registry=SERVING)
BLANK_FRAMES_TOTAL = Counter(
    "stiv_blank_frames_total",
    "Frames of delivered videos that are one colour all over, such as black.",
    registry=SERVING,
)
JOBS_RUNNING = Gauge("stiv_jobs_running", "Jobs that are being denoised now.", registry=SERVING)
QUEUE_DEPTH = Gauge("stiv_queue_depth", "Jobs that wait for a worker.", registry=SERVING)
DEADLINE_MISSES_TOTAL = Counter(
    "stiv_deadline_misses_total", "Videos that were delivered after the deadline of their request.", registry=SERVING
)
VIDEO_SECONDS_TOTAL = Counter(
    "stiv_video_seconds_total", "Length of delivered videos: what their cost is divided by.", registry=SERVING
)
DENOISE_STEP_SECONDS = Histogram(
    "stiv_denoise_step_seconds",
    "Wall time of one denoise step of one batch.",
    buckets=_STEP_EDGES,
    registry=SERVING,
)
DENOISE_BATCH_ROWS = Histogram(
    "stiv_denoise_batch_rows", "Rows in one denoise step, two a video.", buckets=_ROW_EDGES, registry=SERVING
)
DENOISE_BATCH_OCCUPANCY_RATIO = Histogram(
    "stiv_denoise_batch_occupancy_ratio",
    "Rows in one denoise step over those that the call could hold.",
    buckets=_SHARE_EDGES,
    registry=SERVING,
)
JOB_QUEUE_SECONDS = Histogram(
    "stiv_job_queue_seconds",
    "Time from a job's creation until a worker took it for the first time.",
    buckets=_MINUTES_EDGES,
    registry=SERVING,
)
JOB_STRETCH_RATIO = Histogram(
    "stiv_job_stretch_ratio",
    "Time from a job's creation to its end over what it takes alone; 3 is where a video without a deadline is late.",
    buckets=_STRETCH_EDGES,
    registry=SERVING,
)
JOB_SECONDS = Histogram(
    "stiv_job_seconds",
    "Time from a job's creation to its video.",
    ["work"],
    buckets=_JOB_EDGES,
    registry=SERVING,
)
JOB_RUN_SECONDS = Histogram(
    "stiv_job_run_seconds",
    "Time from a worker's taking a job to its video, by work: pixels times denoise steps, up to that power of ten.",
    ["work"],
    buckets=_JOB_EDGES,
    registry=SERVING,
)
MEMORY_BYTES = Gauge(
    "stiv_memory_bytes", "Memory in use, by where: host (resident) or gpu (reserved).", ["where"], registry=SERVING
)
STAGE_SECONDS = Histogram(
    "stiv_stage_seconds",
    "Wall time of one part of the way: encode, denoise, decode, moderate, mp4, store, keep of latents, or warm_up.",
    ["stage"],
    buckets=_MINUTES_EDGES,
    registry=SERVING,
)
ENGINE_SECONDS_TOTAL = Counter(
    "stiv_engine_seconds_total",
    "Time of the engine's thread: denoise (a call), between (two calls), starved (jobs are here, none can be advanced),"
    " idle (no job is here).",
    ["state"],
    registry=SERVING,
)
HTTP_REQUESTS_TOTAL = Counter(
    "stiv_http_requests_total",
    "Requests answered, by route template, method and status code.",
    ["route", "method", "status"],
    registry=SERVING,
)
REQUEST_REJECTED_TOTAL = Counter(
    "stiv_request_rejected_total", "Requests refused before a job was made, by reason.", ["reason"], registry=SERVING
)
WEBHOOKS_TOTAL = Counter(
    "stiv_webhooks_total",
    "Tries to tell a client of an ended video, by outcome: delivered, failed or given_up.",
    ["outcome"],
    registry=SERVING,
)

ROUTER_REQUESTS_TOTAL = Counter(
    "stiv_router_requests_total",
    "Requests that the router sent on, by track and the status that came back; none where nothing did.",
    ["track", "status"],
    registry=ROUTING,
)
ROUTER_CANARY_WEIGHT_RATIO = Gauge(
    "stiv_router_canary_weight_ratio", "Share of new videos that the canary gets; 0 without one.", registry=ROUTING
)
ROUTER_RETRIES_TOTAL = Counter(
    "stiv_router_retries_total",
    "Tries of the router that no server took.",
    registry=ROUTING,
)

PROBE_SECONDS = Histogram(
    "stiv_probe_seconds", "Time from asking for the synthetic video to having it.", buckets=_JOB_EDGES, registry=PROBING
)
PROBES_TOTAL = Counter(
    "stiv_probes_total", "Synthetic videos asked for, by outcome: completed or failed.", ["outcome"], registry=PROBING
)
PROBE_LAST_SUCCESS_TIMESTAMP_SECONDS = Gauge(
    "stiv_probe_last_success_timestamp_seconds",
    "Unix time of the last synthetic video that came; of the prober's start while there is none.",
    registry=PROBING,
)

# Until the first measurement 0 would be a lie: a perfect loss, an exact engine.
for _unmeasured in (
    *(TRAINING_LOSS, TRAINING_GRAD_NORM, TRAINING_LEARNING_RATE, PARITY_MAX_ABS_ERROR),
    *(TRAINING_GOODPUT_RATIO, TRAINING_MFU_RATIO, TRAINING_HFU_RATIO, TRAINING_STRAGGLER_RATIO),
):
    _unmeasured.set(float("nan"))


def set_info(metric: Gauge, **labels: str) -> None:
    """State an `_info` metric's labels; what it said before is gone."""
    metric.clear()
    metric.labels(**labels).set(1)


def render(registry: CollectorRegistry = SERVING) -> tuple[bytes, str]:
    """The page a scrape reads, and its content type."""
    return generate_latest(registry), CONTENT_TYPE_LATEST


@dataclass(slots=True, frozen=True)
class Exporter:
    """A running metrics endpoint; `port` is the real one."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_exporter(port: int, registry: CollectorRegistry = TRAINING, *, host: str = "127.0.0.1") -> Exporter:
    """Serve `registry` at `http://host:port/metrics` from a thread; port 0 takes a free one."""
    if not 0 <= port <= 65535:
        raise ValueError(f"metrics port {port} is outside 0 to 65535; 0 takes a free one")
    server, thread = start_http_server(port, addr=host, registry=registry)
    return Exporter(server.server_port, server, thread)
