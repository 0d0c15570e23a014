"""The dashboards: training, curriculum, serving, release, cost. `python -m monitoring.dashboards.catalog` writes them.

It owns which figures stand beside which; how they are written for Grafana is `panels`'.
"""

import sys
from pathlib import Path

from monitoring.dashboards.panels import Dashboard, Panel, Query, to_grafana

RUN = "{{instance}}"
OF_STAGE = "* on (instance) group_left (stage) stiv_training_stage_info"
"""Gives a series of a run the name of its stage."""


def mean(histogram: str, window: str, *, by: str = "") -> str:
    """The mean of what a histogram saw, by one of its labels or by all."""
    rates = [f"rate({histogram}_{part}[{window}])" for part in ("sum", "count")]
    return " / ".join(f"sum by ({by}) ({rate})" if by else rate for rate in rates)


TRAINING = Dashboard(
    "training",
    "STIV training",
    (
        (
            Panel("Loss", (Query("stiv_training_loss", RUN),), log=True),
            Panel("Gradient norm", (Query("stiv_training_grad_norm", RUN),), log=True, says="Before it is clipped."),
            Panel("Learning rate", (Query("stiv_training_learning_rate", RUN),)),
        ),
        (
            Panel("Steps a second", (Query("rate(stiv_training_steps_total[5m])", RUN),), "ops"),
            Panel("Tokens a second", (Query("rate(stiv_training_tokens_total[5m])", RUN),), "ops", "Of all ranks."),
            Panel(
                "Step time",
                (
                    Query("histogram_quantile(0.5, rate(stiv_training_step_seconds_bucket[5m]))", f"{RUN} median"),
                    Query("histogram_quantile(0.99, rate(stiv_training_step_seconds_bucket[5m]))", f"{RUN} 99 %"),
                ),
                "s",
            ),
        ),
        (
            Panel(
                "Where the time goes",
                (Query("sum by (account) (rate(stiv_training_time_seconds_total[5m]))", "{{account}}"),),
                "percentunit",
                "Seconds a second; docs/goodput.md says what an account is.",
            ),
            Panel(
                "Use of the hardware",
                (Query("stiv_training_mfu_ratio", f"{RUN} MFU"), Query("stiv_training_hfu_ratio", f"{RUN} HFU")),
                "percentunit",
            ),
            Panel("Slowest rank over the median", (Query("stiv_training_straggler_ratio", RUN),)),
        ),
        (
            Panel(
                "Age of the last durable checkpoint",
                (Query("time() - (stiv_training_last_checkpoint_timestamp_seconds > 0)", RUN),),
                "s",
            ),
            Panel(
                "Time until a checkpoint is durable",
                (
                    Query(
                        mean("stiv_training_checkpoint_seconds", "1h"),
                        RUN,
                    ),
                ),
                "s",
            ),
            Panel("Unreadable samples", (Query("increase(stiv_training_corrupt_samples_total[1h])", RUN),)),
        ),
    ),
)

CURRICULUM = Dashboard(
    "curriculum",
    "STIV curriculum",
    (
        (
            Panel(
                "Stage that trains",
                (Query("stiv_training_stage_info", "{{stage}} ({{task}}, {{world_size}} ranks)"),),
            ),
            Panel(
                "Steps of each stage",
                (
                    Query(
                        f"sum by (stage) (stiv_training_steps_total {OF_STAGE})",
                        "{{stage}}",
                    ),
                ),
            ),
        ),
        (
            Panel(
                "Loss by stage",
                (Query(f"stiv_training_loss {OF_STAGE}", "{{stage}}"),),
                log=True,
            ),
            Panel(
                "Goodput by stage",
                (
                    Query(
                        f"stiv_training_goodput_ratio {OF_STAGE}",
                        "{{stage}}",
                    ),
                ),
                "percentunit",
            ),
        ),
        (
            Panel("Checkpoints at their gate", (Query("stiv_promotions_total", "{{stage}}: {{outcome}}"),)),
            Panel("Ranks that ended unasked", (Query("stiv_stage_incidents_total", "{{stage}}: {{kind}}"),)),
        ),
    ),
)

