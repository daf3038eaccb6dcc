"""A folder that vLLM serves right, with the plugin vllm-slq."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slq_embed.backbone.chat_template import with_prompts, with_start
from slq_embed.backbone.families import tokenizer_of
from slq_embed.encoding.protocol import resolve_prompt
from slq_embed.saving.folder import edited_json
from slq_embed.saving.leftovers import placed_at_once

if TYPE_CHECKING:
    from slq_embed.encoder import SLQEncoder


def export_vllm(model: SLQEncoder, folder: str | Path) -> None:
    """Write a model as a folder that vLLM serves with the same embeddings, where the plugin ``vllm-slq`` is installed.

    It is the merged form, which everything else loads as well. Its chat template also knows the model's prompts: a request names
    one as ``chat_template_kwargs={"slq_task": "query"}``, and gets the default prompt if it names none. Without the plugin, vLLM
    refuses the folder.

    Args:
        model: The encoder. Its backbone is one of vLLM's; vLLM says so if not.
        folder: Where to; made if it is not there.

    Raises:
        ValueError: If the backbone has no merged form, or its queries a token type of their own.
    """
    if model.slq_config.query_token_type:
        raise ValueError(
            "vLLM cannot serve this model: its queries have a token type of their own, and vLLM knows no such types. Use "
            "slq_embed.serving."
        )
    folder = Path(folder)
    prompts = {task: resolve_prompt(model, task=task) or "" for task in ("query", "document")}
    default = resolve_prompt(model) or ""
    template = with_prompts(with_start(model.processor.chat_template, _start_of_chats(model)), prompts, default)
    with placed_at_once(folder) as unfinished:
        model.save_pretrained(unfinished, form="merged", create_model_card=False)
        (unfinished / "chat_template.jinja").write_text(template, "utf8")
        if default:
            with edited_json(unfinished / "sentence_bert_config.json") as values:
                settings = values["processing_kwargs"].setdefault("chat_template", {})
                if "chat_template" not in settings:  # else the host renders that template, which knows no prompts
                    # Plain Sentence Transformers sends its prompt as a system message, and "" as none: no default may come back.
                    settings["slq_task"] = "none"
    model._create_model_card(str(folder))


def _start_of_chats(model: SLQEncoder) -> str:
    # Processors add a token at the start where the chat template writes none; vLLM tokenizes a rendered chat as it is.
    tokenizer = tokenizer_of(model.processor)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    rendered = model.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    queries = set(model.slq_config.tokens.ids)
    written = [number for number in tokenizer(rendered, add_special_tokens=False)["input_ids"] if number not in queries]
    read = [number for number in model.preprocess(["a"])["input_ids"][0].tolist() if number not in queries]
    if read == written:
        return ""
    if tokenizer.bos_token and read == [tokenizer.bos_token_id, *written]:
        return str(tokenizer.bos_token)
    raise ValueError(
        "vLLM cannot serve this model: its processor puts more tokens around a chat than the tokenizer's bos_token at the start, "
        "and vLLM adds none. Use slq_embed.serving."
    )
