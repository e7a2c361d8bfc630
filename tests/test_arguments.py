import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vqgan import arguments
from vqgan.arguments import (
    common_parser,
    open_run,
    open_tokenizer,
    output_path,
    parse_arguments,
    sampling_settings,
)
from vqgan.errors import InputError
from vqgan.files import save_plain
from vqgan.masked import DEFAULT_STEPS
from vqgan.vqvae import VQVAE

# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            arguments.positive_int,
            "3",
            ["0", "-1", "1.5", "x", "1" + 30 * "0", 400 * "9", 5000 * "9"],
        ),
        (arguments.small_int, "4096", ["0", "4097"]),
        (arguments.non_negative_int, "0", ["-1", "0.5", "x"]),
        (arguments.positive_float, "1e-3", ["0", "-1", "nan", "inf", "1e308", 400 * "9"]),
        (arguments.seed_int, "0", ["-1", "1.5", "x", str(2**63)]),
        (arguments.non_negative_float, "0", ["-1", "nan", "inf"]),
        (arguments.fraction, "0.25", ["-0.1", "1", "nan"]),
    ],
)
def test_numbers_out_of_range_are_refused(kind, good, bad):
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"not '{text[:39]}"):
            kind(text)


# --- the flags of a run, and a resumed one -----------------------------------------------------


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parse the flags of a script with --extra, whose run is in a folder of this test."""

    def parse(*flags):
        argv = ["train.py", "--out", str(tmp_path / "run"), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        parser = common_parser("A script.", out="runs/it", epochs=7, lr=0.5)
        parser.add_argument("--extra", type=int, default=1, help="of this script")
        return parse_arguments(parser)

    return parse


@pytest.fixture
def begun(tmp_path, parse):
    """A run that has its config.json."""

    def begin(*flags):
        flags = ("--data", "shapes", "--device", "cpu", "--limit", 20, *flags)
        return open_run(parse(*flags), batch_sizes=[4])

    return begin


def test_flags_have_the_scripts_defaults(parse):
    args = parse()
    assert (args.epochs, args.lr, args.extra, args.resume) == (7, 0.5, 1, False)
    assert args.command.startswith("python train.py --out")


def test_a_run_is_what_its_flags_say(begun, tmp_path):
    run = begun("--epochs", 2, "--seed", 3, "--no-flip", "--precision", "bf16")
    assert run.out == tmp_path / "run" and run.device.type == "cpu" and not run.resume
    assert (run.epochs, run.seed, run.flip, run.checkpoint_every) == (2, 3, False, 200)
    assert run.dtype == torch.bfloat16 and len(run.data.train_images) == 20
    assert (
        run.metadata.keys() == {"data", "image_size", "command"}
        and run.metadata["data"] == "shapes"
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["seed"] == 3 and config["precision"] == "bf16" and "resume" not in config


def test_a_resumed_run_has_its_own_flags(begun, parse):
    begun("--extra", 5, "--epochs", 2)
    args = parse("--resume")
    assert (args.extra, args.epochs, args.data, args.limit) == (5, 2, "shapes", 20)
    assert args.precision in ("fp32", "bf16")  # what auto chose when it began


def test_what_would_make_it_another_run_is_refused(begun, parse):
    begun("--extra", 5, "--epochs", 2)
    with pytest.raises(InputError, match="extra.*5.*6"):
        parse("--resume", "--extra", 6)
    with pytest.raises(InputError, match="epochs 1.* 2 "):
        parse("--resume", "--epochs", 1)


def test_what_changes_no_result_may_change_and_more_epochs_are_told(begun, parse):
    command = begun("--epochs", 2).metadata["command"]
    assert parse("--resume", "--checkpoint-every", 3).checkpoint_every == 3
    assert parse("--resume", "--checkpoint-every", 3).command == command
    args = parse("--resume", "--epochs", 3)
    assert args.epochs == 3
    assert args.command.startswith(f"{command} && ") and args.command.endswith("--epochs 3")


def test_where_nothing_is_there_is_nothing_to_resume(parse):
    with pytest.raises(InputError, match="no run in.*--out"):
        parse("--resume")


@pytest.mark.parametrize("name", ["checkpoint.pt", "vae/checkpoint.pt", "metrics.json"])
def test_a_run_that_is_there_is_not_overwritten(parse, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(InputError, match="--resume.*--out"):
        parse()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"epochs": 1}',
        '{"command": "x", "epochs": 1, "precision": "fp32", "likelihood": 1}',  # another script's
    ],
)
def test_another_config_is_named(parse, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    for flags in (["--resume"], []):  # a new run would replace it
        with pytest.raises(InputError) as caught:
            parse(*flags)
        assert str(tmp_path / "run") in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("epochs", "1"), ("epochs", 1.5), ("epochs", -1), ("epochs", None), ("epochs", [1]),
        ("seed", -1), ("precision", "evil"), ("checkpoint_every", 0), ("lr", None), ("lr", "0.5"),
        ("flip", 1), ("extra", []), ("data", None), ("data", ["shapes"]), ("limit", {}),
        ("image_size", 10**30),
    ],
)  # fmt: skip
def test_a_stored_flag_is_one_that_could_be_typed(begun, parse, tmp_path, flag, value):
    begun()
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {flag: value}))
    with pytest.raises(InputError, match=f"config.json says {flag} = "):
        parse("--resume")
    path.write_text(json.dumps(config))
    assert parse("--resume").epochs == 7


def test_a_json_file_that_nests_too_deeply_is_named(parse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(100_000 * "[" + 100_000 * "]")
    with pytest.raises(InputError, match="config.json cannot be read"):
        parse("--resume")


@pytest.mark.parametrize("flag", ["--out", "--data", "--data-root", "--init-from"])
def test_an_empty_path_is_not_the_current_folder(parse, flag, capsys):
    with pytest.raises(SystemExit):
        parse(flag, "")
    assert "a path was expected" in capsys.readouterr().err


# --- the run folder and the data folder --------------------------------------------------------


def make_images(folder, count=12):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (20 * i, 0, 255 - 20 * i)).save(folder / f"{i}.png")


@pytest.mark.parametrize("place", ["photos", "photos/run", "photos/a/b"])
def test_a_run_folder_never_lies_in_the_data_folder(parse, tmp_path, place, monkeypatch):
    make_images(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    args = parse("--data", "photos", "--device", "cpu")
    args.out = f"./{place}"
    with pytest.raises(InputError, match="lies in --data"):
        open_run(args, batch_sizes=[4])
    assert len([*(tmp_path / "photos").iterdir()]) == 12  # nothing was written


def test_a_refused_resume_changes_nothing(begun, parse, tmp_path):
    """The images are compared when the checkpoint is read, after the run was opened."""
    begun("--epochs", 2)
    before = (tmp_path / "run" / "config.json").read_bytes()
    make_images(tmp_path / "photos")
    run = open_run(parse("--resume", "--data", tmp_path / "photos", "--epochs", 3), batch_sizes=[4])
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert run.config["epochs"] == 3  # which a session writes


def test_what_a_killed_start_left_is_not_the_next_runs(begun, tmp_path):
    (tmp_path / "run").mkdir()
    names = {"tokenizer.pt", "classifier.pt", "eval_classifier.pt"}
    for name in names:
        (tmp_path / "run" / name).touch()
    begun()  # in a folder without a run these are the user's own, and stay
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == names
    begun()  # the run above was killed before its first checkpoint
    assert not [*(tmp_path / "run").glob("*.pt")]


def test_a_file_that_a_flag_names_is_no_leftover(begun, parse, tmp_path):
    begun()
    (tmp_path / "run" / "eval_classifier.pt").touch()
    args = parse("--data", "shapes", "--device", "cpu", "--limit", 20)
    args.eval_classifier = str(tmp_path / "run" / "eval_classifier.pt")
    open_run(args, batch_sizes=[4])
    assert (tmp_path / "run" / "eval_classifier.pt").exists()


def test_a_missing_model_to_start_from_stops_before_anything_is_read(parse, tmp_path):
    args = parse("--data", "shapes", "--device", "cpu", "--init-from", "gone.pt")
    with pytest.raises(InputError, match="there is no checkpoint gone.pt"):
        open_run(args, batch_sizes=[4])
    args = parse("--data", "shapes", "--device", "cpu")
    args.init_config = "config.yaml"
    with pytest.raises(InputError, match="--init-config is about --init-from"):
        open_run(args, batch_sizes=[4])


def test_a_folder_of_images_may_have_moved_since_the_run_began(begun, parse, tmp_path):
    make_images(tmp_path / "photos")
    begun("--data", tmp_path / "photos")
    (tmp_path / "photos").rename(tmp_path / "moved")
    args = parse("--resume", "--data", tmp_path / "moved")
    run = open_run(args, batch_sizes=[4])
    assert run.metadata["data"] == str(tmp_path / "moved") and len(run.data.train_images) == 11
    with pytest.raises(InputError, match="data.*shapes"):
        parse("--resume", "--data", "shapes")


def test_another_process_cannot_write_to_a_run_folder(begun, tmp_path):
    folder = tmp_path / "run"
    code = "import sys, time; from pathlib import Path; from vqgan.files import lock_folder\n"
    code += "lock = lock_folder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(__file__).parents[1]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another run writes to"):
            begun()
        assert not (folder / "config.json").exists()
    finally:
        other.kill()  # a dead run's lock is none
        other.wait()
    begun()
    assert (folder / "config.json").exists()


def test_the_help_states_every_default_but_none(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for default in ("7", "0.5", "runs/it", "cifar10", "1"):
        assert f"(default: {default})" in text
    assert "None" not in text


# --- the tokenizer -----------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path):
    """A small tokenizer's checkpoint, trained on a folder in this test's."""
    model_args = {"num_hiddens": 8, "num_embeddings": 16}
    (tmp_path / "images").mkdir()
    metadata = {"data": str(tmp_path / "images"), "image_size": 32, "command": "python train.py"}
    model = VQVAE(**model_args)
    state = {"model": "VQVAE", "model_args": model_args, "weights": model.state_dict()}
    save_plain(tmp_path / "t.pt", state | {"metadata": metadata})
    return tmp_path / "t.pt"


def flags_of(tokenizer, **more):
    flags = {"tokenizer": tokenizer, "out": tokenizer.parent / "run", "resume": False}
    flags |= {"data": None, "image_size": None, "other_data": False}
    return argparse.Namespace(**flags | more)


def test_data_and_size_are_the_tokenizers_unless_they_are_given(tokenizer):
    args = flags_of(tokenizer)
    model, state = open_tokenizer(args)
    assert args.data == str(tokenizer.parent / "images") and args.image_size == 32
    assert model.image_size == 32 and model.num_embeddings == 16
    assert state["metadata"]["data"] == args.data


def test_a_trailing_slash_does_not_make_other_data(tokenizer):
    args = flags_of(tokenizer, data=f"{tokenizer.parent / 'images'}/")
    open_tokenizer(args)
    assert args.image_size == 32


@pytest.mark.parametrize("other", [{"data": "shapes"}, {"image_size": 64}])
def test_other_data_and_sizes_are_taken_on_request_only(tokenizer, other):
    (name, value), *_ = other.items()
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value}.*--other-data"):
        open_tokenizer(flags_of(tokenizer, **other))
    model, _ = open_tokenizer(flags_of(tokenizer, other_data=True, **other))
    assert model.image_size == other.get("image_size", 32)


def test_a_size_that_the_tokenizer_cannot_halve_is_refused(tokenizer):
    with pytest.raises(InputError, match="30x30.*4"):
        open_tokenizer(flags_of(tokenizer, image_size=30, other_data=True))


def test_a_resumed_run_has_a_copy_of_its_own(tokenizer):
    args = flags_of(tokenizer, resume=True)
    (tokenizer.parent / "run").mkdir()
    tokenizer.rename(tokenizer.parent / "run" / "tokenizer.pt")
    assert open_tokenizer(args)[0].num_embeddings == 16


def test_no_tokenizer_is_named():
    with pytest.raises(InputError, match="--tokenizer.*checkpoint.pt"):
        open_tokenizer(argparse.Namespace(tokenizer=None))


# --- sampling ----------------------------------------------------------------------------------


def sampling_flags(**more):
    flags = {"guidance": [1.0], "temperature": [1.0], "top_k": None, "top_p": None}
    flags |= {"num_samples": None, "condition": "class", "condition_drop": 0.1, "prior": "gpt"}
    flags |= {"steps": None}
    return argparse.Namespace(**flags | more)


def test_every_combination_of_the_sampling_flags():
    (one,) = sampling_settings(sampling_flags(), 16, 9)
    assert one == {"guidance": 1.0, "temperature": 1.0, "top_k": None, "top_p": None}
    flags = sampling_flags(guidance=[1.0, 3.0], temperature=[1.0, 0.0], top_k=[4], top_p=[0.9])
    settings = sampling_settings(flags, 16, 9)
    assert [(s["guidance"], s["temperature"]) for s in settings] == [
        (1, 1), (1, 0), (3, 1), (3, 0)
    ]  # fmt: skip
    assert all((s["top_k"], s["top_p"]) == (4, 0.9) for s in settings)


def test_a_masked_transformer_has_rounds_too():
    (one,) = sampling_settings(sampling_flags(prior="masked"), 16, 64)
    assert one["steps"] == DEFAULT_STEPS
    settings = sampling_settings(sampling_flags(prior="masked", steps=[4, 8]), 16, 64)
    assert [setting["steps"] for setting in settings] == [4, 8]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"top_k": [4, 17]}, "top_k=17.*16"),
        ({"top_p": [1.5]}, "top_p=1.5"),
        ({"num_samples": 1}, "--num-samples 1"),
        ({"guidance": [1.0, 2.0], "condition": "none"}, "--guidance.*--condition"),
        ({"guidance": [2.0], "condition_drop": 0.0}, "--guidance.*--condition-drop"),
        ({"steps": [4, 10], "prior": "masked"}, "--steps 10: give 1 to 9"),
    ],
)
def test_settings_that_cannot_be_sampled_are_refused(flags, expected):
    with pytest.raises(InputError, match=expected):
        sampling_settings(sampling_flags(**flags), 16, 9)


# --- a file to write ------------------------------------------------------------------------


def test_an_output_has_its_suffix_and_is_none_of_the_images_that_are_read(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    path, default = str(tmp_path / "a.png"), "samples.png"
    assert output_path(str(tmp_path / "B.PNG"), default, [path, "gone.png"]) == tmp_path / "B.PNG"
    assert output_path(path, default) == tmp_path / "a.png"  # named, so it may be replaced
    with pytest.raises(InputError, match=r"--out x.jpg.*\.png"):
        output_path("x.jpg", default)
    with pytest.raises(InputError, match="overwritten"):
        output_path(path, default, [str(tmp_path / "." / "a.png")])
    assert output_path("exported", "folder").name == "exported"  # a folder has no suffix


def test_what_nobody_named_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("samples.png", "samples-2.png", "samples-3.png"):
        assert str(output_path(None, "samples.png")) == expected
        Path(expected).touch()