SERVING = Dashboard(
    "serving",
    "STIV serving",
    (
        (
            Panel(
                "Waiting and running",
                (Query("max(stiv_queue_depth)", "waiting"), Query("sum(stiv_jobs_running)", "running")),
            ),
            Panel("Videos ended", (Query("sum by (outcome) (rate(stiv_jobs_total[5m]))", "{{outcome}}"),), "ops"),
            Panel(
                "Burn of the error budget",
                (
                    Query("stiv:job_errors:ratio_rate1h / 0.01", "1 h"),
                    Query("stiv:job_errors:ratio_rate6h / 0.01", "6 h"),
                ),
                says="Times the rate that uses up 1 % in a month; 14.4 in an hour wakes somebody up.",
            ),
        ),
        (
            Panel(
                "Time to a video, 95 %",
                (Query("stiv:job_seconds:p95_1h", "work up to {{work}}"),),
                "s",
                "By pixels times denoise steps.",
            ),
            Panel(
                "Denoise step",
                (
                    Query(
                        "histogram_quantile(0.5, sum by (le) (rate(stiv_denoise_step_seconds_bucket[5m])))", "median"
                    ),
                    Query("histogram_quantile(0.99, sum by (le) (rate(stiv_denoise_step_seconds_bucket[5m])))", "99 %"),
                ),
                "s",
            ),
            Panel(
                "Rows a step",
                (Query(mean("stiv_denoise_batch_rows", "5m"), RUN),),
                says="How full batches are.",
            ),
        ),
        (
            Panel(
                "Time by stage",
                (
                    Query(
                        mean("stiv_stage_seconds", "5m", by="stage"),
                        "{{stage}}",
                    ),
                ),
                "s",
                log=True,
            ),
            Panel(
                "What the engine does",
                (Query("sum by (state) (rate(stiv_engine_seconds_total[5m]))", "{{state}}"),),
                "percentunit",
            ),
            Panel("Why videos fail", (Query("sum by (code) (increase(stiv_job_failures_total[1h]))", "{{code}}"),)),
        ),
        (
            Panel(
                "HTTP answers", (Query("sum by (status) (rate(stiv_http_requests_total[5m]))", "{{status}}"),), "reqps"
            ),
            Panel(
                "Refused requests",
                (Query("sum by (reason) (increase(stiv_request_rejected_total[1h]))", "{{reason}}"),),
            ),
            Panel(
                "Late and blank",
                (
                    Query("sum(increase(stiv_deadline_misses_total[1h]))", "after their deadline"),
                    Query("sum(increase(stiv_blank_frames_total[1h]))", "blank frames"),
                    Query("sum by (outcome) (increase(stiv_webhooks_total[1h]))", "webhooks {{outcome}}"),
                ),
            ),
        ),
        (
            Panel(
                "How full calls are",
                (Query(mean("stiv_denoise_batch_occupancy_ratio", "5m"), RUN),),
                "percentunit",
                says="Rows over those that a call could hold.",
            ),
            Panel(
                "Time in the queue, 90 %",
                (Query("histogram_quantile(0.9, sum by (le) (rate(stiv_job_queue_seconds_bucket[5m])))", "waited"),),
                "s",
            ),
            Panel(
                "Videos within three times what they take alone",
                (
                    Query(
                        'sum(rate(stiv_job_stretch_ratio_bucket{le="3.0"}[1h])) /'
                        " sum(rate(stiv_job_stretch_ratio_count[1h]))",
                        "in time",
                    ),
                ),
                "percentunit",
            ),
        ),
        (
            Panel("Memory", (Query("stiv_memory_bytes", f"{RUN} {{{{where}}}}"),), "bytes"),
            Panel("Engine", (Query("stiv_engine_info", f"{RUN}: {{{{digest}}}} {{{{stage}}}} ({{{{engine}}}})"),)),
            Panel(
                "Synthetic video",
                (
                    Query("time() - stiv_probe_last_success_timestamp_seconds", "age of the last"),
                    Query(mean("stiv_probe_seconds", "1h"), "time to make"),
                    Query('increase(stiv_probes_total{outcome="failed"}[1h])', "failed in an hour"),
                ),
                "s",
            ),
        ),
    ),
)

