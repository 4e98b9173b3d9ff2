"""Checkpoints as a runtime: same numbers as the bare model, chosen by suffix, refused in words."""

import numpy as np
import pytest
import torch

from models.backends import load_backend
from models.backends import pytorch as tested
from models.backends.pytorch import rows_on
from models.load import load_model
from utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 96), np.uint8)


def test_rows_are_those_of_the_model_without_folding(golden_dir):
    weights = golden_dir / "yolov5n-v6-coco.pt"
    backend = load_backend(weights, "cpu")
    rows = backend.predict(IMAGES)
    with torch.inference_mode():
        expected, _ = load_model(weights)(torch.from_numpy(IMAGES).float() / 255)
    assert rows.shape == (2, 3 * (8 * 12 + 4 * 6 + 2 * 3), 85)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=2e-3)
    assert (backend.stride, backend.dynamic, len(backend.names), backend.names[0]) == (32, True, 80, "person")


def test_images_may_lie_in_memory_in_any_order(golden_dir):
    backend = load_backend(golden_dir / "yolov5n-v6-coco.pt", "cpu")
    channels_last = np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    torch.testing.assert_close(backend.preprocess(channels_last), torch.from_numpy(IMAGES) / 255)
    torch.testing.assert_close(backend.predict(channels_last), backend.predict(IMAGES))


def test_visualize_sees_every_layer_but_detect(golden_dir):
    backend = load_backend(golden_dir / "yolov5n-v6-coco.pt", "cpu")
    seen = []
    backend.infer(backend.preprocess(IMAGES[:1]), lambda row, block, maps: seen.append((row, block, maps.shape)))
    assert [row for row, _, _ in seen] == list(range(24))
    assert seen[0] == (0, "Conv", (1, 16, 32, 48))
    assert seen[23][1] == "C3"


def test_half_without_cuda_is_said_and_computed_in_float32(golden_dir, caplog):
    backend = load_backend(golden_dir / "yolov5n-v6-coco.pt", "cpu", half=True)
    assert "WARNING: --half needs a CUDA device; computing in float32 on cpu." in caplog.text
    assert backend.preprocess(IMAGES).dtype == torch.float32


def test_unknown_suffix_and_missing_file_are_refused(tmp_path):
    (tmp_path / "model.h5").touch()
    with pytest.raises(UserError, match=r"no runtime for files ending in '\.h5'\. Known: .*\.pt"):
        load_backend(tmp_path / "model.h5")
    with pytest.raises(UserError, match=r"missing\.pt: no such file"):
        load_backend(tmp_path / "missing.pt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_on_cuda_agrees_with_float32(golden_dir):
    weights = golden_dir / "yolov5n-v6-coco.pt"
    full, half = (load_backend(weights, "0", half).predict(IMAGES) for half in (False, True))
    torch.testing.assert_close(half[..., 4:].float(), full[..., 4:], rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows, "MPS agrees with the CPU on one image: boxes within 0 px, scores within 0"),
        (lambda rows: rows[..., :4].mul_(2), "--device mps does not agree with the CPU on one image: boxes within"),
        (lambda rows: rows[..., 4].add_(0.02), "scores within 0.02 (agreed: 1 px, 0.01). Do not trust its results"),
        (lambda rows: rows[0, 7, 6].fill_(torch.nan), "scores within inf (agreed"),
    ],
)
def test_mps_is_compared_with_the_cpu_before_a_run(weights, monkeypatch, caplog, change, words):
    """There is no Metal here: a function answers in its place."""

    def answer(model, device, inputs):
        rows = rows_on(model, torch.device("cpu"), inputs).clone()
        if device.type == "mps":
            change(rows)
        return rows

    monkeypatch.setattr(tested, "rows_on", answer)
    monkeypatch.setattr(tested, "select_device", lambda _: torch.device("mps"))
    monkeypatch.setattr(tested, "PyTorchBackend", lambda *_: "a backend")
    with caplog.at_level("INFO", "yolov5"):
        assert load_backend(weights, "mps") == "a backend"
    assert words in caplog.text
    assert ("WARNING" in caplog.text) == ("MPS agrees" not in words)
