"""Keys of prefixes: what the backbone reads alike has one key, and nothing else has."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import normalizers

from slq_embed import PrefixStore
from slq_embed.prefix.keys import keys_from_tensor, keys_to_tensor


@pytest.fixture
def keys_of(encoder):
    encoder.prefix_store = PrefixStore()
    return lambda model, inputs, **options: model.transformer.prefix_keys(inputs, **options)


def test_other_queries_share_keys(encoder, keys_of, mixed):
    other = encoder.with_queries(7)
    other.prefix_store = PrefixStore()
    assert keys_of(other, mixed) == keys_of(encoder, mixed)


def test_inputs_prompts_and_images_have_keys_of_their_own(encoder, keys_of, mixed):
    keys = keys_of(encoder, mixed) + keys_of(encoder, mixed, prompt="Look.")
    assert len(set(keys)) == 2 * len(mixed)
    assert len(set(keys_of(encoder, ["a b", "ab", "a", "b"]))) == 4


@pytest.mark.parametrize("what", ["tokenizer", "image_processor", "image_kwargs"])
def test_what_reads_the_input_is_part_of_the_key(encoder, keys_of, mixed, what):
    before = keys_of(encoder, mixed)
    other = encoder.with_queries()
    if what == "tokenizer":
        tokenizer = other.processor.tokenizer = copy.deepcopy(other.tokenizer)
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        other.transformer.source._tokenizer = tokenizer
    elif what == "image_processor":
        other.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    else:
        other.transformer.reader.image_kwargs = {"do_convert_rgb": False}
    other.prefix_store = PrefixStore()
    assert not set(before) & set(keys_of(other, mixed))


def test_keys_travel_as_a_feature(encoder, keys_of, mixed):
    keys = keys_of(encoder, mixed)
    tensor = keys_to_tensor(keys)
    assert (tensor.shape, tensor.dtype) == ((len(mixed), 2), torch.int64)
    assert keys_from_tensor(tensor) == keys
    assert keys_from_tensor(encoder.preprocess(mixed)["prefix_key"]) == keys
