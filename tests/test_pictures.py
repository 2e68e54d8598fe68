"""Any reasonable picture file becomes the right RGB pixels, and what is no picture is passed over."""

import random

import numpy as np
import pytest
from PIL import Image

from train_dreambooth_lora_sdxl import UserError, check_pictures, choose_view, list_pictures, load_picture, resized


def saved(tmp_path, image, name="a.png", **keywords):
    image.save(tmp_path / name, **keywords)
    return np.asarray(load_picture(tmp_path / name)).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_trap_29_exif_rotation(tmp_path, orientation):
    upright = Image.new("RGB", (6, 4), "black")
    upright.putpixel((5, 0), (255, 255, 255))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (saved(tmp_path, stored, exif=exif) == np.asarray(upright)).all()


def test_trap_29_transparent_pixels_are_white(tmp_path):
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (saved(tmp_path, hidden) == 255).all()
    assert (saved(tmp_path, Image.new("LA", (4, 4), (0, 0))) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (saved(tmp_path, palette, transparency=0) == 255).all()
    assert (saved(tmp_path, palette, "b.png") == (255, 0, 0)).all()


def test_other_modes(tmp_path):
    assert (saved(tmp_path, Image.new("L", (4, 4), 90)) == 90).all()
    assert (saved(tmp_path, Image.new("1", (4, 4), 1)) == 255).all()
    wide = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert (saved(tmp_path, wide) == 128).all()
    assert (abs(saved(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "c.jpg") - (255, 0, 0)) < 12).all()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "red")]
    assert (saved(tmp_path, frames[0], "m.gif", save_all=True, append_images=frames[1:]) == (0, 0, 255)).all()


def test_trap_29_other_files_are_passed_over(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "A.JPEG")
    for name in (".cache", ".ipynb_checkpoints", "folder.png"):
        (tmp_path / name).mkdir()
    for name in (".DS_Store", "notes.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in list_pictures("--instance_data_dir", tmp_path)] == ["A.JPEG", "b.png"]


def test_trap_29_broken_pictures_are_all_named_at_once(tmp_path, train, pictures):
    good = (pictures / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "none.jpg").write_bytes(b"")
    (tmp_path / "text.webp").write_text("no picture")
    (tmp_path / "fine.png").write_bytes(good)
    with pytest.raises(UserError) as refusal:
        train.args(instance_data_dir=tmp_path)
    told = str(refusal.value)
    assert "3 of 4" in told and "fine.png" not in told
    assert all(name in told for name in ("cut.png", "none.jpg", "text.webp"))


def test_a_folder_without_pictures(tmp_path, train):
    with pytest.raises(UserError, match="holds no picture"):
        train.args(instance_data_dir=tmp_path)
    check_pictures("--instance_data_dir", [])


def test_views_cover_the_picture_and_stay_inside():
    assert resized((300, 200), (64, 64)) == (96, 64)
    assert resized((100, 333), (64, 64)) == (64, 213)
    rng = random.Random(0)
    views = [choose_view((96, 64), (64, 64), False, True, rng) for _ in range(300)]
    assert {view.left for view in views} == set(range(33)) and {view.top for view in views} == {0}
    assert {view.flip for view in views} == {True, False}
    assert choose_view((96, 64), (64, 64), True, False, rng) == (0, 16, False)
