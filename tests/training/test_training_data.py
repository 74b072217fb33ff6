"""The datasets: values, labels, order, and what each does with input that is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffkern.training import Digits, ImageFolder, NpzImages, open_data
from diffkern.training.data.loader import CheckedImages


def write_image(path, colour=128, size=(12, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (colour,) * 3 if mode == "RGB" else colour).save(path)


# --- digits


def test_digits_are_the_scaled_originals():
    from sklearn.datasets import load_digits

    data = Digits()
    image, label = data[1234]
    assert len(data) == 1797
    assert data.num_classes == 10
    assert image.dtype == torch.float32
    assert image.shape == data.shape == (1, 8, 8)
    grey = np.unique(torch.stack([image for image, _ in data]))
    np.testing.assert_array_equal(grey, np.linspace(-1, 1, data.levels))
    np.testing.assert_array_equal((image[0].numpy() + 1) * 8, load_digits().images[1234])
    assert label == load_digits().target[1234]


def test_digit_splits_are_disjoint_complete_and_balanced():
    train, heldout = Digits("train"), Digits("heldout")
    assert (len(train), len(heldout)) == (1541, 256)
    merged = sorted(image.numpy().tobytes() for image in [*train.images, *heldout.images])
    assert merged == sorted(image.numpy().tobytes() for image in Digits().images)
    assert np.bincount(heldout.labels).min() >= 15
    with pytest.raises(ValueError, match="split='test'"):
        Digits("test")


# --- folders


def test_folder_labels_follow_sorted_subfolders(tmp_path):
    write_image(tmp_path / "zebra" / "a.png", 255)
    write_image(tmp_path / "ant" / "deep" / "b.jpg", 0)
    write_image(tmp_path / "ant" / "c.bmp", 0)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "ant" / ".hidden.png").write_text("not an image either")
    data = ImageFolder(tmp_path, size=4)
    assert data.num_classes == 2
    assert [path.name for path in data.paths] == ["c.bmp", "b.jpg", "a.png"]
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    assert data.levels == 256
    assert torch.equal(data[0][0], -torch.ones(3, 4, 4))
    assert torch.equal(data[2][0], torch.ones(3, 4, 4))


def test_folder_without_subfolders_has_no_labels(tmp_path):
    write_image(tmp_path / "a.png")
    data = ImageFolder(tmp_path, size=8, channels=1)
    image, label = data[0]
    assert data.num_classes is None
    assert label == -1
    assert image.shape == (1, 8, 8)


def test_crop_is_central_and_keeps_the_aspect(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image, _ = ImageFolder(tmp_path, size=10)[0]
    assert torch.equal(image, torch.ones(3, 10, 10))


def test_deep_grey_images_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8080, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 1.0, np.float32)).save(tmp_path / "b.tiff")
    data = ImageFolder(tmp_path, size=4, channels=1)
    assert torch.equal(data[0][0], torch.full((1, 4, 4), 128.0) / 127.5 - 1)
    assert torch.equal(data[1][0], torch.ones(1, 4, 4))


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert torch.equal(ImageFolder(tmp_path, size=4)[0][0], torch.ones(3, 4, 4))


def test_broken_files_are_named_skipped_and_counted(tmp_path):
    for name in ("a.png", "c.png", "e.png"):
        write_image(tmp_path / "k" / name, ord(name[0]))
    (tmp_path / "k" / "b.png").write_bytes((tmp_path / "k" / "a.png").read_bytes()[:40])
    (tmp_path / "k" / "d.jpg").write_text("no image at all")
    with pytest.warns(UserWarning, match="skipped|could not be read") as caught:
        data = ImageFolder(tmp_path, size=4)
    messages = [str(warning.message) for warning in caught]
    assert "b.png: skipped" in messages[0]
    assert "d.jpg: skipped" in messages[1]
    assert messages[2].endswith("2 of 5 image files could not be read")
    assert [path.name for path in data.paths] == ["a.png", "c.png", "e.png"]
    assert [round((data[i][0][0, 0, 0].item() + 1) * 127.5) for i in range(3)] == [ord(c) for c in "ace"]


def test_large_folders_are_decoded_at_each_use(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", 3)
    write_image(tmp_path / "b.png", 200)
    kept = ImageFolder(tmp_path, size=4)
    monkeypatch.setattr("diffkern.training.data.folder._KEEP_BYTES", 0)
    streamed = ImageFolder(tmp_path, size=4)
    assert streamed._kept is None
    assert all(torch.equal(kept[i][0], streamed[i][0]) for i in range(2))


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(tmp_path / "missing", size=4)
    with pytest.raises(ValueError, match="no image files"):
        ImageFolder(tmp_path, size=4)
    (tmp_path / "a.png").write_text("broken")
    with (
        pytest.warns(UserWarning, match="a.png: skipped"),
        pytest.raises(ValueError, match="none of its 1 image files can be read"),
    ):
        ImageFolder(tmp_path, size=4)
    with pytest.raises(NotADirectoryError):
        ImageFolder(tmp_path / "a.png", size=4)
    write_image(tmp_path / "class" / "b.png")
    with pytest.raises(ValueError, match=r"1 images lie directly in it \(such as a.png\)"):
        ImageFolder(tmp_path, size=4)
    with pytest.raises(ValueError, match="size=0"):
        ImageFolder(tmp_path, size=0)
    with pytest.raises(ValueError, match="channels=4"):
        ImageFolder(tmp_path, size=4, channels=4)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or Inf"), (np.inf, "NaN or Inf"), (3.0, "0 to 1")])
def test_bad_values_in_an_image_name_the_file(tmp_path, value, message):
    write_image(tmp_path / "good.png")
    pixels = np.full((4, 4), 0.5, np.float32)
    pixels[1, 2] = value
    Image.fromarray(pixels).save(tmp_path / "bad.tiff")
    with pytest.raises(ValueError, match=f"bad.tiff: .*{message}"):
        ImageFolder(tmp_path, size=4)


def test_a_link_in_a_circle_ends(tmp_path):
    write_image(tmp_path / "k" / "a.png")
    (tmp_path / "k" / "up").symlink_to(tmp_path)
    assert len(ImageFolder(tmp_path, size=4)) == 1


# --- npz


def test_npz_layouts_agree(tmp_path):
    nhwc = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "u8.npz", nhwc, np.array([2, 0, 1, 1, 3]))
    np.savez(tmp_path / "float.npz", images=nhwc.transpose(0, 3, 1, 2) / 127.5 - 1)
    by_bytes, by_floats = NpzImages(tmp_path / "u8.npz"), NpzImages(tmp_path / "float.npz")
    assert by_bytes.shape == by_floats.shape == (3, 4, 6)
    assert by_bytes.num_classes == 4
    assert by_floats.num_classes is None
    assert by_bytes[4][1] == 3
    assert by_floats[4][1] == -1
    for i in range(5):
        assert by_floats[i][0].dtype == torch.float32
        torch.testing.assert_close(by_bytes[i][0], by_floats[i][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((1, 4, 4, 3), np.uint8)}, "neither 'images' nor 'arr_0'"),
        ({"images": np.zeros((1, 4, 4, 3), np.int32)}, "images are int32 .*allowed: uint8"),
        ({"images": np.zeros((1, 3, 4, 4), np.uint8)}, r"uint8 \(1, 3, 4, 4\); uint8 images must be \(N, H, W, C\)"),
        ({"images": np.zeros((1, 4, 4, 3))}, r"must be \(N, C, H, W\)"),
        ({"images": np.zeros((4, 4))}, r"images are float64 \(4, 4\)"),
        ({"images": np.zeros((0, 3, 4, 4))}, "no image in it"),
        ({"images": np.full((1, 3, 4, 4), 255.0)}, r"image 0 runs from 255 to 255; .*\[-1, 1\]"),
        ({"images": np.zeros((2, 3, 4, 4)), "labels": np.zeros(3, int)}, r"labels are int64 \(3,\)"),
        ({"images": np.zeros((2, 3, 4, 4)), "labels": np.zeros(2)}, "must be integers"),
        ({"images": np.zeros((2, 3, 4, 4)), "labels": np.array([0, -1])}, "label 1 is -1"),
        ({"images": np.array([None])}, "cannot be read as an .npz file"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        NpzImages(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_npz_with_nan_names_the_index(tmp_path, value):
    images = np.zeros((4, 1, 3, 3), np.float32)
    images[2, 0, 1, 1] = value
    np.savez(tmp_path / "a.npz", images)
    with pytest.raises(ValueError, match="image 2 holds NaN or Inf"):
        NpzImages(tmp_path / "a.npz")


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((9, 8, 8, 3), np.uint8))
    whole = (tmp_path / "a.npz").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "a.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a.npz: cannot be read"):
            NpzImages(tmp_path / "a.npz")


def test_open_data(tmp_path):
    assert len(open_data("digits")) == 1797
    assert len(open_data("digits", split="heldout")) == 256
    with pytest.raises(ValueError, match="split='train': only the digits have splits"):
        open_data(tmp_path, split="train")
    write_image(tmp_path / "a.png")
    assert open_data(tmp_path, size=5, channels=1).shape == (1, 5, 5)
    with pytest.raises(FileNotFoundError, match="neither 'digits' nor a folder"):
        open_data("didgits")


# --- any dataset


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.full((1, 2, 2), float("nan")), 0), "image 1 .* holds NaN or Inf"),
        ((torch.zeros(1, 3, 2), 0), r"image 1 .* is \(1, 3, 2\); the first one is \(1, 2, 2\)"),
        ((torch.zeros(1, 2, 2, dtype=torch.uint8), 0), "image 1 .* is torch.uint8"),
        ((torch.zeros(1, 2, 2), 7), "image 1 .* has label 7; the model takes 0 to 2"),
        (torch.zeros(1, 2, 2), "image 1 .* has no label"),
    ],
)
def test_items_are_checked(item, message):
    checked = CheckedImages([(torch.zeros(1, 2, 2), 0), item], num_classes=3)
    with pytest.raises(ValueError, match=message):
        checked[1]