RELEASE = Dashboard(
    "release",
    "STIV release",
    (
        (
            Panel("Share of the canary", (Query("stiv_router_canary_weight_ratio", "of new videos"),), "percentunit"),
            Panel(
                "Requests by track",
                (Query("sum by (track, status) (rate(stiv_router_requests_total[1m]))", "{{track}}: {{status}}"),),
                "reqps",
            ),
            Panel("Tries again", (Query("rate(stiv_router_retries_total[1m])", RUN),), "ops"),
        ),
        (
            Panel(
                "Videos by track",
                (Query("sum by (track, outcome) (rate(stiv_jobs_total[1m]))", "{{track}}: {{outcome}}"),),
                "ops",
                "Handed over: a canary could not make it, stable did.",
            ),
            Panel(
                "Time of a worker, 90 %",
                (
                    Query(
                        "histogram_quantile(0.9, sum by (track, work, le) (rate(stiv_job_run_seconds_bucket[5m])))",
                        "{{track}}, work up to {{work}}",
                    ),
                ),
                "s",
            ),
            Panel(
                "Blank frames by track",
                (
                    Query(
                        "sum by (track) (rate(stiv_blank_frames_total[5m])) "
                        "/ sum by (track) (rate(stiv_frames_total[5m]))",
                        "{{track}}",
                    ),
                ),
                "percentunit",
            ),
        ),
        (
            Panel(
                "Memory by track", (Query("max by (track, where) (stiv_memory_bytes)", "{{track}} {{where}}"),), "bytes"
            ),
            Panel("Releases", (Query("stiv_releases_total", "{{decision}}"),)),
            Panel(
                "Export and parity",
                (
                    Query(mean("stiv_export_seconds", "1d"), "seconds an export"),
                    Query("stiv_parity_max_abs_error", "largest error"),
                ),
            ),
        ),
    ),
)

COST = Dashboard(
    "cost",
    "STIV cost",
    (
        (
            Panel(
                "Engine seconds a second of video",
                (Query("stiv:engine_seconds_per_video_second:rate1h", "all servers"),),
                "s",
                "Idle time is in it: what a second of delivered video takes of the hardware that stands there.",
            ),
            Panel(
                "Cost of a second of video",
                (Query("stiv:engine_seconds_per_video_second:rate1h * $price_per_hour / 3600", "all servers"),),
                "currencyUSD",
            ),
        ),
        (
            Panel("Video made an hour", (Query("3600 * sum(rate(stiv_video_seconds_total[1h]))", "seconds"),), "s"),
            Panel(
                "Time that is used",
                (
                    Query(
                        'sum(rate(stiv_engine_seconds_total{state="denoise"}[1h])) '
                        "/ sum(rate(stiv_engine_seconds_total[1h]))",
                        "denoising",
                    ),
                ),
                "percentunit",
            ),
        ),
        (
            Panel(
                "Cost of training that counts",
                (Query("$price_per_hour / (stiv_training_goodput_ratio > 0)", RUN),),
                "currencyUSD",
                "Of an hour of steps that count, on one machine of that price.",
            ),
            Panel(
                "Tokens for a unit of money",
                (Query("3600 * rate(stiv_training_tokens_total[1h]) / $price_per_hour", RUN),),
            ),
        ),
    ),
    constants=(("price_per_hour", "2.5"),),
)

DASHBOARDS = (TRAINING, CURRICULUM, SERVING, RELEASE, COST)
FOLDER = Path(__file__).parent


def write(folder: Path = FOLDER) -> None:
    """A JSON file each."""
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.name}.json").write_text(to_grafana(dashboard))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
