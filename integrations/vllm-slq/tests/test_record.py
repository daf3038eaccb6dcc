"""What a folder must have so that vLLM serves it right."""

import pytest

from vllm_slq.record import require_prompts

NONE = {"query": "", "document": ""}


@pytest.mark.parametrize(
    ("host", "lost"),
    [
        ({"prompts": {"query": "find", "document": ""}}, r"\(query\)"),
        ({"prompts": {"passage": "read", **NONE}}, r"\(passage\)"),
        ({"prompts": {"all": "look", **NONE}, "default_prompt_name": "all"}, r"\(all\)"),
        ({"prompts": {"query": "find"}, "default_prompt_name": "query"}, r"\(query\)"),
    ],
)
def test_a_folder_whose_prompts_would_be_lost_is_refused(host, lost):
    with pytest.raises(
        ValueError, match=f"folder has prompts {lost} that its chat template does not know.*export_vllm"
    ):
        require_prompts(host, "{{ messages }}", "folder")
    require_prompts(host, '{{ {"query": "find"}.get(slq_task) }}', "folder")


@pytest.mark.parametrize(
    "host", [None, {}, {"prompts": NONE, "default_prompt_name": None}, {"prompts": {"other": "a"}}]
)
def test_a_folder_without_prompts_needs_none_in_its_template(host):
    require_prompts(host, "{{ messages }}", "folder")
