"""MNN and ExecuTorch, whose files only their runtimes can read: the checkpoint's rows, and refusals in plain words."""

import numpy as np
import pytest
import torch

from models.backends import load_backend, open_model
from models.load import load_model
from utils.errors import UserError

FORMS = ["mnn", pytest.param("executorch", marks=pytest.mark.slow)]
CASES = [  # ExecuTorch's exporter takes seconds: once must do
    ("mnn", "anchors", {"batch_size": 2}),
    ("mnn", "bins", {"raw": True}),
    pytest.param("executorch", "bins", {"raw": True}, marks=pytest.mark.slow),
]


def rows_of(checkpoint, images):
    with torch.no_grad():
        return load_model(checkpoint)(torch.from_numpy(np.ascontiguousarray(images)).float() / 255)[0].numpy()


def close(found, expected, box_px=0.02, score=2e-4):
    found = np.asarray(found)
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found[..., :4], expected[..., :4], atol=box_px, rtol=1e-4)
    np.testing.assert_allclose(found[..., 4:], expected[..., 4:], atol=score)


@pytest.mark.parametrize(("form", "head", "options"), CASES)
def test_rows_are_the_checkpoints_for_one_image_and_for_three(exported, small_weights, images, form, head, options):
    path = exported(form, small_weights[head], **options)
    backend = load_backend(path, "cpu")
    assert type(backend).__module__ == f"models.backends.{form}"
    assert path.stem == ("best-raw" if options.get("raw") else "best")
    assert (backend.names, backend.stride, backend.batch) == (
        {0: "ant", 1: "bee", 2: "fly"},
        32,
        options.get("batch_size", 1),
    )
    assert (backend.dynamic, backend.has_nms, backend.metadata.shape_hw) == (False, False, (64, 96))
    expected = rows_of(small_weights[head], images)
    first = backend.predict(images[:1])
    close(first, expected[:1])
    close(backend.predict(images), expected)
    close(first, expected[:1])  # what was returned is the caller's own


@pytest.mark.parametrize("form", FORMS)
def test_mistakes_are_named(exported, small_weights, images, tmp_path, form):
    path = exported(form, small_weights["bins"], raw=True)
    with pytest.raises(UserError, match=r"exported for images of 64x96 px .*not 64x64: use --imgsz 64 96"):
        load_backend(path, "cpu").predict(images[:, :, :, :64])
    with pytest.raises(UserError, match="--device 7: .* runs on the CPU here"):
        load_backend(path, "7")
    content = path.read_bytes()
    for damaged in (b"no model at all, whatever its name says" * 10, content[: len(content) // 3]):
        copy = tmp_path / path.name
        copy.write_bytes(damaged)
        with pytest.raises(UserError, match=str(copy)):
            open_model(copy, "cpu")


def test_a_dynamic_mnn_file_takes_any_size_and_number(exported, small_weights, images):
    backend = load_backend(exported("mnn", small_weights["anchors"], dynamic=True, half=True), "cpu")
    assert backend.dynamic and backend.metadata.precision == "float16"
    for chosen in (images, images[:1, :, :, :64], np.tile(images, (1, 1, 2, 1))[:2]):
        close(backend.predict(chosen), rows_of(small_weights["anchors"], chosen), box_px=1, score=0.02)
