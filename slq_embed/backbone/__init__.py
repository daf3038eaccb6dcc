"""The frozen multimodal LLM: its family, its identity, its chat template, the tokens of the queries."""

from slq_embed.backbone.chat_template import DEFAULT_INSTRUCTIONS
from slq_embed.backbone.families import FAMILIES, Family
from slq_embed.backbone.lock import lock_of
from slq_embed.backbone.report import Finding, Report
from slq_embed.backbone.self_check import check

__all__ = ["DEFAULT_INSTRUCTIONS", "FAMILIES", "Family", "Finding", "Report", "check", "lock_of"]
