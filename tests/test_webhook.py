"""Signed webhooks: the standard's own example, and what a receiver must refuse."""

import pytest

from infra import webhook

# From the specification's text (standard-webhooks/spec, "Signature scheme").
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
SENT = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
NOW = 1614265330.0


def test_the_signature_is_the_standards_own() -> None:
    made = webhook.headers(webhook.read_secret(SECRET), SENT["webhook-id"], BODY, timestamp=1614265330)
    assert made["webhook-signature"] == SENT["webhook-signature"]
    assert webhook.verify(webhook.read_secret(SECRET), SENT, BODY, now=NOW) == SENT["webhook-id"]


def test_one_of_several_signatures_is_enough_so_that_secrets_can_be_changed() -> None:
    both = {**SENT, "webhook-signature": "v1,AAAA " + SENT["webhook-signature"]}
    assert webhook.verify(webhook.read_secret(SECRET), both, BODY, now=NOW)


@pytest.mark.parametrize(
    ("change", "body", "now", "said"),
    [
        ({}, BODY + b" ", NOW, "does not bear our signature"),
        ({"webhook-id": "msg_other"}, BODY, NOW, "does not bear our signature"),
        ({"webhook-timestamp": "1614265331"}, BODY, NOW, "does not bear our signature"),
        ({"webhook-signature": "v1a,nonsense"}, BODY, NOW, "does not bear our signature"),
        ({}, BODY, NOW + 301, "replay"),
        ({}, BODY, NOW - 301, "replay"),
        ({"webhook-timestamp": "now"}, BODY, NOW, "not a signed webhook"),
    ],
)
def test_a_receiver_refuses_what_was_changed_or_is_stale(
    change: dict[str, str], body: bytes, now: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        webhook.verify(webhook.read_secret(SECRET), SENT | change, body, now=now)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64!", SECRET.removeprefix("whsec_")])
def test_a_weak_or_broken_secret_is_refused_without_being_repeated(secret: str) -> None:
    with pytest.raises(ValueError, match="24 to 64 bytes") as caught:
        webhook.read_secret(secret)
    assert "c2hvcnQ" not in str(caught.value)
