from dataclasses import replace
from unittest import mock

import pytest
import torch

from vqgan import tokens
from vqgan.conditions import (
    NO_CONDITION,
    TRANSFORMS,
    caption_condition,
    class_condition,
    image_condition,
)
from vqgan.data import ImageDataset
from vqgan.errors import InputError
from vqgan.image_folder import ImageFiles
from vqgan.images import from_uint8
from vqgan.tokens import TokenDataset, TokenLoader, build_condition, load_tokens, tokenize
from vqgan.training import Run
from vqgan.vqvae import VQVAE

K, N = 32, 16  # codes in the book, tokens of an image
CPU = torch.device("cpu")


def make_tokenizer(images, seed=0):
    """A small VQ-VAE, untrained but for its codebook, which starts from the images' vectors."""
    torch.manual_seed(seed)
    model = VQVAE(num_hiddens=8, num_embeddings=K, num_downsamples=3)
    with torch.no_grad():
        model.train().encode(from_uint8(images[:64]))
    return model.eval()


@pytest.fixture(scope="module")
def few(shapes):
    return shapes.first(128)


@pytest.fixture(scope="module")
def tokenizer(few):
    return make_tokenizer(few.train_images)


class Once:
    """`load_tokens`, and how often it encoded."""

    def __init__(self, out, data):
        self.path, self.data = out / "tokens.pt", data

    def __call__(self, tokenizer, condition=NO_CONDITION, flip=True):
        with mock.patch.object(tokens, "tokenize", wraps=tokens.tokenize) as encoding:
            run = Run(
                out=self.path.parent, data=self.data, variance=1.0, device=CPU,
                dtype=torch.float32, metadata={}, epochs=1, seed=0, flip=flip,
                checkpoint_every=1, resume=False,
            )  # fmt: skip
            dataset = load_tokens(run, tokenizer, condition)
        self.times = encoding.call_count
        return dataset


@pytest.fixture
def once(tmp_path, few):
    return Once(tmp_path, few)


# --- once --------------------------------------------------------------------------------------


def test_images_become_tokens_once(once, tokenizer):
    first = once(tokenizer)
    assert once.times == 2  # training and test images
    with mock.patch.object(tokenizer, "encode", side_effect=AssertionError):
        second = once(tokenizer)
    assert once.times == 0
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)


def test_tokens_of_something_else_are_not_taken(once, tokenizer, few):
    once(tokenizer)
    other = make_tokenizer(few.train_images, seed=1)
    gray, edges = (image_condition(transform, K, N) for transform in ("gray", "edges"))
    for arguments in (
        (other,), (tokenizer, NO_CONDITION, False), (tokenizer, gray), (tokenizer, edges)
    ):  # fmt: skip
        once(*arguments)
        assert once.times == 2
    once.data = few.first(64)
    once(tokenizer, edges)
    assert once.times == 2


def test_a_class_takes_the_same_tokens_as_no_condition(once, tokenizer, few):
    once(tokenizer)
    once(tokenizer, class_condition(few.class_names))
    assert once.times == 0


@pytest.mark.parametrize("how", ["cut", "foreign", "keyless"])
def test_a_damaged_file_is_made_again(once, tokenizer, how):
    good = once(tokenizer)
    written = torch.load(once.path, weights_only=True)
    if how == "cut":
        once.path.write_bytes(once.path.read_bytes()[:500])
    else:
        torch.save([1] if how == "foreign" else {"train": written["train"]}, once.path)
    again = once(tokenizer)
    assert once.times == 2 and torch.equal(again.train, good.train)
    assert torch.load(once.path, weights_only=True)["key"] == written["key"]


def test_images_of_a_streamed_folder_are_told_apart_by_name_and_size(once, tokenizer, image_folder):
    """The folder itself may move."""
    paths = sorted(image_folder.rglob("*.png"))
    files = ImageFiles(paths, 32)
    once.data = ImageDataset(files[:20], files[20:], None, None, ())
    first = once(tokenizer)
    assert once.times == 2 and first.train.shape == (20, 2, 1 + N)
    folder = image_folder.rename(image_folder.with_name("moved"))
    paths = sorted(folder.rglob("*.png"))
    files = ImageFiles(paths, 32)
    once.data = ImageDataset(files[:20], files[20:], None, None, ())
    once(tokenizer)
    assert once.times == 0
    paths[3].write_bytes(paths[3].read_bytes() + b" ")
    once(tokenizer)
    assert once.times == 2


# --- what they are -----------------------------------------------------------------------------


def test_augmentations_are_the_tokens_of_the_images_and_of_their_mirror_images(
    once, tokenizer, few
):
    dataset = once(tokenizer)
    x = from_uint8(few.train_images)
    assert dataset.train.shape == (128, 2, 1 + N) and dataset.test.shape == (128, 1, 1 + N)
    assert dataset.train.dtype == torch.int32
    assert torch.equal(dataset.train[:, 0, 1:].long(), tokenizer.tokens(x))
    assert torch.equal(dataset.train[:, 1, 1:].long(), tokenizer.tokens(x.flip(3)))
    assert not torch.equal(dataset.train[:, 0], dataset.train[:, 1])
    tokens_of_test = tokenizer.tokens(from_uint8(few.test_images))
    assert torch.equal(dataset.test_tokens, tokens_of_test)
    assert dataset.test_tokens.dtype == dataset.test_conditions.dtype == torch.int64


