"""What is printed; the pictures are looked at where the scripts draw them."""

import math
from types import SimpleNamespace

import pytest
import torch

from vqgan import report
from vqgan.vqvae import VQVAE


def test_a_table_has_a_line_for_each_result(capsys):
    results = {"VAE": {"nmse": 0.12345, "codes_used": None}, "VQ-VAE": {"nmse": 1, "codes_used": 9}}
    report.print_table(results, ["nmse", "codes_used"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["norm.", "MSE", "codes", "used"], ["VAE", "0.1235", "-"], ["VQ-VAE", "1.0000", "9"]
    ]  # fmt: skip


def test_every_column_of_a_table_has_a_heading_and_a_format():
    for columns in (report.STUDY_COLUMNS, report.VQGAN_COLUMNS, report.SAMPLES_COLUMNS):
        assert {*columns} <= report.FORMATS.keys()


def test_titles_of_the_study():
    assert report.study_title("vae") == "VAE"
    assert report.study_title("vae-spatial-batch16") == "spatial VAE, batch 16"
    assert report.study_title("vqvae-batch16") == "VQ-VAE, batch 16"


def test_batch_sizes_are_ordered_by_number():
    names = ["vqvae-batch16", "vae-batch64", "vae-batch256", "vae-batch16", "vae-spatial-batch16"]
    wanted = ["vae-batch16", "vae-batch64", "vae-batch256", "vae-spatial-batch16", "vqvae-batch16"]
    assert report.in_order(names) == wanted
    assert report.in_order(["vqvae", "vae-spatial", "vae"]) == ["vae", "vae-spatial", "vqvae"]


def test_a_title_says_why_validation_is_lower_and_where_losses_rise():
    first = "python train_transformer.py --tokenizer x --epochs 10"
    plain = report.token_losses_title("none", 0.1, first)
    assert plain == report.token_losses_title("class", 0.0, first)
    assert "10%" not in plain and "\n" not in plain
    title = report.token_losses_title("class", 0.1, f"{first} && python y.py --resume --epochs 17")
    assert "drops 10% of the conditions" in title and "after epoch 10)" in title


def test_losses_of_a_masked_transformer_say_what_is_compared():
    title = report.token_losses_title("class", 0.1, "python x.py", is_masked=True)
    assert "validation estimates the bound" in title


def test_a_price_by_hand():
    prior = SimpleNamespace(seq_len=64, num_embeddings=512, causal=False)
    price = report.price(math.log(256), 0.25, prior, 32)
    assert price["nats_per_token_standard_error"] == 0.25 and price["nats_per_token_is_bound"]
    assert price["nats_per_token"] == math.log(256)
    assert price["bits_per_image"] == pytest.approx(64 * 8)
    assert price["fixed_length_bits_per_image"] == 64 * 9
    assert price["compression"] == pytest.approx(3 * 8 * 32**2 / (64 * 8))


@pytest.mark.parametrize(("accuracy", "warned"), [(None, None), (0.15, True), (0.9, False)])
def test_a_yardstick_near_chance_is_warned_of(accuracy, warned, capsys):
    report.print_eval_classifier(accuracy, 10)
    text = capsys.readouterr().out
    assert ("warning" in text) == bool(warned) and (text == "") == (accuracy is None)


def test_baselines_are_printed_with_their_titles(capsys):
    report.print_baselines({"uniform": 3.0, "unigram": 2.5, "bigram": 2.25})
    text = capsys.readouterr().out
    assert all(title in text for title in report.BASELINES.values()) and "2.250" in text


def test_the_same_few_test_images_are_shown_and_reconstructed_in_eval_mode(shapes):
    few = report.shown_images(SimpleNamespace(data=shapes))
    assert few.shape == (report.NUM_SHOWN, 3, 32, 32)
    assert torch.equal(few, shapes.test_images[: report.NUM_SHOWN].float() / 127.5 - 1)
    model = VQVAE(num_hiddens=8, num_embeddings=16).train()
    x = report.reconstruct(model, few)
    assert not model.training and not model.quantizer.initialized and not x.requires_grad
    assert torch.equal(x, model(few).reconstruction)


@pytest.mark.parametrize("bound", [True, False])
def test_without_samples_no_table_of_them(bound, capsys):
    result = {"nats_per_token": 2.0, "best_epoch": 3, "bits_per_image": 90.0}
    result |= {"nats_per_token_standard_error": 0.125, "nats_per_token_is_bound": bound}
    report.print_transformer(result | {"fixed_length_bits_per_image": 96.0}, [], {})
    text = capsys.readouterr().out
    assert ("at most 2.000" in text) == bound and "2.000 +- 0.125" in text
    assert "epoch 3" in text and "guidance" not in text
