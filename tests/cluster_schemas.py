"""Schemas of the custom resources this project writes, of the fields it uses, strict: a field not named is an error.

Written after the API types of JobSet 0.12, Kueue 0.19 and the Prometheus operator 0.80. The pod template inside a
JobSet is a core object, which `kubernetes-validate` knows.
"""

from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def _object(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": fields}


_LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
_METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40},
        "namespace": _TEXT,
        "labels": _LABELS,
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_RULE = _object(
    ["name", "action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
    action={
        "enum": [
            "FailJobSet",
            "RestartJobSet",
            "RestartJobSetAndIgnoreMaxRestarts",
            "RestartJob",
            "RestartJobAndIgnoreMaxRestarts",
        ]
    },
    onJobFailureReasons={
        "type": "array",
        "items": {
            "enum": [
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            ]
        },
    },
    onJobFailureMessagePatterns={"type": "array", "items": _TEXT},
    targetReplicatedJobs={"type": "array", "items": _TEXT},
)

JOB_SET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_METADATA,
    spec=_object(
        ["replicatedJobs"],
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(["name", "template"], name=_TEXT, replicas=_COUNT, template={"type": "object"}),
        },
        network=_object(
            [],
            enableDNSHostnames={"type": "boolean"},
            publishNotReadyAddresses={"type": "boolean"},
            subdomain=_TEXT,
        ),
        successPolicy=_object(["operator"], operator={"enum": ["All", "Any"]}),
        failurePolicy=_object(
            [],
            maxRestarts=_COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={"type": "array", "maxItems": 20, "items": _RULE},
        ),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
    ),
)

POD_MONITOR = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "PodMonitor"},
    metadata=_METADATA,
    spec=_object(
        ["selector"],
        selector=_object([], matchLabels=_LABELS),
        podTargetLabels={"type": "array", "items": _TEXT},
        podMetricsEndpoints={
            "type": "array",
            "items": _object([], port=_TEXT, interval={"type": "string", "pattern": "^[0-9]+s$"}),
        },
    ),
)
