from __future__ import annotations

import pytest

from slq_embed import SLQEncoder
from slq_embed.backbone import check
from slq_embed.backbone.families import load_backbone, load_processor
from slq_embed.backbone.query_tokens import allocate
from tests.checkpoints import QWEN_VISION, build_tokenizer
from tests.families import others
from tests.families.building import write


def test_spare_rows_come_first():
    tokenizer = build_tokenizer(QWEN_VISION)
    used = len(tokenizer)
    tokens = allocate(tokenizer, used + 10, 4, "adapter")
    assert tokens.source == "spare"
    assert tokens.ids == tuple(range(used, used + 4))
    assert tokenizer.convert_tokens_to_ids("<|slq_2|>") == used + 2


@pytest.mark.parametrize("pattern", ["<|reserved_special_token_{}|>", "<unused{}>", "<|reserved_{}|>", "<SPECIAL_{}>"])
def test_then_tokens_that_the_tokenizers_makers_reserved(pattern):
    tokenizer = build_tokenizer([*QWEN_VISION, *(pattern.format(n) for n in range(6))])
    tokens = allocate(tokenizer, len(tokenizer), 4, "adapter")
    assert tokens.source == "reserved"
    assert tokens.strings == tuple(pattern.format(n) for n in (2, 3, 4, 5))
    assert tokenizer("x" + "".join(tokens.strings)).input_ids[-4:] == list(tokens.ids)


def test_without_free_rows_the_error_names_the_merged_form():
    tokenizer = build_tokenizer(QWEN_VISION)
    with pytest.raises(ValueError, match=r"3 spare rows and 0 reserved tokens.*form='merged'"):
        allocate(tokenizer, len(tokenizer) + 3, 4, "adapter")


def test_the_merged_form_adds_rows():
    tokenizer = build_tokenizer(QWEN_VISION)
    rows = len(tokenizer)
    tokens = allocate(tokenizer, rows + 1, 4, "merged")
    assert tokens.source == "resized"
    assert tokens.ids == tuple(range(rows, rows + 4))


@pytest.mark.parametrize(("spare", "reserved"), [(2, 2), (2, 5), (5, 2)])
def test_free_rows_are_those_that_one_form_can_take(tmp_path, spare, reserved):
    """All queries are spare rows or reserved tokens, not some of each; a backbone with too few works all the same."""
    parts = others.llama()
    parts.processor.add_tokens(
        [f"<|reserved_special_token_{number}|>" for number in range(reserved)], special_tokens=True
    )
    parts.config.vocab_size = len(parts.processor) + spare
    folder = write(tmp_path, parts)
    model, processor = load_backbone(str(folder)), load_processor(str(folder))
    report = check(model, processor)
    assert (report.schedule, report.free_rows) == ("prefix", max(spare, reserved))
    assert len(SLQEncoder.from_backbone(model, processor, num_queries=report.free_rows).queries) == report.free_rows
    with pytest.raises(ValueError, match=f"{report.free_rows + 1} latent queries need"):
        SLQEncoder.from_backbone(model, processor, num_queries=report.free_rows + 1)
