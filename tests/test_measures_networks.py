"""Networks given as files: fed as their card says, refused where card or file is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from model.data.moving_shapes import generate
from model.measures.motion import Frames
from model.measures.networks import OnnxNetwork

CARD: dict[str, Any] = {
    "name": "mean",
    "measure": "fvd",
    "layout": "BCTHW",
    "size": [32, 32],
    "source": "the mean of each channel",
}


def write_network(folder: Path, *, inputs: int = 1, axes: tuple[int, ...] = (2, 3, 4), **card: Any) -> Path:
    """A network that gives the mean of its input over `axes`; of two inputs, of their squared difference."""
    path = folder / f"{card.get('name', 'mean')}.onnx"
    rank = {"BCHW": 4}.get(card.get("layout", "BCTHW"), 5)
    names = ["a", "b"][:inputs]
    shape = [None] * rank
    nodes = [helper.make_node("ReduceMean", ["x" if inputs == 2 else "a", "axes"], ["y"], keepdims=0)]
    if inputs == 2:
        nodes = [helper.make_node("Sub", ["a", "b"], ["d"]), helper.make_node("Mul", ["d", "d"], ["x"]), *nodes]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("axes", TensorProto.INT64, [len(axes)], list(axes))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    path.with_suffix(".json").write_text(json.dumps({**CARD, **card}))
    return path


def clips(count: int = 3, num_frames: int = 6) -> list[Frames]:
    return [clip.frames for clip in generate(count, num_frames=num_frames, size=32, seed=1)]


def in_range(pixels: Frames) -> torch.Tensor:
    """Mean of each channel of pixels made [-1, 1]."""
    return torch.as_tensor(pixels.reshape(-1, 3).mean(axis=0) / 127.5 - 1, dtype=torch.float32)


@pytest.mark.parametrize(("layout", "axes"), [("BCTHW", (2, 3, 4)), ("BTCHW", (1, 3, 4))])
def test_a_clip_is_one_row_in_the_layout_and_the_range_of_the_card(
    tmp_path: Path, layout: str, axes: tuple[int, ...]
) -> None:
    network = OnnxNetwork(write_network(tmp_path, layout=layout, axes=axes))
    torch.testing.assert_close(network(clips()), torch.stack([in_range(clip) for clip in clips()]), atol=1e-3, rtol=0)


def test_frames_are_rows_of_their_own_where_the_network_takes_frames(tmp_path: Path) -> None:
    network = OnnxNetwork(write_network(tmp_path, measure="fid", layout="BCHW", axes=(2, 3)))
    features = network(clips(2))
    assert features.shape == (12, 3)
    torch.testing.assert_close(features[7], in_range(clips(2)[1][1]))


def test_mean_and_std_of_the_card_are_applied_to_pixels_in_0_to_1(tmp_path: Path) -> None:
    network = OnnxNetwork(write_network(tmp_path, mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 2.0]))
    pixels = torch.as_tensor(clips(1)[0].reshape(-1, 3).mean(axis=0) / 255, dtype=torch.float32)
    expected = (pixels - torch.tensor([0.0, 0.5, 1.0])) / torch.tensor([1.0, 0.5, 2.0])
    torch.testing.assert_close(network(clips(1))[0], expected)


def test_pictures_are_scaled_and_the_middle_of_a_longer_clip_is_taken(tmp_path: Path) -> None:
    network = OnnxNetwork(write_network(tmp_path, size=[64, 48], num_frames=2, axes=(3, 4)))
    features = network(clips(1)).reshape(3, 2).T
    torch.testing.assert_close(
        features, torch.stack([in_range(frame) for frame in clips(1)[0][2:4]]), atol=5e-3, rtol=0
    )
    with pytest.raises(ValueError, match="takes 2 frames, the clips have 1"):
        network([clips(1)[0][:1]])


def test_a_distance_takes_two_clips_frame_by_frame(tmp_path: Path) -> None:
    network = OnnxNetwork(write_network(tmp_path, inputs=2, measure="lpips", layout="BCHW", axes=(1, 2, 3)))
    one, other = clips(2)
    error = ((one.astype(float) - other.astype(float)) ** 2).mean(axis=(1, 2, 3)) / 127.5**2
    np.testing.assert_allclose(network.distance(one, other).numpy(), error, rtol=1e-4)
    assert float(network.distance(one, one).max()) == 0


def test_the_digest_names_the_file(tmp_path: Path) -> None:
    import hashlib

    path = write_network(tmp_path)
    assert OnnxNetwork(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_or_a_card_that_is_wrong_is_refused_with_its_name(tmp_path: Path) -> None:
    path = write_network(tmp_path)
    card = path.with_suffix(".json")
    with pytest.raises(ValueError, match=r"mean\.json.*'fvd' does not go with layout 'BCHW'"):
        OnnxNetwork(write_network(tmp_path, layout="BCHW", axes=(2, 3)))
    with pytest.raises(ValueError, match=r"inputs \['a'\]; measure 'lpips' gives 2"):
        OnnxNetwork(write_network(tmp_path, measure="lpips", layout="BCHW", axes=(2, 3)))
    card.write_text(json.dumps({**CARD, "sise": [1, 1]}))
    with pytest.raises(ValueError, match=r"mean\.json is not a card of a network: sise: Extra inputs"):
        OnnxNetwork(path)
    card.unlink()
    with pytest.raises(ValueError, match=r"mean\.json is missing: write what the network beside it measures"):
        OnnxNetwork(path)
    card.write_text(json.dumps(CARD))
    path.write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"mean\.onnx cannot be loaded"):
        OnnxNetwork(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"mean\.onnx: no such file"):
        OnnxNetwork(path)
