"""The names of the field: what was called otherwise once does not come back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import vqgan

ROOT = Path(__file__).parents[1]
IDENTIFIERS = """
    num_codes of_nothing knows_nothing WeightAverage companions about_run yardstick recognised
    prompt_right colour_right frechet_floors Pair load_pair Corpus CodeBatches code_table
    position_table condition_table data_start start_from waits_for_data restart_dead DEAD_BELOW
    keep_likely sample_large BACKOFF nats_per_code plain_bits_per_image ssim_whole_image at_once
    evaluation_batch tokenizer_of grid_of condition_of features_of colours_of batches_in_order
    Batches check_sides SHIPPED reparameterise normalised_mse draw_shapes draw_textures num_drawn
    average_decay adversary_learns adversary_is_used code_baselines code_bits nearest_codes
""".split()
FLAGS = """
    --yardstick --yardstick-epochs --average-decay --data-start --no-data-start --restart-dead
    --no-restart-dead --adversarial-start --discriminator-warmup --discriminator-lr
    --discriminator-channels --discriminator-norm --num-drawn --pictures
""".split()
KEYS = "about arguments companions recognised yardstick single left picture nats_per_code".split()
FILES = "yardstick.pt codes.pt codes.npz loading.py cli_codes.py".split()


def tracked(*endings):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.*")]
    return [ROOT / n for n in names if n.endswith(endings) and n != "tests/test_names.py"]


def test_retired_identifiers_flags_and_files_are_gone():
    """From code all of them; from pages, whose prose has words of its own, flags and files."""
    flags = rf"(?<![\w-])({'|'.join(FLAGS)})(?![\w-])|({'|'.join(map(re.escape, FILES))})"
    constants = [name.upper() for name in IDENTIFIERS if name.islower()]
    identifiers = re.compile(rf"\b({'|'.join(IDENTIFIERS + constants)})\b")
    patterns = [(re.compile(flags), (".py", ".sh", ".toml", ".md", ".ipynb"))]
    patterns += [(identifiers, (".py", ".sh", ".toml"))]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for pattern, endings in patterns
        for path in tracked(*endings)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert not found, "\n".join(found)


def keys(content):
    if isinstance(content, dict):
        yield from content
    for part in content.values() if isinstance(content, dict) else content:
        if isinstance(part, dict | list):
            yield from keys(part)


def test_retired_keys_are_gone_from_results():
    for path in tracked(".json"):
        retired = set(keys(json.loads(path.read_text()))) & {*KEYS, *IDENTIFIERS}
        assert not retired, (path.relative_to(ROOT), retired)


def test_the_top_of_the_package_is_what_its_list_says():
    for name in vqgan.__all__:
        assert hasattr(vqgan, name), name
    models = {"VAE", "SpatialVAE", "VQVAE", "VQVAE2", "VQGAN", "GPT", "VectorQuantizer"}
    models |= {"EMAVectorQuantizer", "FSQ", "LFQ", "SimVQ", "ResidualVQ", "MaskedTransformer"}
    assert models | {"load_model", "load_pipeline", "__version__"} == set(vqgan.__all__)


def test_the_top_of_the_package_loads_neither_torchvision_nor_matplotlib():
    code = "import sys, vqgan; sys.exit(bool({'torchvision', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