def test_without_flips_there_is_one(once, tokenizer):
    assert once(tokenizer, flip=False).train.shape == (128, 1, 1 + N)


def test_a_class_is_the_label_before_the_tokens_of_each(once, tokenizer, few):
    dataset = once(tokenizer, class_condition(few.class_names))
    for augmentation in (0, 1):
        assert torch.equal(dataset.train[:, augmentation, 0].long(), few.train_labels)
    assert torch.equal(dataset.test_conditions[:, 0], few.test_labels)


def test_a_caption_is_its_words_before_the_tokens(once, tokenizer, few):
    condition = caption_condition(few.train_captions)
    dataset = once(tokenizer, condition)
    words = [condition.names[token] for token in dataset.train[5, 1, : condition.length].tolist()]
    assert " ".join(words).strip() == few.train_captions[5]
    assert dataset.test_conditions.shape == (128, condition.length)


def test_no_condition_is_one_start_token(once, tokenizer):
    dataset = once(tokenizer)
    assert (dataset.train[..., 0] == 0).all() and (dataset.test_conditions == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_image_is_the_tokens_of_its_picture(once, tokenizer, few, transform):
    dataset = once(tokenizer, image_condition(transform, K, N))
    assert dataset.train.shape == (128, 2, N + N)
    x = from_uint8(few.train_images)
    for augmentation, images in enumerate((x, x.flip(3))):
        expected = tokenizer.tokens(TRANSFORMS[transform](images))
        assert torch.equal(dataset.train[:, augmentation, :N].long(), expected)
        assert torch.equal(dataset.train[:, augmentation, N:].long(), tokenizer.tokens(images))


def test_tokenize_needs_no_gradient(tokenizer, few):
    rows = tokenize(few.test_images[:5], tokenizer, transform=None, flip=False, device=CPU)
    assert rows.shape == (5, 1, N) and not rows.requires_grad


# --- batches -----------------------------------------------------------------------------------

# Condition and tokens of image i are (i; i, i) as it is, and (100 + i; ...) mirrored.
ROWS = (torch.arange(40)[:, None] + torch.tensor([0, 100]))[..., None].expand(-1, -1, 3).int()
DATASET = TokenDataset(NO_CONDITION, ROWS, ROWS[:, :1])


def loader(seed=0, flip=True):
    return TokenLoader(DATASET, 8, device=CPU, seed=seed, flip=flip)


def test_a_batch_has_one_of_the_two_augmentations_of_each_image():
    conditions, given = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    assert conditions.dtype == given.dtype == torch.int64
    assert conditions.shape == (40, 1) and given.shape == (40, 2)
    assert (given == conditions).all()
    assert sorted((given[:, 0] % 100).tolist()) == list(range(40))
    assert 5 < (given[:, 0] >= 100).sum() < 35


def test_without_flips_a_batch_has_the_first():
    assert max(given.max() for _, given in loader(flip=False)) < 40


def test_batches_go_on_where_they_were():
    batches = loader()
    epoch = iter(batches)
    next(epoch), next(epoch)
    state = batches.state_dict()
    rest = [*epoch, *batches]
    other = loader(seed=5)
    other.load_state_dict(state)
    again = [*other, *other]
    assert len(rest) == 3 + 5
    of_others = TokenLoader(DATASET._replace(train=ROWS + 1), 8, device=CPU, seed=0, flip=True)
    with pytest.raises(InputError, match="other training images"):
        of_others.load_state_dict(state)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(rest, again, strict=True))


# --- the condition of a data set ---------------------------------------------------------------


def test_each_kind_of_condition_is_of_its_data_and_tokenizer(few, tokenizer):
    kinds = {
        kind: build_condition(kind, few, tokenizer, transform="edges")
        for kind in ("none", "class", "image")
    }
    assert kinds["none"] == NO_CONDITION
    assert kinds["class"] == class_condition(few.class_names)
    assert kinds["image"] == image_condition("edges", K, N)


def test_captions_are_those_of_the_training_images(shapes, tokenizer):
    condition = build_condition("caption", shapes, tokenizer, transform="edges")
    assert condition == caption_condition(shapes.train_captions)


def test_what_the_data_set_does_not_have_is_refused(few, tokenizer):
    for data in (replace(few, train_labels=None), replace(few, class_names=())):
        with pytest.raises(InputError, match="condition=class.*none"):
            build_condition("class", data, tokenizer, transform="edges")
    without = replace(few, train_captions=None, test_captions=None)
    with pytest.raises(InputError, match="condition=caption"):
        build_condition("caption", without, tokenizer, transform="edges")


def test_words_that_only_test_captions_have_are_refused(few, tokenizer):
    data = replace(few, test_captions=["small mauve star on blue"])
    with pytest.raises(InputError, match="mauve"):
        build_condition("caption", data, tokenizer, transform="edges")
