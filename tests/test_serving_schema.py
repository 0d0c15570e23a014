import pytest

from infra.serving.http.errors import ApiError
from infra.serving.http.resolve import resolve
from infra.serving.http.schema import CreateVideo, parse
from infra.serving.limits import ServedModel, ServingLimits, VideoRequest
from infra.serving.settings import ServerSettings
from tests.tiny_server import WordEncoder, tiny_recipe

RECIPE = tiny_recipe()
MODEL = ServedModel("stiv-tiny", RECIPE, ServingLimits.of(RECIPE), WordEncoder().count_tokens)


def ask(**fields: object) -> VideoRequest:
    return resolve(parse(CreateVideo, {"prompt": "a red circle", **fields}), MODEL)


def refusal(**fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_prompt_alone_takes_the_rest_from_the_recipe() -> None:
    request = ask()
    assert (request.width, request.height, request.num_frames, request.fps) == (32, 32, 8, 8)
    assert (request.num_inference_steps, request.guidance_scale, request.flow_shift) == (4, 3.0, 1.0)
    assert (request.seconds, request.size) == ("1", "32x32")


def test_a_seed_is_drawn_where_none_is_given_and_kept_where_one_is() -> None:
    assert len({ask().seed for _ in range(4)}) == 4
    assert ask(seed="7").seed == 7


def test_form_strings_and_json_numbers_mean_the_same() -> None:
    strings = ask(seconds="2", fps="4", num_inference_steps="6", guidance_scale="6.5", flow_shift="2", seed="1")
    numbers = ask(seconds=2, fps=4, num_inference_steps=6, guidance_scale=6.5, flow_shift=2, seed=1)
    assert strings == numbers
    assert strings.num_frames == 8


def test_seconds_times_fps_decides_the_frames() -> None:
    assert ask(seconds="0.5").num_frames == 4
    assert ask(seconds="2", fps=2).num_frames == 4
    assert ask(seconds="1", num_frames=8).num_frames == 8


def test_a_request_survives_json() -> None:
    request = ask(seed=2**63 - 1, negative_prompt="blurry")
    assert VideoRequest.model_validate(request.model_dump(mode="json")) == request


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", ["at least 1 character", "say what the video shows"]),
        ({"prompt": "   "}, "prompt", ["at least 1 character"]),
        ({"prompt": "x" * 2001}, "prompt", ["2001 characters", "at most 2000", "shorten"]),
        ({"prompt": "word " * 77}, "prompt", ["78 tokens", "at most 77", "shorten"]),
        ({"negative_prompt": "x" * 2001}, "negative_prompt", ["2001 characters", "at most 2000"]),
        ({"size": "big"}, "size", ["'big'", "WIDTHxHEIGHT"]),
        ({"size": "33x32"}, "size", ["'33x32'", "multiples of 16", "nearest is '32x32'"]),
        ({"size": "0x32"}, "size", ["'0x32'", "multiples of 16", "nearest is '16x32'"]),
        ({"size": "720x1280"}, "size", ["'720x1280'", "at most 128 wide and 128 high", "leave it out for '32x32'"]),
        ({"size": "128x128"}, "size", ["16384 pixels", "at most 4096", "leave it out for '32x32'"]),
        ({"num_frames": 7}, "num_frames", ["7", "multiple of 2", "6 or 8"]),
        ({"num_frames": 1}, "num_frames", ["1", "multiple of 2", "nearest num_frames are 2"]),
        ({"num_frames": 0}, "num_frames", ["greater than or equal to 1"]),
        ({"num_frames": 34}, "num_frames", ["34", "at most 32"]),
        ({"num_frames": "many"}, "num_frames", ["valid integer", "'many'"]),
        ({"seconds": "8"}, "seconds", ["8 x fps 8 = 64", "at most 32"]),
        ({"seconds": "soon"}, "seconds", ["'soon'", "decimal number"]),
        ({"seconds": "0.1"}, "seconds", ["0.8 frames", "send num_frames"]),
        ({"seconds": "1", "num_frames": 4}, "seconds", ["fps 8", "num_frames 4", "only one"]),
        ({"fps": 61}, "fps", ["61", "at most 60"]),
        ({"num_inference_steps": 201}, "num_inference_steps", ["201", "at most 200"]),
        ({"guidance_scale": 0.5}, "guidance_scale", ["0.5", "1 to 20"]),
        ({"guidance_scale": "nan"}, "guidance_scale", ["finite"]),
        ({"flow_shift": 0}, "flow_shift", ["greater than 0"]),
        ({"seed": -1}, "seed", ["greater than or equal to 0"]),
        ({"seed": 2**63}, "seed", [f"less than or equal to {2**63 - 1}"]),
        ({"n": 2}, "n", ["unknown field 'n'", "num_inference_steps", "input_reference"]),
        (
            {"input_reference": "https://example.com/a.png"},
            "input_reference",
            ["upload an image file", "data:image/png"],
        ),
        ({"input_reference": {"url": "x"}}, "input_reference", ["upload an image file"]),
    ],
)
def test_a_refusal_names_the_field_the_value_and_the_way_out(
    fields: dict[str, object], param: str, words: list[str]
) -> None:
    error = refusal(**fields).envelope.error
    assert error.param == param
    assert error.type == "invalid_request_error"
    for word in words:
        assert word in error.message


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(ApiError, match="prompt: Field required") as caught:
        parse(CreateVideo, {})
    assert caught.value.envelope.error.code == "missing_required_parameter"


def test_a_long_unknown_field_is_not_echoed_in_full() -> None:
    assert len(refusal(**{"x" * 5000: 1}).envelope.error.message) < 400


def settings(host: str, environment: dict[str, str]) -> ServerSettings:
    return ServerSettings.from_environment(
        environment, engine="engine", database_url="sqlite:///jobs.db", store_url="store", host=host
    )


def test_without_a_key_only_loopback_is_served() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert settings(host, {}).api_keys == ()
    for host in ("0.0.0.0", "192.168.1.4", "example.com"):
        with pytest.raises(ValueError, match=f"host '{host}'.*STIV_API_KEYS"):
            settings(host, {})


def test_keys_come_from_the_environment_and_are_not_shown() -> None:
    found = settings("0.0.0.0", {"STIV_API_KEYS": "sk-one, sk-two,"})
    assert [key.get_secret_value() for key in found.api_keys] == ["sk-one", "sk-two"]
    assert "sk-one" not in repr(found)
