"""A folder that vLLM serves right, with the plugin vllm-slq."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slq_embed.backbone.chat_template import with_prompts
from slq_embed.encoding.protocol import resolve_prompt

if TYPE_CHECKING:
    from slq_embed.encoder import SLQEncoder


def export_vllm(model: SLQEncoder, folder: str | Path) -> None:
    """Write a model as a folder that vLLM serves with the same embeddings, where the plugin ``vllm-slq`` is installed.

    It is the merged form, which everything else loads as well. Its chat template also knows the model's prompts: a request names
    one as ``chat_template_kwargs={"slq_task": "query"}``. Without the plugin, vLLM refuses the folder.

    Args:
        model: The encoder. Its backbone is one of vLLM's; vLLM says so if not.
        folder: Where to; made if it is not there.

    Raises:
        ValueError: If the model has parts that vLLM has no place for, or no merged form.
    """
    config = model.slq_config
    own = {
        "a query adapter": config.query_adapter is not None,
        "deep queries": config.deep_queries,
        "a token type of its queries": bool(config.query_token_type),
    }
    if named := " and ".join(name for name, is_there in own.items() if is_there):
        raise ValueError(
            f"vLLM cannot serve this model: it has {named}, which act inside the layers at the positions of the queries only. Use "
            "slq_embed.serving, or train queries with a projection head in their place."
        )
    folder = Path(folder)
    prompts = {task: resolve_prompt(model, task=task) or "" for task in ("query", "document")}
    template = with_prompts(model.processor.chat_template, prompts)
    model.save_pretrained(folder, form="merged")
    (folder / "chat_template.jinja").write_text(template, "utf8")
