import itertools
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vqgan import figures

MEGABYTE = 2**20


def pixels_of(path):
    """The picture as (H, W, 3), after a look at its size: small enough to commit."""
    assert path.stat().st_size < MEGABYTE / 2
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def saved(monkeypatch):
    """The figures that are written."""
    figures_saved, save = [], figures.save_figure

    def remember(figure, path):
        figures_saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", remember)
    return figures_saved


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines}


def words_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def has_colour(pixels, color, tolerance=3):
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels.astype(int) - wanted).max(axis=-1) <= tolerance).any()


def test_rows_show_their_images(tmp_path):
    """Each image appears in its place: a red row over a green one."""
    red, green = torch.zeros(2, 5, 3, 32, 32)
    red[:, 0], green[:, 1] = 1, 1
    figures.image_rows(tmp_path / "a.png", [("red", red), ("green", green)], title="title")
    pixels = pixels_of(tmp_path / "a.png")
    is_red = (pixels == (255, 0, 0)).all(axis=-1)
    is_green = (pixels == (0, 255, 0)).all(axis=-1)
    assert is_red.mean() > 0.2 and is_green.mean() > 0.2
    assert np.nonzero(is_red)[0].max() < np.nonzero(is_green)[0].min()


def test_a_grid_shows_all_images(tmp_path):
    levels = torch.linspace(0.1, 0.9, 9).view(9, 1, 1, 1).expand(9, 3, 8, 8)
    figures.image_grid(tmp_path / "a.png", levels, title="greys", columns=4)
    pixels = pixels_of(tmp_path / "a.png")
    for level in levels[:, 0, 0, 0]:
        grey = round(255 * level.item())
        assert (np.abs(pixels.astype(int) - grey).max(axis=-1) <= 1).mean() > 0.01


def test_a_title_of_two_lines_stands_above_the_images(tmp_path, saved):
    red = torch.zeros(4, 3, 8, 8)
    red[:, 0] = 1
    for title in ("one line", "two\nlines"):
        figures.image_rows(tmp_path / "a.png", [("red", red)], title=title)
        (axes,) = saved[-1].axes
        words = saved[-1].get_suptitle(), saved[-1]._suptitle.get_window_extent().y0
        assert words[0] == title and words[1] > axes.get_window_extent().y1


def test_every_term_has_a_panel_and_models_with_the_same_terms_share_it(tmp_path, saved):
    steps = [{"step": i, "epoch": i / 2} for i in range(1, 9)]
    vae = [row | {"loss": 4000 + 1 / row["step"], "KL": row["step"]} for row in steps]
    vqvae = [row | {"loss": 1 / row["step"] ** 3, "codes_used": 5} for row in steps]
    logs = {"VAE": vae, "VQ-VAE, batch 8": vqvae, "VQ-VAE, batch 16": vqvae[::2]}
    figures.losses(tmp_path / "a.png", logs, ("loss", "KL"), title="Losses")
    loss, kl, shared = saved[0].axes
    assert [axes.get_title() for axes in saved[0].axes] == ["VAE: loss", "VAE: KL", "loss"]
    assert [axes.get_ylabel() for axes in saved[0].axes] == ["nats per image"] * 2 + ["loss"]
    # Terms of another size do not flatten it, and a few large values make the axis logarithmic.
    assert loss.get_ylim()[0] > 3999 and loss.get_yscale() == "linear"
    assert shared.get_yscale() == "log"
    assert words_of(shared) == ["VQ-VAE, batch 8", "VQ-VAE, batch 16"]
    assert loss.get_legend() is None and list(kl.lines[0].get_ydata()) == [*range(1, 9)]
    pixels = pixels_of(tmp_path / "a.png")
    assert all(has_colour(pixels, color) for color in figures.COLORS[:2])


def test_numbers_beside_points_lie_within_the_axes(tmp_path, saved):
    results = {"VAE": {64: 0.6, 16: 0.5, 256: 0.4}, "VQ-VAE": {16: 0.8, 64: 0.85, 256: 0.7}}
    figures.metric_by_batch_size(tmp_path / "b.png", results, ylabel="SSIM", title="")
    (axes,) = saved[0].axes
    assert all(has_colour(pixels_of(tmp_path / "b.png"), c) for c in figures.COLORS[:2])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["16", "64", "256"]
    low, high = axes.get_xlim()
    assert low < 16 and high > 256
    for text in axes.texts:
        box = text.get_window_extent()
        assert axes.get_window_extent().y1 >= box.y1 and box.x1 <= saved[0].bbox.x1


def test_codes_that_are_never_used_take_no_room(tmp_path, saved):
    """Five of 512 would be one stroke at the left edge."""
    counts = torch.zeros(512, dtype=torch.int64)
    counts[100:105] = torch.tensor([1, 5, 2, 4, 3])
    figures.codebook_usage(tmp_path / "c.png", {"VQ-VAE": counts}, title="")
    (axes,) = saved[0].axes
    line = lines_of(axes)["VQ-VAE"]
    assert line.get_xdata().tolist() == [1, 2, 3, 4, 5] and line.get_marker() == "o"
    assert line.get_ydata() == pytest.approx([i / 15 for i in (5, 4, 3, 2, 1)])
    assert set(lines_of(axes)["uniform (1/K)"].get_ydata()) == {1 / 512}
    assert "512" in axes.get_xlabel()
    assert has_colour(pixels_of(tmp_path / "c.png"), figures.COLORS[0])

    figures.codebook_usage(tmp_path / "c.png", {"VQ-VAE": torch.arange(1, 41)}, title="")
    assert lines_of(saved[1].axes[0])["VQ-VAE"].get_marker() in ("", "None")


def test_what_codes_cost_is_drawn_over_its_baselines(tmp_path, saved):
    rows = [{"step": i, "epoch": i / 5, "loss": 3 - i / 20, "lr": 0.1} for i in range(1, 21)]
    validation = [{"epoch": i, "loss": 3.1 - i / 5} for i in range(1, 5)]
    baselines = {"uniform": 4.1, "unigram": 3.6, "bigram": 3.25}
    figures.token_losses(tmp_path / "a.png", rows, validation, baselines, title="What codes cost")

    (axes,) = saved[0].axes
    lines = lines_of(axes)
    for name, points in (("training", rows), ("validation", validation)):
        assert lines[name].get_xdata().tolist() == [point["epoch"] for point in points]
        assert lines[name].get_ydata().tolist() == [point["loss"] for point in points]
        assert lines[name].get_linestyle() == "-"
    for name, level in (("uniform: 4.10", 4.1), ("unigram: 3.60", 3.6), ("bigram: 3.25", 3.25)):
        assert set(lines[name].get_ydata()) == {level} and lines[name].get_linestyle() == "--"
    assert words_of(axes) == list(lines)
    # Baselines of the same value are all seen: none has a dash where another has one.
    dashes = [line._unscaled_dash_pattern for line in list(lines.values())[2:]]
    inked = [{(i - offset) % sum(on) for i in range(int(on[0]))} for offset, on in dashes]
    assert not any(a & b for a, b in itertools.combinations(inked, 2))
    assert len(lines) == 5 and axes.get_ylabel() == "nats per token"
    pixels = pixels_of(tmp_path / "a.png")
    assert [line.get_color() for line in lines.values()] == list(figures.COLORS[:5])
    assert all(has_colour(pixels, color) for color in figures.COLORS[:2])  # dashes are too thin


def test_the_adversarial_game_is_drawn_from_where_it_starts(tmp_path, saved):
    terms = ("reconstruction", "perceptual", "real", "fake", "lambda")
    rows = [{"step": i, "epoch": i / 4} | dict.fromkeys(terms, i) for i in range(1, 13)]
    figures.adversarial(tmp_path / "a.png", rows, 1.0, 2.0, title="The game")
    lines = {line.get_label(): line for axes in saved[0].axes for line in axes.lines}
    for term, start in zip(terms, (0, 0, 1.0, 1.0, 2.0), strict=True):
        epochs = lines[term].get_xdata().tolist()
        assert epochs == [row["epoch"] for row in rows if row["epoch"] > start], term
    # All panels have the same epochs, and what the vertical lines are is said once.
    assert {axes.get_xlim() for axes in saved[0].axes} == {(0, 3)}
    assert all(axes.get_ylim()[0] <= 0 for axes in saved[0].axes)
    words = [words_of(axes) for axes in saved[0].axes if axes.get_legend()]
    assert words == [["reconstruction", "perceptual"], ["real", "fake"]]
    assert len(saved[0].legends) == 1 and len(saved[0].legends[0].get_texts()) == 2
    assert all(has_colour(pixels_of(tmp_path / "a.png"), c) for c in figures.COLORS[:2])


@pytest.mark.parametrize("bad", [torch.rand(2, 3, 8, 8) - 0.5, torch.rand(2, 1, 8, 8)])
def test_images_out_of_range_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        figures.image_rows(tmp_path / "a.png", [("x", bad)], title="")
    assert not (tmp_path / "a.png").exists()


# --- files and fonts ---------------------------------------------------------------------------


def test_a_figure_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        figures.image_rows(path, [("", torch.zeros(1, 3, 8, 8))], title="title")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_labels_in_an_alphabet_that_no_font_has_are_one_line(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(figures, "FONTS", ("No Such Font", "DejaVu Sans"))
    rows = [(label, torch.zeros(1, 3, 8, 8)) for label in ("猫", "犬", "Ä hund")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.image_rows(tmp_path / "a.png", rows, title="title")
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "a.png: no font here has all of its letters" in text
    assert not caplog.records  # matplotlib would log that a font was not found
    figures.image_rows(tmp_path / "a.png", rows[2:], title="title")
    assert capsys.readouterr().out == ""


def test_a_label_is_a_text_and_no_formula(tmp_path):
    """Also one of a folder whose name is no Unicode."""
    rows = [(label, torch.zeros(1, 3, 8, 8)) for label in ("US$^$", "a $x$ b", "caf\udce9")]
    figures.image_rows(tmp_path / "a.png", rows, title="$\\frac$")
    assert (tmp_path / "a.png").exists()


def test_every_label_is_drawn_by_the_first_font_that_has_it(tmp_path, monkeypatch):
    """DejaVu Sans is first, so other fonts on a machine change no figure."""
    drawn = []
    for fonts in (("DejaVu Sans",), figures.FONTS, ("DejaVu Serif", "DejaVu Sans")):
        monkeypatch.setattr(figures, "FONTS", fonts)
        figures.image_rows(tmp_path / "a.png", [("label", torch.zeros(1, 3, 8, 8))], title="t")
        drawn.append((tmp_path / "a.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
